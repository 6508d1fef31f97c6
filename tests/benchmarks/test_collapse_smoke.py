"""The quantizers, statistics and smallest runs of benchmarks/collapse.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "collapse.py"
sys.path.insert(0, str(SCRIPT.parent))

import collapse  # noqa: E402
import collapse_quantizers as q  # noqa: E402
import collapse_report as r  # noqa: E402


def tails(seed: int, n: int = 5000) -> torch.Tensor:
    """Half zeros, the rest heavy-tailed and off centre, as the gradient behind a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator).pow(3) * 1e-4
    return torch.where(torch.rand(n, generator=generator) < 0.5, torch.zeros(()), x)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_formulas_above_eight_bits_are_the_codecs_below(bits: int) -> None:
    x = tails(0)
    step = float((x.max() - x.min()) / (2**bits - 1))
    for method, formula in (("minmax", q.minmax), ("zero", q.zero), ("grouped", q.grouped)):
        coded = q.quantizer(method, bits)(x)
        # Metadata of the codecs is rounded, so a few elements may fall on the neighbouring point.
        share = float(((coded - formula(x, bits)).abs() > 0.05 * step).double().mean())
        assert share < (0.02 if method != "grouped" else 0.05), (method, share)
    inside, parts = q.PARTS[bits]
    assert float((q.quantizer("multi", bits)(x) - q.multi(x, inside, parts)).abs().max()) < 0.05 * step


@pytest.mark.parametrize("bits", [10, 11, 12])
def test_codecs_above_eight_bits_follow_the_formulas(bits: int) -> None:
    x = tails(5)
    step = float((x.max() - x.min()) / (2**bits - 1))
    for spec, formula in ((f"uint{bits}:tensor:affine:free", q.minmax), (f"uint{bits}:tensor:affine", q.zero)):
        apart = (q.coded(spec)(x) - formula(x, bits)).abs()
        assert float(apart.max()) < 1.3 * step and float((apart > 0.3 * step).double().mean()) < 0.1, spec


def test_one_direction_and_sets_of_parts_have_names_and_tables_of_their_own() -> None:
    settings = list(collapse.plan(2, size=32))
    assert len({setting.name for setting in settings}) == len(settings)
    one_way = [s for s in settings if s.direction != "both"]
    assert {s.direction for s in one_way} == {"forward", "backward"} and {s.bits for s in one_way} == {4}
    stem = {"snr_db": 1.0, "dc_ratio": 2.0, "dc_ratio_max": 3.0}
    runs = [
        {
            "method": m,
            "bits": 8,
            "seed": 0,
            "direction": d,
            "loss": 1.0,
            "accuracy": 0.5,
            "bias_norm": [1, 2],
            "stem": stem,
        }
        for m, d in (("multi8x16", "both"), ("multi8x2", "both"), ("minmax", "both"), ("minmax", "forward"))
    ]
    runs = [{**run, "size": 32, "steps": 2} for run in runs]
    first, _, _, ways, sets = r.report(runs).split("\n\n")
    assert "only" not in first and "multi8x" not in first
    assert "| 8 | minmax, forward only |" in ways and sets.index("multi8x2 ") < sets.index("multi8x16 ")
    assert collapse.read_lines(r.jsonl(runs)) == runs


def test_some_of_the_runs_in_the_order_of_their_patterns() -> None:
    settings = list(collapse.plan(2))
    assert collapse.chosen(settings, None) == settings
    found = collapse.chosen(settings, ["zero-4-seed1-*", "none-*", "*-seed1-48px*"])
    assert [setting.name for setting in found[:3]] == [
        "zero-4-seed1-48px-200steps", "none-32-seed0-48px-200steps", "none-32-seed1-48px-200steps",
    ]  # fmt: skip
    assert len(set(found)) == len(found) and all(setting.seed == 1 for setting in found[3:])
    with pytest.raises(SystemExit, match=r"nothing\*: no run is called so; none-32-seed0-48px-200steps is one"):
        collapse.chosen(settings, ["nothing*"])


def test_a_cut_quantizes_the_asked_direction_only() -> None:
    x = torch.randn(2, 3, 8, 8)
    for direction, changed in (("both", (True, True)), ("forward", (True, False)), ("backward", (False, True))):
        stem, _ = collapse.cuts(collapse.Setting("minmax", 4, 0, direction=direction))
        assert (not stem.there(x).equal(x), not stem.back(x).equal(x)) == changed


def test_parts_cost_what_the_table_says() -> None:
    assert all(inside + parts.bit_length() - 1 == bits for bits, (inside, parts) in q.PARTS.items())


@pytest.mark.parametrize("bits", [4, 6, 8, 10, 11, 12, 16])
def test_zero_is_on_one_grid_and_not_on_the_other(bits: int) -> None:
    x = tails(1)
    empty = x == 0
    assert bool((q.quantizer("zero", bits)(x)[empty] == 0).all())
    off = q.quantizer("minmax", bits)(x)[empty]
    assert off.unique().numel() == 1 and float(off[0]) != 0


@pytest.mark.parametrize("bits", [4, 8, 11])
def test_an_intervention_changes_the_mean_error_and_nothing_else(bits: int) -> None:
    x = tails(2, 6000).double().view(5, 12, 10, 10)
    error = {m: q.quantizer(m, bits)(x) - x for m in ("minmax", "zero", *q.INTERVENTIONS)}
    assert abs(float(error["minmax-centred"].mean())) < 1e-6 * abs(float(error["minmax"].mean()))
    change = error["minmax-centred"] - error["minmax"]
    torch.testing.assert_close(change, change.mean().expand_as(change))
    change = error["minmax-channels"] - error["minmax"]
    torch.testing.assert_close(change, change[:1, :, :1, :1].expand_as(change))
    assert float(error["minmax-channels"].mean(dim=(0, 2, 3)).abs().max()) < 1e-6 * float(error["minmax"].abs().max())
    change = error["zero-shifted"] - error["zero"]
    torch.testing.assert_close(change, error["minmax"].mean().expand_as(change), rtol=1e-4, atol=1e-12)


@given(st.lists(st.integers(0, 6), min_size=3, max_size=30), st.integers(0, 1000))
def test_spearman_is_pearson_of_mean_ranks(values: list[int], seed: int) -> None:
    other = torch.randint(5, (len(values),), generator=torch.Generator().manual_seed(seed)).tolist()

    def mean_ranks(v: list[int]) -> list[float]:
        return [sum(w < x for w in v) + (sum(w == x for w in v) + 1) / 2 for x in v]

    assert r.ranks(values) == mean_ranks(values)
    found = r.spearman(values, other)
    if len(set(values)) < 2 or len(set(other)) < 2:
        assert found is None
    else:
        both = torch.tensor([mean_ranks(values), mean_ranks(other)], dtype=torch.double)
        assert found == pytest.approx(float(torch.corrcoef(both)[0, 1]), abs=1e-9)


@pytest.mark.data
def test_the_smallest_runs(test_data: Path, tmp_path: Path) -> None:
    """Two runs of 20 steps; made once, and read by the report."""
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]

    def call(*more: str) -> str:
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert len(call("--data", str(test_data), "--smoke").splitlines()) == 2
    assert call("--data", str(test_data), "--smoke") == ""
    runs: dict[str, dict[str, Any]] = {
        run["method"]: run for run in (json.loads(f.read_text()) for f in tmp_path.glob("*.json"))
    }
    assert all(run["finished"] and len(run["curve"]) == 20 for run in runs.values())
    assert runs["minmax"]["stem"]["dc_ratio"] > 10 * runs["zero"]["stem"]["dc_ratio"]
    assert abs(runs["minmax"]["curve"][0] - runs["zero"]["curve"][0]) < 0.1  # one start, one batch
    assert "| 8 | minmax |" in call("--table")
