"""Recipes: the shipped ones read, and every wrong word in a file of one's own is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from evenbits.errors import EvenbitsError
from evenbits.schemes.recipe import Recipe, RecipeRun, read_recipe, shipped
from evenbits.schemes.scheme import resolve

RUN: dict[str, Any] = {"name": "int4", "scheme": "W4A4"}
GOOD: dict[str, Any] = {
    "title": "t",
    "model": "minilm_glue/sst2",
    "task": "classification",
    "evaluation": "sst2/dev.tsv",
    "runs": [RUN],
}


def _file(folder: Path, data: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def test_every_shipped_recipe_reads() -> None:
    assert "olive_sst2" in shipped()
    for name in shipped():
        recipe = read_recipe(name)
        assert recipe.title and recipe.runs and len({run.name for run in recipe.runs}) == len(recipe.runs)
        assert recipe == read_recipe(Path(name))


def test_the_olive_recipe() -> None:
    recipe = read_recipe("olive_sst2")
    assert (recipe.model, recipe.task, recipe.samples) == ("minilm_glue/sst2", "classification", 128)
    assert (recipe.evaluation, recipe.calibration) == ("sst2/dev.tsv", "sst2/train.tsv")
    by_scheme = {run.scheme: run for run in recipe.runs}
    assert by_scheme[resolve("W4A4")].method == "rtn"
    assert by_scheme[resolve("W4A4_ANT")].method == "ant"
    by_name = {run.name: run for run in recipe.runs}
    assert recipe.reference == "OliVe, released rule"
    assert by_name["OliVe, released rule"].scheme == resolve("W4A4_OVP_REFERENCE")
    assert by_name["OliVe, released rule"].options == {"weighted": False}
    assert by_name["OliVe, ours"] == RecipeRun("OliVe, ours", resolve("W4A4_OVP"), "olive")
    assert by_name["OliVe, ours, bias corrected"].options == {"bias_correction": True}
    assert {resolve("W4A8_OVP"), resolve("W4A8_OVP_G32"), resolve("W4A16_OVP_G32")} <= set(by_scheme)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_file_of_ones_own(tmp_path: Path, as_text: bool) -> None:
    own = {"weights": "ovp4-mix:g32", "input_activations": "int8:row"}
    runs = [{**RUN, "method": "rtn", "published": 92}, {"name": "ü", "scheme": own, "options": {"policy": "paper"}}]
    path = _file(tmp_path, {**GOOD, "runs": runs, "samples": 8, "calibration": None, "published": 93.5})
    recipe = read_recipe(str(path) if as_text else path)
    assert recipe == Recipe(
        "t",
        "minilm_glue/sst2",
        "classification",
        "sst2/dev.tsv",
        (
            RecipeRun("int4", resolve("W4A4"), "rtn", {}, 92),
            RecipeRun("ü", resolve(own), None, {"policy": "paper"}, None),
        ),
        None,
        8,
        93.5,
    )


def test_defaults(tmp_path: Path) -> None:
    recipe = read_recipe(_file(tmp_path, GOOD))
    assert (recipe.calibration, recipe.samples, recipe.published) == (None, 128, None)
    assert recipe.runs == (RecipeRun("int4", resolve("W4A4")),)
    assert {field.name for field in dataclasses.fields(Recipe)} >= set(GOOD)


@pytest.mark.parametrize("name", ["olive_sst", "olive-sst2", "olive_sst2.yml.bak", "", "../presets"])
def test_an_unknown_recipe(name: str) -> None:
    with pytest.raises(EvenbitsError, match=r"unknown recipe .* Allowed: .*olive_sst2"):
        read_recipe(name)
    if name.startswith("olive"):
        with pytest.raises(EvenbitsError, match="Did you mean 'olive_sst2'"):
            read_recipe(name)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({**GOOD, "evalution": "x"}, "mine.yaml: 'evalution'. Did you mean 'evaluation'?"),
        ({**GOOD, 3: "x"}, "mine.yaml: '3'"),
        ({**GOOD, "runs": [{**RUN, "shceme": "W4A4"}]}, "mine.yaml, runs: 'shceme'. Did you mean 'scheme'?"),
        ({**GOOD, "runs": [RUN, {**RUN, "option": {}}]}, "'option'. Did you mean 'options'?"),
        *[({k: v for k, v in GOOD.items() if k != key}, f"mine.yaml lacks the key '{key}'") for key in GOOD],
        ({**GOOD, "runs": [{"scheme": "W4A4"}]}, "runs lacks the key 'name'; it needs: name, scheme"),
        ({**GOOD, "runs": [{"name": "a"}]}, "runs lacks the key 'scheme'"),
        ({**GOOD, "runs": []}, "'runs' must be a list with at least one run"),
        ({**GOOD, "runs": None}, "'runs' must be a list"),
        ({**GOOD, "runs": {"a": RUN}}, "'runs' must be a list"),
        ({**GOOD, "runs": ["W4A4"]}, "runs must hold keys and values; given str"),
        ({**GOOD, "runs": [RUN, {"name": "second", "scheme": "W4A5"}]}, "run 'second': unknown scheme 'W4A5'. Did you"),
        ({**GOOD, "runs": [{**RUN, "scheme": {"wieghts": "int8:row"}}]}, "run 'int4': unknown key in scheme"),
        ({**GOOD, "runs": [{**RUN, "scheme": None}]}, "run 'int4': a scheme is a preset name"),
        ({**GOOD, "runs": [{**RUN, "options": None}]}, "runs: 'options' must be keys and values; given None"),
        ({**GOOD, "runs": [{**RUN, "options": ["alpha"]}]}, "'options' must be keys and values"),
        ({**GOOD, "runs": [{**RUN, "published": "92.4 %"}]}, "'published' must be a number; given '92.4 %'"),
        ({**GOOD, "runs": [{**RUN, "name": 4}]}, "'name' must be text; given 4"),
        ({**GOOD, "runs": [{**RUN, "method": ["rtn"]}]}, "'method' must be text"),
        ({**GOOD, "samples": "many"}, "'samples' must be a whole number; given 'many'"),
        ({**GOOD, "samples": True}, "'samples' must be a whole number; given True"),
        ({**GOOD, "model": 5}, "'model' must be text; given 5"),
        ({**GOOD, "model": None}, "'model' must be text; given None"),
        ({**GOOD, "evaluation": ["a.tsv"]}, "'evaluation' must be text"),
        ("", "mine.yaml must hold keys and values; given NoneType"),
        ("- a\n- b\n", "must hold keys and values; given list"),
        ("olive\n", "must hold keys and values; given str"),
        ("title: [unclosed\n", "mine.yaml is not YAML"),
        ("title: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        ("\ttabs: 1\n", "is not YAML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, data: Any, words: str) -> None:
    with pytest.raises(EvenbitsError) as caught:
        read_recipe(_file(tmp_path, data))
    assert words in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("missing.yaml", "binary.yaml", "folder.yaml"):
        with pytest.raises(EvenbitsError, match=rf"the recipe .*{name} cannot be read"):
            read_recipe(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference": "in4"}, "a run 'in4'. Did you mean 'int4'"),
        ({"reference": 4}, "'reference' must be the name of a run"),
        ({"runs": [RUN, RUN]}, "two runs are called"),
    ],
)
def test_runs_are_called_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EvenbitsError, match=words):
        read_recipe(_file(tmp_path, {**GOOD, **changes}))
