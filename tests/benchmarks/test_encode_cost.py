"""What is needed beside a layer while it is encoded: less than 1.5 times its float bytes, for every shape of BERT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BOUND = 1.5


def _ratios(*arguments: str) -> dict[str, dict[str, float]]:
    command = [sys.executable, "benchmarks/encode_cost.py", "--memory", "--threads", "1", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["format"]: line["ratios"] for line in lines}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can only be reset on Linux")
def test_memory_of_the_smallest_shape() -> None:
    found = _ratios("--shapes", "768x768", "--formats", "ovp4:row", "ovp4:g16", "ovp4-mix:g32")
    assert len(found) == 3
    for name, ratios in found.items():
        assert 0.1 < ratios["768x768"] < BOUND, name


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can only be reset on Linux")
def test_memory_of_every_shape_and_format() -> None:
    found = _ratios("--shapes", "768x768", "3072x768", "768x3072")
    assert len(found) == 5
    for name, ratios in found.items():
        assert len(ratios) == 3
        assert max(ratios.values()) < BOUND, name
