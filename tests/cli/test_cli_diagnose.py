"""`evenbits diagnose` as people and scripts meet it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evenbits.cli import main

FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))

def norm():
    return nn.LayerNorm(16)

def stream():
    return (torch.randn(4, 16) for _ in range(3))
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evenbits", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capfd.readouterr()
        code = end.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), captured.out, captured.err

    return call


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(FACTORY)
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((40, 16)).astype(np.float32)
    np.savez(tmp_path / "xy.npz", inputs=inputs, labels=generator.integers(0, 3, 40))
    return str(tmp_path / "net.py")


def test_everything_at_once(run: Run, net: str, tmp_path: Path) -> None:
    data, out = tmp_path / "xy.npz", tmp_path / "out"
    code, printed, error = run(
        "diagnose", f"{net}:build", "-o", out, "--scheme", "W8A8_STATIC", "--alpha", "0.5", "--calibration", data,
        "--task", "classification", "--data", data, "--sizes", "5,10,40", "--orders", 2, "--layer", "3",
    )  # fmt: skip
    assert code == 0, error
    for expected in (
        "2 layers, worst first", "L1 isolated", "SQNR cumulative dB", "Model output: L1", "before → after smoothing",
        "unsmoothed", "exact McNemar", "Smoothed against unsmoothed", "change against 40 samples",
        "accuracy of the calibrated model", "static scale: ", "5 pictures", "layer1-3-surface.png",
    ):  # fmt: skip
        assert expected in printed, expected
    stored = json.loads((out / "diagnosis.json").read_text(encoding="utf-8"))
    assert [look["name"] for look in stored["looks"]] == ["3"] and stored["convergence"]["orders"] == 2


def test_bias_correction_is_part_of_what_is_diagnosed(run: Run, net: str, tmp_path: Path) -> None:
    """With four bits the mean error of an output is a part of its error that the bias takes off."""
    words = ("diagnose", f"{net}:build", "--scheme", "W4A8_OVP", "--calibration", tmp_path / "xy.npz", "--json")
    found = []
    for name, more in (("plain", ()), ("corrected", ("--bias-correction",))):
        code, printed, error = run(*words, "-o", tmp_path / name, *more)
        assert code == 0, error
        found.append(json.loads(printed)["errors"]["rows"])
    assert all(b["isolated_sqnr_db"] > a["isolated_sqnr_db"] for a, b in zip(*found, strict=True))


def test_json_is_one_object_and_the_smaller_run(run: Run, net: str, tmp_path: Path) -> None:
    arguments = ("diagnose", f"{net}:build", "-o", tmp_path / "out", "--calibration", f"{net}:stream", "--json")
    code, printed, error = run(*arguments)
    assert code == 0, error
    assert printed.count("\n") == 1
    found: dict[str, Any] = json.loads(printed)
    assert found["accuracy"] is None and found["convergence"] is None and found["calibration_batches"] == 3
    assert sorted(found["files"]) == sorted(path.name for path in (tmp_path / "out").iterdir())
    code, printed, error = run(*arguments)
    assert (code, printed) == (1, "") and "exists" in error


def test_sizes_ask_for_as_many_samples(run: Run, net: str, tmp_path: Path) -> None:
    arguments = ("--calibration", tmp_path / "xy.npz", "--sizes", "4,40", "--json")
    code, printed, _ = run("diagnose", f"{net}:build", "-o", tmp_path / "out", *arguments)
    assert code == 0 and "40 inputs" in json.loads(printed)["calibration"]
    code, _, error = run("diagnose", f"{net}:build", "-o", tmp_path / "two", *arguments, "--samples", 30)
    assert code == 1 and "30 samples and the sizes go to 40" in error


@pytest.mark.parametrize(
    ("model", "arguments", "match"),
    [
        ("build", ["--layer", "4"], "no layer '4'; the nearest names: 3"),
        ("build", ["--task", "classification"], "both a task and the data"),
        ("build", ["--sizes", "a,b"], "whole numbers with commas"),
        ("build", ["--sizes", "5"], "at least two"),
        ("build", ["--sizes", "5,500"], "40 samples and the sizes go to 500"),
        ("build", ["--scheme", "W8A9"], "Did you mean 'W8A8'"),
        ("build", ["--method", "rtn", "--alpha", "0.5"], "alpha"),
        ("norm", [], "no layer that can be quantized"),
    ],
)
def test_what_is_refused_writes_nothing(
    model: str, arguments: list[str], match: str, run: Run, net: str, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    given = ["diagnose", f"{net}:{model}", "-o", tmp_path / "out", "--calibration", tmp_path / "xy.npz", *arguments]
    code, printed, error = run(*given)
    assert code == 1 and printed == "" and error.splitlines()[-1].startswith("evenbits: ") and match in error
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before
