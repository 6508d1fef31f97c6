"""The benchmarks behind docs/smoothing.md and docs/calibration-size.md, at their smallest."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import alpha_sweeps  # noqa: E402
import calibration_size  # noqa: E402
import planted_convs  # noqa: E402
import smoothing_cost  # noqa: E402
import vision  # noqa: E402


def call(module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.main()
    return capsys.readouterr().out


TINY = """
import torch
from torch import nn
def resnet20_planted():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def test_a_sweep_is_a_line_a_file_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a small model in the place of ResNet-20."""
    (tmp_path / "vision.py").write_text(TINY, encoding="utf-8")
    monkeypatch.setattr(alpha_sweeps, "__file__", str(tmp_path / "alpha_sweeps.py"))
    generator = np.random.default_rng(0)
    for part, count in (("calibration", 10), ("evaluation", 40), ("confirmation", 30)):
        x, y = generator.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8), generator.integers(0, 4, count)
        np.savez(tmp_path / f"cifar10-{part}.npz", inputs=x, labels=y)
    words = (tmp_path, "--model", "resnet20", "--setting", "planted")
    out = call(alpha_sweeps, monkeypatch, capsys, *words, "--alpha", "0.1,0.8")
    heads, _, row = (line.split(" | ") for line in out.splitlines() if "|" in line)
    assert len(row) == len(heads) == 12 and row[2] == "40"
    assert row[-1].count("±") == row[-2].count("±") == 1
    kept = json.loads((tmp_path / "sweeps" / "resnet20-planted.json").read_text(encoding="utf-8"))
    assert kept["model"] == "vision.py:resnet20_planted" and kept["search"]["best"] in ("0.1", "0.8")
    assert str(tmp_path) not in json.dumps(kept)
    picture = (tmp_path / "sweeps" / "resnet20-planted.svg").read_text(encoding="utf-8")
    assert "minus the best α" in picture and "picked on the other half" in picture
    out = call(alpha_sweeps, monkeypatch, capsys, *words, "--confirm", "--no-auto")
    assert "| resnet20 | planted | 30 |" in out and out.splitlines()[-1].endswith("|  |  |")


def test_what_cannot_be_confirmed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (("--confirm", "no further ImageNet"), ("--model resnet20 --confirm", "run this sweep first")):
        with pytest.raises(SystemExit) as end:
            call(alpha_sweeps, monkeypatch, capsys, tmp_path, *words.split())
        assert said in str(end.value.code) + capsys.readouterr().err


def test_planted_outliers_and_the_search_at_the_smallest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(call(planted_convs, monkeypatch, capsys, "--small", "--json"))
    (row,), (search,) = found["planted"], found["search"]
    assert row["none"][0] < 12 and row["auto"][0] > 33 and row["auto"][0] >= row["0.5"][0]
    assert search["by input channel"] >= 0.95 and 0.4 <= search["ours"] <= 0.7
    assert search["by input channel costs"] > 2 > search["ours costs"]


def test_the_cost_of_smoothing_is_measured_for_auto_too() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()

    found = smoothing_cost.measure(make, list(torch.randn(16, 4, 16)))
    assert set(found) == {
        "forward",
        "rtn",
        "fixed",
        "auto",
        *(f"bytes_{a}_{n}" for a in (0.5, "auto") for n in (4, 16)),
    }
    assert found["auto"] > found["fixed"] > 0 and found["bytes_auto_16"] > found["bytes_0.5_16"] > 0
    assert found["bytes_auto_16"] < 1.5 * found["bytes_auto_4"]


@pytest.mark.data
def test_pictures_to_calibrate_on_and_to_score(test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "_pixels", lambda jpeg: np.full((32, 32, 3), len(jpeg) % 256, dtype=np.uint8))
    pictures, scored, texts = (
        calibration_size.calibration(),
        calibration_size.scored(),
        calibration_size.stories().texts,
    )
    assert sum(map(len, pictures)) == 1500 and pictures[0].shape == (10, 3, 32, 32) and pictures[0].max() <= 1
    assert sum(len(y) for _, y in scored) == 2000 and len(texts) == 20 and all(texts)
    counts = torch.bincount(torch.cat([y for _, y in scored]))
    assert counts.tolist() == [200] * 10
