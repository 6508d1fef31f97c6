"""The commands behind the committed figures, run for real (minutes): the gates on accuracy and bytes stand here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*words: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_training_tool_runs() -> None:
    assert "perplexity" in run("tools/train_demo_model.py", "--smoke").lower()


@pytest.mark.slow
@pytest.mark.data
def test_int8_accuracy(test_data: Path) -> None:
    lines = [json.loads(x) for x in run("benchmarks/accuracy_int8.py", "--data", str(test_data), "--json").splitlines()]
    rows: dict[tuple[str, str, str], dict[str, Any]] = {(r["model"], r["scheme"], r["method"]): r for r in lines[1:]}
    for method in ("rtn", "smoothquant"):
        sst2, stories = rows["MiniLM SST-2", "W8A8", method], rows["stories260k", "W8A8", method]
        assert abs(sst2["accuracy"] - rows["MiniLM SST-2", "float", ""]["accuracy"]) <= 0.005
        assert sst2["weight_ratio"] <= 0.26
        assert stories["perplexity"] <= 1.01 * rows["stories260k", "float", ""]["perplexity"]


@pytest.mark.slow
@pytest.mark.data
def test_pairs_keep_what_int4_loses(test_data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "three.yaml"
    recipe.write_text(
        "{title: SST-2 W4A4, model: minilm_glue/sst2, task: classification, evaluation: sst2/dev.tsv, "
        "calibration: sst2/train.tsv, runs: [{name: int4, scheme: W4A4}, "
        "{name: released, scheme: W4A4_OVP_REFERENCE, options: {weighted: false}}, {name: ours, scheme: W4A4_OVP}]}"
    )
    made = json.loads(run("-m", "evenbits", "table", str(recipe), "--data", str(test_data), "--json"))
    accuracy = {row["name"]: row["metric"] for row in made["rows"]}
    assert accuracy["int4"] < 0.97 * accuracy["float"]
    assert accuracy["released"] >= 0.97 * accuracy["float"]
    assert accuracy["ours"] >= 0.97 * accuracy["float"]


@pytest.mark.slow
def test_encoding_stays_small_beside_the_layer() -> None:
    lines = [json.loads(line) for line in run("benchmarks/encode_cost.py", "--memory").splitlines()]
    assert [line["format"] for line in lines][:3] == ["ovp4:row", "ovp4:g128", "ovp4:g32"]
    for line in lines:
        assert len(line["ratios"]) == 4
        assert line["extra_memory_ratio"] < 1.5, line


@pytest.mark.slow
@pytest.mark.data
def test_the_advised_mix_is_no_worse_than_any_format_everywhere(test_data: Path) -> None:
    words = ("benchmarks/advised_formats.py", "--data", str(test_data), "--case", "stories-w4a16", "--json")
    mix, *singles = json.loads(run(*words).splitlines()[1])["rows"][1:]
    assert mix["name"] == "advised" and len(singles) == 6
    for single in singles:
        assert mix["mean_error"] <= 1.02 * single["mean_error"]  # ties within 0.1 dB may go to another format
        assert mix["float"]["mean"] <= single["float"]["mean"] + 2 * single["mix"]["error"]
