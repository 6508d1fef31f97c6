"""The traffic benchmark: its bytes are those the kernel counts, and its model's times are near the measured ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import links  # noqa: E402


def rows(*options: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "benchmarks/pipeline_traffic.py", "--json", "--layers", "0", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    machine, *found = (json.loads(line) for line in done.stdout.splitlines())
    assert "processor" in machine
    return found


@pytest.mark.slow
def test_paced_sends_on_loopback(tmp_path: Path) -> None:
    """Anywhere: no namespaces, nothing counted by the kernel; a second run measures nothing again."""
    small = ["--width", "64", "--batch", "16", "--steps", "2", "--repeats", "3", "--schedules", "1F1B"]
    small += ["--stages", "2", "--codecs", "stock,raw,int4:g64", "--results", str(tmp_path / "cells.jsonl")]
    small += ["--local", "--rates", "50e6", "--port", "29431"]
    made = rows(*small)
    found = {r["codec"]: r for r in made if r["microbatches"] == 8}
    assert all(r["contents"] is None and r["predicted"] > 0 for r in found.values())
    assert found["raw"]["loss"] == found["stock"]["loss"]
    assert found["int4:g64"]["reported"] < found["stock"]["reported"] / 7
    assert found["int4:g64"]["best"] < found["stock"]["best"]
    assert found["int4:g64"]["verdict"] == "pays" and {r["microbatches"] for r in made} == {1, 4, 8}
    assert rows(*small) == made


@pytest.mark.slow
@pytest.mark.skipif(bool(links.available()), reason=links.available() or "namespaces work")
def test_a_row_of_throttled_links_between_namespaces() -> None:
    small = ["--width", "128", "--length", "64", "--steps", "2", "--repeats", "5", "--stages", "3"]
    found = rows(*small, "--rates", "20e6", "--codecs", "stock,raw,int8:g128|1")
    by = {(r["schedule"], r["codec"], r["microbatches"]): r for r in found}
    for r in found:
        assert 1.0 <= r["contents"] < 1.03, r
        assert r["reported"] < r["interface"] < 1.06 * r["reported"], "with headers and acknowledgements"
    stock = by["GPipe", "stock", 8]
    assert by["GPipe", "raw", 8]["loss"] == stock["loss"]
    assert by["GPipe", "int8:g128|1", 8]["best"] < stock["best"] / 2
    # The link is most of the stock step, so the model must come near it on any machine.
    assert 0.7 < stock["predicted"] / stock["best"] < 1.2


@pytest.mark.slow
def test_break_even_and_scale() -> None:
    command = [sys.executable, "benchmarks/pipeline_scale.py", "--json", "--rows", "256", "--stages", "2,64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    _, *found = (json.loads(line) for line in done.stdout.splitlines())
    costs = {r["codec"]: r for r in found if "bits" in r}
    steps = {(r["codec"], r["stages"], r["rate"]): r["seconds"] for r in found if "stages" in r}
    assert costs["raw"]["break_even_mbit"] == 0 < costs["int8:g128"]["break_even_mbit"]
    for stages in (2, 64):
        assert steps["int4:g128", stages, 20e6] < steps["raw", stages, 20e6]
        assert steps["raw", stages, 1e9] < steps["raw", stages, 20e6]
