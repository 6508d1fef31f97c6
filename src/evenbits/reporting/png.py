"""The same figures as PNG, through matplotlib (extra `report`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evenbits.errors import MissingExtraError
from evenbits.reporting.curves import Figure, Panel, spread_out, ticks

_COLOURS = ("#4b5563", "#c2410c", "#15803d")
_DASHES: tuple[Any, ...] = ((0, (6, 3)), (0, (2, 2)), (0, (7, 2, 1.5, 2)))
_CURVE = "#2563a8"


def matplotlib_figure() -> Any:
    """matplotlib's Figure class. Raises MissingExtraError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "a PNG picture") from error
    return Canvas


def png(figure: Figure, path: Path) -> None:
    """Writes the figure, 1920 pixels wide. Raises MissingExtraError without matplotlib."""
    heights = [1.8 if index == 0 else 1.0 for index in range(len(figure.panels))]
    canvas = matplotlib_figure()(figsize=(9.6, 2.1 + 1.75 * sum(heights)), layout="constrained")
    axes = canvas.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel, height in zip(axes, figure.panels, heights, strict=True):
        _draw(axis, panel, 134 * height)
    axes[-1].set_xlabel(figure.x_label)
    lines = len(figure.subtitle)
    canvas.suptitle(figure.title + "\n" * lines, x=0.02, ha="left", fontsize=12, fontweight="bold")
    tall = 72 * canvas.get_figheight()
    canvas.text(0.02, 1 - 25 / tall, "\n".join(figure.subtitle), ha="left", va="top", fontsize=9.5)
    canvas.supxlabel("\n".join(figure.caption), x=0.02, ha="left", fontsize=8, color="#4b5563")
    canvas.savefig(path, dpi=200, format="png")


def _draw(axis: Any, panel: Panel, height: float) -> None:
    """One panel of about that many points in height."""
    if panel.logarithmic:
        axis.set_yscale("log")
    axis.set_ylim(*panel.span)
    axis.set_title(panel.label, loc="left", fontsize=9.5)
    marked = ticks(*panel.span, logarithmic=panel.logarithmic)
    axis.set_yticks(marked, [f"{value:g}" for value in marked])
    axis.minorticks_off()
    axis.set_xticks(ticks(min(panel.x, default=0.0), max(panel.x, default=1.0), count=10))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    _lines(axis, panel, height)
    if panel.low is not None and panel.high is not None:
        axis.fill_between(panel.x, panel.low, panel.high, color=_CURVE, alpha=0.16, linewidth=0)
        if len(panel.x) == 1:  # a band of one point has no area
            axis.vlines(panel.x, panel.low, panel.high, color=_CURVE, linewidth=1.5)
    axis.plot(panel.x, panel.y, color=_CURVE, marker="o", markersize=4)
    _marks(axis, panel)


def _marks(axis: Any, panel: Panel) -> None:
    from matplotlib.patheffects import withStroke

    left, right = axis.get_xlim()
    for x, y, words, above in panel.marks:
        axis.plot([x], [y], "o", markersize=10, markerfacecolor="none", markeredgecolor=_CURVE, markeredgewidth=1.5)
        share = (x - left) / (right - left)
        side = "left" if share < 0.15 else "right" if share > 0.85 else "center"
        where = {"xytext": (0, 10 if above else -10), "textcoords": "offset points"}
        halo = [withStroke(linewidth=3, foreground="white")]
        axis.annotate(words, (x, y), ha=side, va="bottom" if above else "top", fontsize=9, path_effects=halo, **where)


def _lines(axis: Any, panel: Panel, height: float) -> None:
    share = [float(axis.transAxes.inverted().transform(axis.transData.transform((0, v)))[1]) for _, v in panel.lines]
    places = spread_out([s * height for s in share], 13, 0, height)
    for index, ((words, value), place) in enumerate(zip(panel.lines, places, strict=True)):
        colour = _COLOURS[index % 3]
        axis.axhline(value, color=colour, linestyle=_DASHES[index % 3], linewidth=1.3)
        where = {"xycoords": "axes fraction", "va": "center", "fontsize": 9}
        axis.annotate(words, (1.01, place / height), color=colour, **where)
