"""The scripts of the speed tables run, measure every variant, and say what was missing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *words: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("floats", [(), ("--floats",)])
def test_linear_layers(floats: tuple[str, ...]) -> None:
    found = json.loads(
        run("linear_cpu.py", "--json", "--repeat", "1", "--shapes", "2x256x128", "--in-a-row", "2", *floats)
    )
    taken = found["microseconds"]["2x256x128"]
    named = {"torch float32", "torch bfloat16"}
    named |= {"evenbits nf4, g64"} if floats else {"evenbits W8A8", "evenbits ovp4, g128", "torch._int_mm alone"}
    assert named <= set(taken)
    for figure, low, high in taken.values():
        assert 0 < low == figure <= high


def test_a_table_of_linear_layers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("linear_cpu")
    assert script.figures([4.0, 1.0, 3.0, 2.0], 1) == [2.0, 2.0, 4.0]  # 25th percentile
    assert script.figures([4.0, 1.0, 3.0, 2.0], 2)[0] == 1.0  # the least
    times = {"torch float32": [100.0, 100.0, 110.0], "evenbits W8A8": [20.0, 20.0, 21.0]}
    script.show({"10x1000x500": times}, {"gops": 1000.0, "gbytes": 30.0}, 1)
    printed = capsys.readouterr().out.splitlines()
    assert "| evenbits W8A8 | 5.0 (20) |" in printed
    assert printed[-1] == "W8A8 10x1000x500: 500 G operations/s (50%), 25.0 GB/s of weights"
    assert "quartiles apart: 10% in the middle, 10% at most" in printed


def test_torchs_own_products_are_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed computes x · Wᵀ, as far as its codes go."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    products: Any = importlib.import_module("linear_torch").products
    torch.manual_seed(0)
    x, weight = torch.randn(3, 256), torch.randn(64, 256)
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    exact = x @ weight.t()
    rows = x.abs().amax(1, keepdim=True) / 127
    for name, call in products(x, weight, codes, scale).items():
        y = call().float()
        assert y.shape == exact.shape
        if name == "torch._int_mm alone":
            y = y * rows * scale.t()
        if name == "oneDNN qlinear u8 alone":
            y = y * rows
        if "int4" not in name:  # its weights are random codes
            assert float((y - exact).norm() / exact.norm()) < 0.03, name


@pytest.mark.slow
def test_transformers(tmp_path: Path) -> None:
    """Float32 and one of ours, both tasks of BERT; a peer without its environment says so."""
    words = ("--model", "bert", "--rounds", "1", "--variant", "evenbits W8A8", "--variant", "OpenVINO NNCF")
    printed = run("transformers_cpu.py", *words, "--json", str(tmp_path / "found.json"))
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]["bert"]
    assert any(row["variant"] == "evenbits W8A8" and row["ms"] > 0 and row["decibels"] > 20 for row in rows)
    assert any(row["variant"] == "OpenVINO NNCF int8" and row["ms"] is None for row in rows)
    assert "no --peers" in printed
