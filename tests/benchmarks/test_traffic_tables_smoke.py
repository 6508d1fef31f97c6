"""The commands behind the tables of replicas and of sentences, a few steps of each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def call(script: str, *words: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.data
def test_replicas_send_fewer_bytes_and_learn_the_same_thing(test_data: Path) -> None:
    words = ["--data", str(test_data), "--local", "--worlds", "2", "--steps", "6", "--seeds", "1", "--json"]
    rows = {row["setting"]: row for row in map(json.loads, call("ddp_traffic.py", *words).splitlines()[1:])}
    assert list(rows) == ["none", "fp16", "PowerSGD", "int8+EF", "int4+EF", "int4"]
    assert 1.8 < rows["int8+EF"]["reported"] / rows["int4+EF"]["reported"] < 2.05
    assert all(row["seconds"] > 0 for row in rows.values())
    assert all(abs(row["loss"] - rows["none"]["loss"]) < 0.1 for row in rows.values())


@pytest.mark.slow
@pytest.mark.data
def test_sentences_are_learnt_behind_coded_cuts(test_data: Path, tmp_path: Path) -> None:
    words = ["--data", str(test_data), "--out", str(tmp_path), "--smoke"]
    assert len(call("glue_traffic.py", *words).splitlines()) == 2
    assert call("glue_traffic.py", *words) == ""  # what exists is not made again
    table = call("glue_traffic.py", "--out", str(tmp_path), "--report")
    assert "| none |" in table and "| quant 4 |" in table


def test_what_the_tables_need_is_said(tmp_path: Path) -> None:
    for script, words in (("ddp_traffic.py", ["--local"]), ("glue_traffic.py", ["--out", str(tmp_path)])):
        command = [sys.executable, str(BENCHMARKS / script), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2 and "--data names the folder" in done.stderr
