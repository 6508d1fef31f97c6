"""`advise` as people and scripts meet it, and `quantize` on what it wrote."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evenbits.cli import main
from evenbits.schemes.scheme import resolve

FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 48), nn.Linear(48, 3))
    with torch.no_grad():
        model[1].weight.normal_()
        model[3].weight[torch.rand_like(model[3].weight) < 0.02] *= 30
    return model
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
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """The words that name a tiny model and its calibration data."""
    (tmp_path / "net.py").write_text(FACTORY)
    inputs = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    np.savez(tmp_path / "x.npz", inputs=inputs)
    monkeypatch.chdir(tmp_path)
    return ("net.py:build", "--calibration", "x.npz")


def test_the_tables_say_what_was_measured_chosen_and_why(run: Run, model: tuple[object, ...], tmp_path: Path) -> None:
    done = run("advise", *model, "-o", "mix.yaml")
    assert done.code == 0, done.err
    for words in (
        "Output error, SQNR in dB", "Advised", "kept in float", "One format everywhere, and the advised mix",
        "nf4:g32:mse", "ovp4:g32", "% of pairs hold an outlier", "dB better than", "nothing fits the budget",
        "evenbits quantize net.py:build --scheme mix.yaml --method by_format",
    ):  # fmt: skip
        assert words in done.out, words
    assert "Measuring on 64 inputs of x.npz." in done.err
    text = (tmp_path / "mix.yaml").read_text(encoding="utf-8")
    assert text.startswith("# evenbits advise net.py:build: at most 4.25 true bits per weight, measured on 64 inputs")
    assert not text.isspace() and "overrides:" in text


def test_the_scheme_that_was_written_is_quantized_as_advised(run: Run, model: tuple[object, ...]) -> None:
    advised = run("advise", *model, "-o", "mix.yaml", "--json").json
    assert resolve("mix.yaml") == resolve(advised["scheme"]) and advised["output"] == "mix.yaml"
    chosen = {layer["name"]: layer["chosen"] for layer in advised["layers"] if layer["chosen"]}
    assert (chosen["1"]["candidate"], chosen["3"]["candidate"]) == ("nf4:g*:mse", "ovp4:g*")
    made = run("quantize", *model, "--scheme", "mix.yaml", "-o", "out", "--json").json
    assert made["method"] == "by_format"  # without being named: the formats ask for it
    quantized = {row["name"]: row for row in made["layers"] if row["status"] == "quantized"}
    assert {name: row["format"] for name, row in quantized.items()} == {n: c["encoded"] for n, c in chosen.items()}
    shown = run("inspect", "out", "--json").json
    assert {layer["name"]: layer["format"] for layer in shown["layers"]} == {n: c["encoded"] for n, c in chosen.items()}


def test_candidates_bits_inputs_and_margin_are_the_users(run: Run, model: tuple[object, ...]) -> None:
    words = ("--bits", "4.5", "--activations", "int8:row", "--candidate", "int4:row:mse", "--candidate", "nf4:g*")
    advised = run("advise", *model, *words, "--margin", "30", "--ignore", "4", "--json").json
    assert advised["candidates"] == ["int4:row:mse", "nf4:g*"] and advised["bits"] == 4.5
    assert advised["scheme"]["input_activations"] == "int8:row" and advised["output"] is None
    layers = {layer["name"]: layer for layer in advised["layers"] if layer["kind"] == "Linear"}
    assert layers["4"]["reason"] == "ignored by the scheme"
    assert {layers[name]["chosen"]["integer"] for name in ("1", "3")} == {"product"}


def test_without_a_file_nothing_is_written(run: Run, model: tuple[object, ...], tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    done = run("advise", *model)
    assert "write it with -o" in done.out
    assert [name for name in sorted(p.name for p in tmp_path.iterdir()) if name != "__pycache__"] == before


def test_a_file_that_is_there_is_kept(run: Run, model: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text("mine")
    run("advise", *model, "-o", "mix.yaml").refused("mix.yaml exists; name another file or pass --overwrite")
    assert (tmp_path / "mix.yaml").read_text() == "mine"
    assert run("advise", *model, "-o", "mix.yaml", "--overwrite").code == 0
    assert resolve("mix.yaml").overrides


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("-o", "mix.txt"), "a scheme file ends in .yaml"),
        (("-o", "nowhere/mix.yaml"), "the folder nowhere does not exist"),
        (("--candidate", "ovp5:g*"), "ovp5"),
        (("--bits", "3"), "no layer would get a format at 3 true bits"),
        (("--bits", "nan"), "bits must be a number above 0"),
        (("--activations", "int9:row"), "int9"),
        (("--margin", "-1"), "margin_db must be a number of 0 or more"),
        (("--dtype", "int8"), "dtype"),
    ],
)
def test_mistakes_are_one_line(run: Run, model: tuple[object, ...], words: tuple[str, ...], match: str) -> None:
    run("advise", *model, *words).refused(match)


def test_a_model_without_a_tokenizer_needs_data(run: Run, model: tuple[object, ...]) -> None:
    run("advise", model[0]).refused("needs a tokenizer")
