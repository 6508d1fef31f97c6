"""The GPU table's script, where there is no GPU: it says so. What it counts and prints needs none."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    command = [sys.executable, str(BENCHMARKS / "linear_gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "linear_gpu.py needs an NVIDIA GPU and a torch built for it; this machine has none."
    ]


def test_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("linear_gpu")
    ceilings = {"bytes a second": 1e12, "bfloat16 a second": 1e15, "int8 a second": 2e15}
    times = {"torch bfloat16": {"us": 100.0, "bytes": 90e6}, "W8A8": {"us": 50.0, "bytes": 45e6}}
    found = {"gpu": "a GPU", "ceilings": ceilings, "microseconds": {"1x4096x11008": times}}
    lines = script.table(found).splitlines()
    assert lines[0].startswith("a GPU; 1e+12 bytes a second")
    assert lines[-2:] == ["| torch bfloat16 | 1.00 (100.0; 90%, 0%) |", "| W8A8 | 2.00 (50.0; 90%, 0%) |"]
