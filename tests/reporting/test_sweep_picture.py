"""The picture and the table of a sweep: what they say, in percent, in perplexity, and where no error is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from evenbits.errors import EvenbitsError
from evenbits.pipeline.points import make_points, parse_alphas
from evenbits.pipeline.sweep_result import Sweep, summarise
from evenbits.reporting.sweep import check_plot, plot, search_verdict, sweep_figure, sweep_table, verdict


def accuracy(share: float) -> dict[str, Any]:
    right = round(200 * share)
    return {"metrics": {"accuracy": right / 200}, "n": 200, "interval": [share - 0.03, share + 0.03],
            "items": [1] * right + [0] * (200 - right), "notes": []}  # fmt: skip


def perplexity(value: float, documents: int = 4) -> dict[str, Any]:
    metric = value if math.isfinite(value) else None
    nats = 10 * math.log(value) if math.isfinite(value) else 1e6
    interval = [0.9 * value, 1.1 * value] if documents > 1 and metric else None
    items = [[nats * (1 + 0.01 * i), 10] for i in range(documents)]
    return {"metrics": {"perplexity": metric}, "n": documents, "interval": interval, "items": items, "notes": []}


def made(scores: dict[str, dict[str, Any]], alphas: str = "0.2,0.5,0.8") -> Sweep:
    points = make_points(parse_alphas(alphas), "smoothquant", {}, auto=True)
    found = {
        p.name: {"name": p.name, "alpha": p.alpha, "method": p.method, "seconds": {"quantize": 1.0, "evaluate": 2.0},
                 "evaluation": scores[p.name], "regions": {"folded": 2}, "region_alphas": {}, "notes": [],
                 "mean_output_sqnr_db": 30.0, "weight_bytes": 5}
        for p in points
    }  # fmt: skip
    scheme = {"weights": "int8:row", "input_activations": "int8:tensor", "dynamic": False}
    return summarise(
        points, found, model="nets.py:net", task="t", scheme=scheme, method="smoothquant", options={},
        calibration="c", key="k" * 64,
    )  # fmt: skip


NAMES = ("float", "none", "auto", "0.2", "0.5", "0.8")


def test_accuracy_is_in_percent_with_bands_lines_and_marks() -> None:
    sweep = made({n: accuracy(v) for n, v in zip(NAMES, (0.9, 0.5, 0.85, 0.6, 0.8, 0.7), strict=True)})
    figure = sweep_figure(sweep)
    upper, lower = figure.panels
    assert upper.y == pytest.approx((60, 80, 70)) and upper.x == (0.2, 0.5, 0.8)
    assert upper.low == pytest.approx((57, 77, 67)) and upper.high == pytest.approx((63, 83, 73))
    assert dict(upper.lines) == {"float: 90.00 %": 90, "no smoothing: 50.00 %": 50, "α = auto: 85.00 %": 85}
    assert [(m[0], m[3]) for m in upper.marks] == [(0.5, True), (0.2, False)]
    assert lower.y == pytest.approx((10, 30, 20)) and dict(lower.lines)["no smoothing"] == 0
    error = 100 * math.sqrt(40 - 40**2 / 200) / 200
    assert (
        verdict(sweep)
        == f"Best α 0.5 minus worst 0.2: +20.00 ± {error:.2f} points, more than two paired standard errors."
    )
    assert "n = 200 inputs" in figure.caption[0]


def test_equal_scores_are_not_told_apart() -> None:
    sweep = made({name: accuracy(0.7) for name in NAMES})
    assert sweep.spread is not None and not sweep.spread.separated and sweep.spread.best == "0.5"
    assert verdict(sweep) == "All 3 α score the same."
    assert sweep_figure(sweep).panels[0].marks == ()


def test_auto_stands_beside_the_best_alpha_and_one_picked_on_the_other_half() -> None:
    scores = {n: accuracy(v) for n, v in zip(NAMES, (0.9, 0.5, 0.79, 0.6, 0.8, 0.7), strict=True)}
    first, second = search_verdict(made(scores))
    error = 100 * math.sqrt(2 - 2**2 / 200) / 200
    assert first == f"α = auto minus the best α (0.5, of 3, picked on these samples): −1.00 ± {error:.2f} points."
    assert second == f"α = auto minus the α picked on the other half (0.5): −1.00 ± {error:.2f} points."
    assert sweep_figure(made(scores)).caption[2:] == (first, second)
    (only,) = search_verdict(made(scores, "0.5"))
    assert "(0.5, the only one)" in only


def test_a_wide_perplexity_gets_a_logarithmic_axis_and_an_infinite_one_no_point(tmp_path: Path) -> None:
    values = (8.0, 300.0, 9.0, 50.0, 10.0, math.inf)
    sweep = made({n: perplexity(v) for n, v in zip(NAMES, values, strict=True)})
    upper, _ = sweep_figure(sweep).panels
    assert upper.logarithmic and math.isnan(upper.y[2]) and upper.y[:2] == (50, 10)
    assert sweep.spread is not None and (sweep.spread.best, sweep.spread.worst) == ("0.5", "0.8")
    for name in ("a.svg", "a.png"):
        plot(sweep, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    assert verdict(sweep) == "Best α 0.5; at the worst, 0.8, the perplexity is infinite."
    assert "inf" not in (tmp_path / "a.svg").read_text().replace("infinite", "")
    assert sweep.to_json()["rows"][5]["metric"] is None


def test_one_document_has_no_band_and_says_so() -> None:
    sweep = made({n: perplexity(v, 1) for n, v in zip(NAMES, (8.0, 9.5, 9.0, 9.2, 9.0, 9.1), strict=True)})
    upper, lower = sweep_figure(sweep).panels
    assert upper.low is None and lower.low is None and not upper.logarithmic
    assert "No intervals" in sweep_figure(sweep).caption[0] and "no error known" in verdict(sweep)


def test_the_table_has_a_row_for_every_point() -> None:
    assert sweep_table(made({name: accuracy(0.7) for name in NAMES})).row_count == 6


def test_a_suffix_that_cannot_be_drawn() -> None:
    with pytest.raises(EvenbitsError, match=r"\.svg or \.png"):
        check_plot(Path("a.pdf"))
