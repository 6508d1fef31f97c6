"""The benchmark of number formats runs, and what docs/formats.md claims without reservation holds on small tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "formats_sqnr.py"
ROWS, COLUMNS = 16, 1024
FACTOR = 32 / (ROWS * COLUMNS)  # one float32 per tensor
BITS = {
    "int4:row:mse": 4 + 16 / COLUMNS,
    "ovp4:row": 4 + 16 / COLUMNS,
    "int4:g128": 4 + 16 / 128,
    "ovp4:g128": 4 + 16 / 128,
    "mxfp4": 4 + 8 / 32,
    "ovp4:g32": 4 + 8 / 32 + FACTOR,
    "ovp4-mix:g32": 4 + 9 / 32 + FACTOR,
    "nvfp4": 4 + 8 / 16 + FACTOR,
    "nvfp4:mse": 4 + 8 / 16 + FACTOR,
    "ovp4:g16": 4 + 8 / 16 + FACTOR,
}


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), "--smoke", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def sqnr(lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """family → format → dB."""
    found: dict[str, dict[str, float]] = {}
    for line in lines:
        if "sqnr_db" in line:
            found.setdefault(line["family"], {})[line["format"]] = line["sqnr_db"]
    return found


def test_it_says_where_it_ran(lines: list[dict[str, Any]]) -> None:
    assert {"processor", "cores", "torch", "evenbits", "seconds"} <= set(lines[0])


def test_true_bits_are_as_stated(lines: list[dict[str, Any]]) -> None:
    seen = set()
    for line in lines:
        if line.get("format") in BITS and "bits" in line:
            seen.add(line["format"])
            assert line["bits"] == pytest.approx(BITS[line["format"]], abs=1e-4), line
    assert seen == set(BITS)


def test_pairs_in_groups_of_32_beat_mxfp4_on_every_family(sqnr: dict[str, dict[str, float]]) -> None:
    assert len(sqnr) == 13
    for family, found in sqnr.items():
        assert found["ovp4:g32"] >= found["mxfp4"] + 1, family
        assert found["ovp4:g16"] > found["nvfp4"], family


def test_optimal_pairs_do_not_lose_to_the_released_choice(sqnr: dict[str, dict[str, float]]) -> None:
    for family, found in sqnr.items():
        assert found["ovp4:row"] >= found["ovp4:row:reference"] - 0.1, family


def test_repairing_helps_where_outlier_channels_touch_and_only_there(sqnr: dict[str, dict[str, float]]) -> None:
    assert sqnr["adjacent"]["ovp4:row+repair"] > sqnr["adjacent"]["ovp4:row"] + 4
    for family in ("gauss", "laplace", "product"):
        assert sqnr[family]["ovp4:row+repair"] == sqnr[family]["ovp4:row"]


def test_the_better_count_is_that_of_the_families(
    lines: list[dict[str, Any]], sqnr: dict[str, dict[str, float]]
) -> None:
    line = next(line for line in lines if line.get("against") == "nvfp4:mse" and line["format"] == "ovp4:g16")
    assert line["tensors"] == len(sqnr)
    assert line["better"] == sum(found["ovp4:g16"] > found["nvfp4:mse"] for found in sqnr.values())
