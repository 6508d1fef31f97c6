"""The benchmark of codecs runs, and what docs/codecs.md claims without reservation holds on small tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "rate_distortion.py"
SIZE = 1 << 14
BOUND = "entropy-coded uniform (bound)"


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), "--smoke", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def quality(lines: list[dict[str, Any]]) -> dict[tuple[int, str], dict[str, dict[str, Any]]]:
    """(rate, tensor) → method → its line."""
    found: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    for line in lines:
        if line.get("table") == "quality":
            found.setdefault((line["rate"], line["tensor"]), {})[line["method"]] = line
    return found


def test_it_says_where_it_ran(lines: list[dict[str, Any]]) -> None:
    assert {"processor", "cores", "torch", "evenbits", "seconds"} <= set(lines[0])


def test_multi_partition_codes_pay_for_the_part(lines: list[dict[str, Any]]) -> None:
    whole = [line for line in lines if line.get("table") == "claims" and line["kept"] == 1]
    assert len(whole) == 5
    for line in whole:
        width = line["bits"] + line["parts"].bit_length() - 1
        assert line["bits_true"] == pytest.approx(width + 64 * line["parts"] / SIZE, abs=1e-3)
        assert line["bits_claimed"] < line["bits_true"]


def test_indices_as_torch_has_them_cost_more_than_the_tensor(lines: list[dict[str, Any]]) -> None:
    half = [line for line in lines if line.get("table") == "claims" and line["kept"] == 0.5]
    assert half and all(line["bits_with_int64_indices"] > 32 > line["bits_true"] for line in half)


def test_nothing_beats_the_bound(quality: dict[tuple[int, str], dict[str, dict[str, Any]]]) -> None:
    """Of independent elements, where groups cannot use that magnitudes differ by place."""
    assert len(quality) == 9
    for (rate, tensor), methods in quality.items():
        for name, line in methods.items():
            if name != BOUND:
                room = 6.03 * (line["bits"] - rate)
                assert line["snr_db"] <= methods[BOUND]["snr_db"] + room + 0.3, (rate, tensor, name)


def test_the_sort_loses_to_both_of_its_cuts(quality: dict[tuple[int, str], dict[str, dict[str, Any]]]) -> None:
    for methods in quality.values():
        for cut in ("cube root", "least error"):
            assert methods[f"multi-partition, {cut}"]["snr_db"] > methods["multi-partition, sorted"]["snr_db"]


def test_zero_on_the_grid_removes_the_common_error(quality: dict[tuple[int, str], dict[str, dict[str, Any]]]) -> None:
    for methods in quality.values():
        assert methods["groups of 128"]["dc_ratio"] < 3


def test_every_table_is_printed() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke"], capture_output=True, text=True, timeout=300, check=False
    )
    titles = [line for line in done.stdout.splitlines() if line.startswith("### ")]
    assert len(titles) == 8
