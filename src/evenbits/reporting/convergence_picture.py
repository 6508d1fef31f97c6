"""The picture of calibration sizes: do the statistics settle, and does the calibrated model?"""

from __future__ import annotations

from statistics import mean
from typing import Any

from evenbits.pipeline.convergence import SETTLED, STATISTICS, Convergence
from evenbits.reporting.pictures import AFTER, BEFORE, MUTED, figure, plain_log, shown

_COLOURS = ("#2563a8", "#c2410c", "#15803d", "#7c3aed")


def convergence_picture(found: Convergence, title: str) -> Any:
    """One panel for each statistic (change against the largest size), one for the change per doubling, one for the
    metric."""
    made = figure(11.5, 6.4)
    panels = made.subplots(2, 3).flatten()
    made.suptitle(shown(title, 130), x=0.01, ha="left", fontsize=10, fontweight="bold")
    for axes in panels[:5]:
        axes.set_yscale("log")
    for axes, statistic in zip(panels, STATISTICS, strict=False):
        _against_largest(axes, found, statistic)
    _per_doubling(panels[4], found)
    _metric(panels[5], found)
    low = min((axes.get_ylim()[0] for axes in panels[:5]), default=0.001)
    high = max((axes.get_ylim()[1] for axes in panels[:5]), default=1.0)
    for axes in panels[:5]:
        axes.set_ylim(low, high)  # one scale, so that the statistics can be compared
        plain_log(axes.yaxis, percent=True)
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(found.sizes, [str(size) for size in found.sizes], rotation=45)
        axes.set_xticks([], minor=True)
        axes.set_xlim(found.sizes[0] / 1.2, found.sizes[-1] * 1.2)
    for axes in panels[3:]:
        axes.set_xlabel("calibration samples")
    return made


def _against_largest(axes: Any, found: Convergence, statistic: str) -> None:
    sizes = found.sizes[:-1]
    rows = {(row.order, row.size): row for row in found.changes if row.statistic == statistic}
    styles = (("max", "worst layer", BEFORE, "o"), ("median", "median layer", AFTER, "s"))
    for field, label, colour, marker in styles:
        lines = [[getattr(rows[o, n], field) if (o, n) in rows else 0.0 for n in sizes] for o in range(found.orders)]
        for line in lines:
            axes.plot(sizes, [value or float("nan") for value in line], color=colour, linewidth=0.6, alpha=0.5)
        middle = [mean(column) or float("nan") for column in zip(*lines, strict=True)]
        axes.plot(sizes, middle, marker=marker, markersize=4, color=colour, linewidth=1.6, label=label)
        axes.axhline(SETTLED[field], color=colour, linestyle=":", linewidth=1)
    axes.set_title(f"{statistic}: change against {found.sizes[-1]:,}")
    axes.legend(loc="lower left", fontsize=7)


def _per_doubling(axes: Any, found: Convergence) -> None:
    for colour, statistic in zip(_COLOURS, STATISTICS, strict=True):
        points = []
        for size in found.sizes[1:]:
            rows = [row for row in found.changes if row.statistic == statistic and row.size == size]
            steps = [row.doubling_median for row in rows if row.doubling_median is not None]
            points.append(mean(steps) or float("nan") if steps else float("nan"))
        axes.plot(found.sizes[1:], points, marker="o", markersize=3.5, color=colour, linewidth=1.3, label=statistic)
    axes.set_title("median layer: change per doubling")
    axes.legend(loc="lower left", fontsize=7)


def _metric(axes: Any, found: Convergence) -> None:
    if found.metric is None:
        axes.set_axis_off()
        axes.text(0.02, 0.5, "no end metric: give a task and its data", color=MUTED, transform=axes.transAxes)
        return
    if found.float_metric is not None:
        axes.axhline(found.float_metric, color=MUTED, linestyle="--", linewidth=1, label="float")
    if found.float_interval is not None:
        axes.axhspan(*found.float_interval, color=MUTED, alpha=0.12, linewidth=0, label="float, 95 % interval")
    final = [score.metric for score in found.scores if score.size == found.sizes[-1]]
    for order in range(found.orders):
        scores = {score.size: score.metric for score in found.scores if score.order == order} | {
            found.sizes[-1]: final[0]
        }
        label = "quantized, by order" if order == 0 else None
        points = [scores[size] for size in found.sizes]
        axes.plot(found.sizes, points, "-o", markersize=3.5, linewidth=1, color=AFTER, alpha=0.7, label=label)
    axes.set_title(f"{found.metric} of the calibrated model")
    axes.legend(loc="best", fontsize=7)
