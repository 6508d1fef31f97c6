"""Schemes from names, mappings and files; every wrong word is named."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from dataclasses import replace

import pytest

from evenbits.errors import EvenbitsError
from evenbits.numerics.format import Format
from evenbits.schemes.presets import PRESETS
from evenbits.schemes.scheme import LayerFormats, Scheme, resolve


def _format(spelling: str) -> Format:
    return Format.parse(spelling)


@pytest.mark.parametrize(
    ("name", "weights", "activations", "dynamic"),
    [
        ("W8A8", "int8:row", "int8:row", True),
        ("W8A8_STATIC", "int8:row", "int8:tensor", False),
        ("W8A16", "int8:row", None, True),
        ("W4A16", "int4:g128:mse", None, True),
    ],
)
def test_presets(name: str, weights: str, activations: str | None, dynamic: bool) -> None:
    for spelling in (name, name.lower(), name.replace("_", "-"), name.title()):
        scheme = resolve(spelling)
        assert str(scheme.weights) == weights
        assert scheme.input_activations == (None if activations is None else _format(activations))
        assert (scheme.dynamic, scheme.ignore) == (dynamic, ("lm_head",))


def test_every_preset_resolves_and_round_trips() -> None:
    assert {"W8A8", "W8A8_STATIC"} <= set(PRESETS)
    for name in PRESETS:
        scheme = resolve(name)
        assert resolve(json.loads(json.dumps(scheme.to_json()))) == scheme


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(_format("int4:g32:7.5")),
        Scheme(_format("int8:channel:127.5"), _format("int8:token:affine"), True, ()),
        Scheme(_format("int8:row"), _format("int8:tensor"), False, ("lm_head", "*.classifier")),
        Scheme(_format("uint4:g64:affine:free:p99.95")),
    ],
)
def test_json_round_trip(scheme: Scheme, tmp_path: pathlib.Path) -> None:
    text = json.dumps(scheme.to_json(), indent="\t")
    assert resolve(json.loads(text)) == scheme
    (tmp_path / "s.json").write_text(text)
    assert resolve(tmp_path / "s.json") == scheme
    assert resolve(str(tmp_path / "s.json")) == scheme
    assert set(scheme.to_json()) == {field.name for field in dataclasses.fields(Scheme)}


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_yaml_file(tmp_path: pathlib.Path, suffix: str) -> None:
    file = tmp_path / f"mine{suffix}"
    file.write_text("weights: int4:g64\ninput_activations: int8:row\nignore: [head, '*.gate']  # ü\n", encoding="utf-8")
    assert resolve(file) == Scheme(_format("int4:g64"), _format("int8:row"), True, ("head", "*.gate"))


def test_a_scheme_is_passed_through_and_takes_spellings() -> None:
    scheme = Scheme("int8:row", "int8:token", ignore=["a"])  # type: ignore[arg-type]
    assert resolve(scheme) is scheme
    assert scheme == Scheme(_format("int8:row"), _format("int8:row"), ignore=("a",))
    assert hash(scheme) == hash(resolve(scheme.to_json()))


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("W8A9", "unknown scheme 'W8A9'. Did you mean 'W8A8'? Allowed: W4A16, "),
        ("w8a8-statik", "Did you mean 'W8A8_STATIC'?"),
        ("", "unknown scheme ''"),
        (None, "given NoneType"),
        (8, "given int"),
        ({"wieghts": "int8:row"}, "unknown key in scheme: 'wieghts'. Did you mean 'weights'?"),
        ({"weights": "int8:row", "activations": "int8:row"}, "Did you mean 'input_activations'?"),
        ({"weights": "int8:row", 3: 4}, "unknown key in scheme: '3'"),
        ({}, "has no key 'weights'"),
        ({"dynamic": True}, "has no key 'weights'"),
        ({"weights": "int8:rwo"}, "unknown granularity 'rwo'"),
        ({"weights": None}, "TYPE:GRANULARITY, such as"),
        ({"weights": "int8:row", "input_activations": "itn8:row"}, "Did you mean 'int8'?"),
        ({"weights": "int8:row", "input_activations": 8}, "TYPE:GRANULARITY, such as"),
        ({"weights": "int8:row", "ignore": "lm_head"}, "'ignore' must be a list"),
        ({"weights": "int8:row", "ignore": None}, "'ignore' must be a list"),
        ({"weights": "int8:row", "ignore": 7}, "'ignore' must be a list"),
        ({"weights": "int8:row", "ignore": [1]}, "'ignore' must be a list"),
        ({"weights": "int8:row", "tied": "yes"}, "'tied' must be true or false; given 'yes'"),
        ({"weights": "int8:row", "dynamic": "no"}, "'dynamic' must be true or false; given 'no'"),
        ({"weights": "int8:row", "dynamic": 0}, "'dynamic' must be true or false"),
        (
            {"weights": "int8:row", "input_activations": "int8:row", "dynamic": False},
            "such as 'int8:tensor'; given int8:row",
        ),
        ({"weights": "int8:row", "input_activations": "int8:g4", "dynamic": False}, "given int8:g4"),
    ],
)
def test_wrong_words_are_named(scheme: object, words: str) -> None:
    with pytest.raises(EvenbitsError) as caught:
        resolve(scheme)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_static_without_activations_is_harmless() -> None:
    assert resolve({"weights": "int8:row", "dynamic": False}).input_activations is None


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("bad.yaml", "weights: [int8", "cannot be read"),
        ("bad.json", '{"weights": "int8:row",}', "cannot be read"),
        ("list.yaml", "- int8:row\n", "must hold keys and values"),
        ("text.yml", "int8\n", "must hold keys and values"),
        ("empty.yaml", "", "must hold keys and values"),
        ("list.json", "[]", "must hold keys and values"),
        ("key.yaml", "wieghts: int8:row\n", "key.yaml: 'wieghts'. Did you mean 'weights'?"),
        ("none.yaml", "dynamic: true\n", "none.yaml has no key 'weights'"),
        ("tag.yaml", "weights: !!python/object/apply:os.getcwd []\n", "cannot be read"),
        ("missing.yaml", None, "missing.yaml cannot be read"),
        ("binary.yaml", b"\xff\xfe\x00weights", "cannot be read"),
        ("binary.json", b"\xff\xfe\x00weights", "cannot be read"),
    ],
)
def test_files_that_are_no_schemes(tmp_path: pathlib.Path, name: str, text: str | bytes | None, words: str) -> None:
    if isinstance(text, str):
        (tmp_path / name).write_text(text)
    elif text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(EvenbitsError) as caught:
        resolve(tmp_path / name)
    assert words in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("lm_head", True),
        ("model.lm_head", True),
        ("model.lm_head_2", False),
        ("lm_head.proj", False),
        ("a.classifier", True),
        ("a.b.classifier", True),
        ("classifier", False),
        ("layers.3.q", True),
        ("layers.30.q", False),
        ("Layers.3.q", False),
        ("encoder.k", True),
        ("decoder.encoder.k", False),
        ("", False),
    ],
)
def test_ignore(name: str, ignored: bool) -> None:
    scheme = Scheme(_format("int8:row"), ignore=("lm_head", "*.classifier", "layers.?.q", "encoder.k"))
    assert scheme.ignores(name) is ignored


def test_with_head_takes_lm_head_off_the_list_and_nothing_else() -> None:
    scheme = Scheme(_format("int8:row"), ignore=("lm_head", "a"), overrides=(("a", LayerFormats(_format("int4:row"))),))
    assert scheme.with_head() == replace(scheme, ignore=("a",), tied=True)
    assert resolve(scheme.with_head().to_json()) == scheme.with_head() == scheme.with_head().with_head()


def test_nothing_is_ignored_by_an_empty_list() -> None:
    assert not Scheme(_format("int8:row"), ignore=()).ignores("lm_head")
