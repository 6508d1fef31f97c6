"""`table`, `quantize` and `inspect` on outlier-victim pairs, as people and scripts meet them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evenbits.cli import main

FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    with torch.no_grad():
        for layer in (model[1], model[3]):
            layer.weight[torch.rand_like(layer.weight) < 0.03] *= 12
    return model

def other():
    return nn.Sequential(nn.Linear(16, 3))
"""


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1 and self.out.endswith("}\n"), self.out
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    def refused(self, match: str) -> None:
        """Exit code 1, nothing on standard output, the last line on standard error says why."""
        assert self.code == 1 and self.out == "", (self.code, self.out, self.err)
        last = self.err.splitlines()[-1]
        assert last.startswith("evenbits: ") and match in last, self.err


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["evenbits", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capfd.readouterr()
        code = end.value.code
        return Done(code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err)

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain model, arrays to calibrate and score it on, and a recipe for both."""
    (tmp_path / "net.py").write_text(FACTORY)
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((60, 16)).astype(np.float32)
    np.savez(tmp_path / "x.npz", inputs=inputs)
    np.savez(tmp_path / "xy.npz", inputs=inputs, labels=generator.integers(0, 3, 60))
    recipe = {
        "title": "tiny [table]", "model": "net.py:build", "task": "classification", "evaluation": "xy.npz",
        "calibration": "x.npz", "samples": 20, "published": 0.4,
        "runs": [
            {"name": "int2", "scheme": {"weights": "int2:row"}, "method": "rtn"},
            {"name": "[pairs]", "scheme": "W4A4_OVP", "options": {"policy": "paper"}, "published": 0.39},
        ],
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return tmp_path


def _quantized(run: Run, folder: Path, scheme: str, *more: str) -> Done:
    arguments = ("--scheme", scheme, "--calibration", folder / "x.npz", *more)
    return run("quantize", f"{folder / 'net.py'}:build", "-o", folder / "out", *arguments)


# ------------------------------------------------------------------------------------------------------------- inspect


@pytest.mark.parametrize("scheme", ["W4A4_OVP", "W4A8_OVP", "W4A16_OVP_G32", "w4a4-ovp-reference"])
def test_inspect_shows_what_became_of_the_pairs(scheme: str, run: Run, folder: Path) -> None:
    made = _quantized(run, folder, scheme, "--json").json
    assert made["method"] == "olive" and "output of a calibration batch" in made["compared"]
    shown = run("inspect", folder / "out", "--json").json
    quantized = {row["name"]: row for row in made["layers"] if row["status"] == "quantized"}
    assert {row["name"] for row in shown["layers"]} == set(quantized) == {"1", "3"}
    for row in shown["layers"]:
        assert row["pairs"] == quantized[row["name"]]["pairs"]
        assert row["pairs"]["nn"] + row["pairs"]["on"] + row["pairs"]["oo"] == pytest.approx(100)
        assert row["format"] == quantized[row["name"]]["format"] and row["format"].startswith("ovp4-")


def test_inspect_for_people(run: Run, folder: Path) -> None:
    _quantized(run, folder, "W4A8_OVP")
    done = run("inspect", folder / "out")
    assert done.code == 0 and "method olive" in " ".join(done.out.split())  # the title wraps where the path is long
    for word in ("outlier-victim pairs", "NN %", "ON %", "OO %", "saturated %", "N: normal, O: outlier", "ovp4-"):
        assert word in done.out
    assert "true bits per quantized weight" in done.out and "All files intact" in done.out


@pytest.mark.parametrize("scheme", ["W4A4_ANT", "W8A8"])
def test_what_has_no_pairs_shows_none(scheme: str, run: Run, folder: Path) -> None:
    assert _quantized(run, folder, scheme).code == 0
    done = run("inspect", folder / "out")
    assert done.code == 0 and "outlier-victim pairs" not in done.out
    assert all(row["pairs"] is None for row in run("inspect", folder / "out", "--json").json["layers"])


def test_a_pair_checkpoint_with_an_illegal_byte_or_a_flipped_one_is_refused(run: Run, folder: Path) -> None:
    _quantized(run, folder, "W4A8_OVP")
    weights = folder / "out" / "evenbits.safetensors"
    data = bytearray(weights.read_bytes())
    data[-40] ^= 0x88
    weights.write_bytes(data)
    run("inspect", folder / "out").refused("altered")


def test_a_pair_checkpoint_is_scored_as_the_model_in_memory(run: Run, folder: Path) -> None:
    _quantized(run, folder, "W4A4_OVP")
    model = ("--model", f"{folder / 'net.py'}:build")
    task = ("--task", "classification", "--data", folder / "xy.npz", "--json")
    scored = run("evaluate", folder / "out", *model, *task).json
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
    recipe |= {"samples": 60, "model": str(folder / "net.py") + ":build"}
    recipe["runs"] = [{"name": "same", "scheme": "W4A4_OVP"}]
    (folder / "same.yaml").write_text(yaml.safe_dump(recipe))
    table = run("table", folder / "same.yaml", "--data", folder, "--json").json
    assert table["rows"][1]["metric"] == scored["metrics"]["accuracy"]


# --------------------------------------------------------------------------------------------------------------- table


def test_table_as_json(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = run("table", "tiny.yaml", "--json")
    found = done.json
    assert (found["title"], found["metric"], found["n"]) == ("tiny [table]", "accuracy", 60)
    assert [row["name"] for row in found["rows"]] == ["float", "int2", "[pairs]"]
    assert "int2 …" in done.err and "[pairs] …" in done.err
    first, *others = found["rows"]
    assert first["p"] is None and first["bits_per_weight"] == 32
    for row in others:
        assert row["difference"] == pytest.approx(row["metric"] - first["metric"])
        assert 0 < row["p"] <= 1 and row["weight_bytes"] > 0
    assert [row["published"] for row in found["rows"]] == [0.4, None, 0.39]


def test_table_for_people(run: Run, folder: Path) -> None:
    done = run("table", folder / "tiny.yaml", "--data", folder, "--model", f"{folder / 'net.py'}:build")
    assert done.code == 0
    for word in (
        "tiny [table], n = 60",
        "accuracy",
        "against float",
        "bits / weight",
        "published",
        "[pairs]",
        "0.3900",
    ):
        assert word in done.out
    assert "exact McNemar test" in done.out and "int2 …" not in done.out


def test_a_table_of_another_metric_says_where_its_errors_come_from(run: Run, folder: Path) -> None:
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**recipe, "metric": "matthews", "runs": recipe["runs"][:1]}))
    done = run("table", folder / "tiny.yaml", "--data", folder, "--model", f"{folder / 'net.py'}:build")
    assert done.code == 0 and "matthews" in done.out
    assert "by bootstrap over items" in done.out and "McNemar" not in done.out


def test_another_model_by_option(run: Run, folder: Path) -> None:
    arguments = ("table", folder / "tiny.yaml", "--data", folder, "--json")
    plain = f"{folder / 'net.py'}"
    one = run(*arguments, "--model", f"{plain}:build").json["rows"][0]["metric"]
    scored = run("evaluate", f"{plain}:build", "--task", "classification", "--data", folder / "xy.npz", "--json").json[
        "metrics"
    ]["accuracy"]
    assert one == scored
    assert run(*arguments, "--model", f"{plain}:other").json["rows"][1]["weight_bytes"] < 100
    run(*arguments, "--model", f"{plain}:absent").refused("has no 'absent'")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"runs": [{"name": "a", "scheme": "W4A4_OPV"}]},
            "run 'a': unknown scheme 'W4A4_OPV'. Did you mean 'W4A4_OVP'",
        ),
        ({"rnus": []}, "Did you mean 'runs'"),
        ({"samples": "20"}, "'samples' must be a whole number"),
        ({"runs": [{"name": "a", "scheme": "W8A8", "method": "olive"}]}, "run 'a': layer 1: method 'olive' writes"),
        ({"runs": [{"name": "a", "scheme": "W4A4_OVP", "options": {"policy": "papper"}}]}, "Did you mean 'paper'"),
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_errors_of_a_table(change: dict[str, Any], words: str, as_json: bool, run: Run, folder: Path) -> None:
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text()) | change
    recipe["model"] = f"{folder / 'net.py'}:build"
    (folder / "bad.yaml").write_text(yaml.safe_dump(recipe))
    run("table", folder / "bad.yaml", "--data", folder, *(["--json"] if as_json else [])).refused(words)


def test_a_recipe_that_is_not_there(run: Run, tmp_path: Path) -> None:
    run("table", "olive_sts2").refused("Did you mean 'olive_sst2'")
    run("table", tmp_path / "none.yaml").refused("none.yaml cannot be read")
    assert run("table").code == 2
