"""Formats per layer: who matches, what is inherited, what is refused, and the way through files."""

from __future__ import annotations

import json
import pathlib
from dataclasses import replace
from typing import Any

import pytest
import yaml

from evenbits.errors import EvenbitsError
from evenbits.numerics.format import Format
from evenbits.schemes.scheme import LayerFormats, Scheme, resolve

MIXED: dict[str, Any] = {
    "weights": "int4:g64:mse",
    "input_activations": "int8:row",
    "overrides": {
        "encoder.0.*": {"weights": "ovp4:g32"},
        "classifier": {"weights": "int8:row", "input_activations": None},
        "encoder.*.out": {"input_activations": "int8:tensor", "dynamic": False},
    },
}


def spelled(formats: LayerFormats) -> tuple[str, str | None, bool]:
    activations = formats.input_activations
    return str(formats.weights), None if activations is None else str(activations), formats.dynamic


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.0.q", ("ovp4:g32", "int8:row", True)),
        ("encoder.0.out", ("ovp4:g32", "int8:row", True)),  # the first that matches, not the closest
        ("encoder.1.out", ("int4:g64:mse", "int8:tensor", False)),
        ("encoder.1.q", ("int4:g64:mse", "int8:row", True)),
        ("classifier", ("int8:row", None, True)),
        ("heads.classifier", ("int8:row", None, True)),  # last parts match, as in `ignore`
        ("classifier.dense", ("int4:g64:mse", "int8:row", True)),
        ("Encoder.0.q", ("int4:g64:mse", "int8:row", True)),
    ],
)
def test_the_first_match_decides_and_the_rest_is_inherited(name: str, expected: tuple[str, str | None, bool]) -> None:
    assert spelled(resolve(MIXED).of(name)) == expected


def test_without_overrides_every_layer_has_the_schemes_own() -> None:
    scheme = resolve("W8A8_STATIC")
    assert scheme.overrides == () and scheme.override_of("a") is None
    assert scheme.of("a") == LayerFormats(scheme.weights, scheme.input_activations, dynamic=False)
    assert scheme.of("a").static and scheme.formats == (scheme.of("a"),)


def test_order_is_what_is_written() -> None:
    first = {"a.*": {"weights": "ovp4:row"}, "*.b": {"weights": "nf4:g64"}}
    there = resolve({"weights": "int8:row", "overrides": first})
    back = resolve({"weights": "int8:row", "overrides": dict(reversed(first.items()))})
    assert (str(there.of("a.b").weights), str(back.of("a.b").weights)) == ("ovp4:row", "nf4:g64")
    assert there != back


def test_the_text_of_a_scheme_file_reads_back(tmp_path: pathlib.Path) -> None:
    for scheme in (resolve(MIXED), resolve("W8A8_STATIC"), resolve({"weights": "nf4:g64", "ignore": ["*.ü", "a: b"]})):
        (tmp_path / "s.yaml").write_text(scheme.to_yaml(), encoding="utf-8")
        assert resolve(tmp_path / "s.yaml") == scheme


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_round_trip_through_plain_data_and_files(tmp_path: pathlib.Path, suffix: str) -> None:
    scheme = resolve(MIXED)
    assert resolve(scheme) is scheme
    assert resolve(scheme.to_json()) == scheme and hash(resolve(scheme.to_json())) == hash(scheme)
    file = tmp_path / f"mixed{suffix}"
    plain = scheme.to_json()
    file.write_text(json.dumps(plain) if suffix == ".json" else yaml.safe_dump(plain, sort_keys=False))
    assert resolve(file) == scheme
    assert [pattern for pattern, _ in resolve(file).overrides] == list(MIXED["overrides"])


def test_replacing_a_key_keeps_the_overrides() -> None:
    scheme = resolve(MIXED)
    changed = replace(scheme, ignore=("x",))
    assert changed.overrides == scheme.overrides and changed.ignores("x")
    # An override holds its formats whole: what it inherited stays when the scheme's own change.
    assert spelled(replace(scheme, weights=Format.parse("int8:row")).of("encoder.1.out"))[0] == "int4:g64:mse"


def test_pairs_of_formats_are_taken_as_they_are() -> None:
    formats = LayerFormats("ovp4:row", "int8:tensor", False)  # type: ignore[arg-type]
    scheme = Scheme(Format.parse("int8:row"), overrides=(("a", formats),))
    assert scheme.of("a") is formats


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("encoder", "'overrides' must map layer names to formats; given 'encoder'"),
        (None, "'overrides' must map"),
        (3, "'overrides' must map"),
        (["a"], "'overrides' must map"),
        ({3: {"weights": "int8:row"}}, "'overrides' must map"),
        ({"a": "ovp4:g32"}, "the override 'a' must hold keys such as 'weights: ovp4:g32'; given 'ovp4:g32'"),
        ({"a": None}, "the override 'a' must hold keys"),
        ({"a": {}}, "the override 'a' must hold keys"),
        ({"a": {"wieghts": "ovp4:g32"}}, "unknown key in the override 'a': 'wieghts'. Did you mean 'weights'?"),
        ({"a": {"ignore": ["b"]}}, "unknown key in the override 'a': 'ignore'"),
        ({"a": {"overrides": {}}}, "unknown key in the override 'a': 'overrides'"),
        ({"a": {3: 4}}, "unknown key in the override 'a': '3'"),
        ({"a": {"weights": "ovp5:g32"}}, "the override 'a': "),
        ({"a": {"weights": None}}, "the override 'a': "),
        ({"a": {"dynamic": "no"}}, "the override 'a': scheme key 'dynamic' must be true or false"),
        ({"a": {"dynamic": False}}, "the override 'a': static activations have one scale per tensor"),
        ([("a", {"weights": "int8:row"}), ("a", {"weights": "int4:row"})], "names a pattern twice"),
    ],
)
def test_wrong_overrides_are_named(overrides: object, words: str) -> None:
    with pytest.raises(EvenbitsError) as caught:
        resolve({"weights": "int8:row", "input_activations": "int8:row", "overrides": overrides})
    assert words in str(caught.value)
