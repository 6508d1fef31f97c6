"""A sweep as a picture and as a table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from evenbits.errors import EvenbitsError
from evenbits.pipeline.sweep_result import Comparison, Sweep, SweepRow
from evenbits.reporting.curves import Figure, Panel, svg
from evenbits.reporting.png import matplotlib_figure, png
from evenbits.reporting.tables import table

_SUFFIXES = (".svg", ".png")
_LABELS = {"float": "float", "none": "no smoothing", "auto": "α = auto"}
_LOG_FROM = 10.0  # a curve that spans more than this factor gets a logarithmic axis


def check_plot(path: Path) -> None:
    """Raises EvenbitsError for a suffix that cannot be drawn, MissingExtraError for PNG without matplotlib."""
    if path.suffix not in _SUFFIXES:
        raise EvenbitsError(f"a picture is a file that ends in .svg or .png; given {path}.")
    if path.suffix == ".png":
        matplotlib_figure()


def plot(sweep: Sweep, path: Path) -> None:
    """Writes the picture of a sweep, SVG or PNG by the suffix of `path`."""
    check_plot(path)
    figure = sweep_figure(sweep)
    try:
        if path.suffix == ".png":
            png(figure, path)
        else:
            path.write_text(svg(figure), encoding="utf-8")
    except OSError as error:
        raise EvenbitsError(f"the picture {path} cannot be written: {error}") from error


def sweep_figure(sweep: Sweep) -> Figure:
    """The score over α above, the paired difference from no smoothing below."""
    share = sweep.metric == "accuracy"
    factor, unit = (100.0, " %") if share else (1.0, "")
    points = " percentage points" if share else ""
    sampled = f"n = {sweep.n:,} {'inputs' if share else 'documents'}"
    known = all(row.interval is not None for row in sweep.curve)
    upper = f"Band above: 95 % interval of each score, {sampled}." if known else f"No intervals: {sampled}."
    lower = " Band below: ± 2 paired standard errors." if known else ""
    caption = (
        upper + lower,
        f"All scores are of the same samples, so the lower panel tells two α apart better. Key {sweep.key[:12]}.",
        *search_verdict(sweep),
    )
    label = "accuracy, % of inputs" if share else f"{sweep.metric} (lower is better)"
    panels = (
        _scores(sweep, label, factor, unit),
        _differences(sweep, factor, f"{sweep.metric} minus that without smoothing{_comma(points)}"),
    )
    title = f"{_short(sweep.model)}: {sweep.metric} over α"
    subtitle = (f"{sweep.method}, {_scheme(sweep)}", verdict(sweep))
    x_label = "migration strength α (0: all in the activations, 1: all in the weights)"
    return Figure(title, subtitle, x_label, panels, caption)


def _comma(words: str) -> str:
    return f",{words}" if words else ""


def _scores(sweep: Sweep, label: str, factor: float, unit: str) -> Panel:
    curve = sweep.curve
    y = _scaled([row.metric for row in curve], factor)
    bounded = all(row.interval is not None for row in curve)
    low, high = (
        (_scaled([row.interval[side] for row in curve if row.interval], factor) for side in (0, 1))
        if bounded
        else (None, None)
    )
    lines = [
        (f"{_LABELS[name]}: {row.metric * factor:.2f}{unit}", row.metric * factor)
        for name in _LABELS
        if (row := sweep.row(name)) is not None and math.isfinite(row.metric)
    ]
    marks = []
    if sweep.spread is not None and sweep.spread.best != sweep.spread.worst:
        for word, name in (("best", sweep.spread.best), ("worst", sweep.spread.worst)):
            row = sweep.row(name)
            if row is not None and row.alpha is not None and math.isfinite(row.metric):
                above = (word == "best") == sweep.higher_is_better
                marks.append((row.alpha, row.metric * factor, f"{word} {name}: {row.metric * factor:.2f}{unit}", above))
    finite = [value for value in [*y, *(value for _, value in lines)] if math.isfinite(value) and value > 0]
    wide = not sweep.metric == "accuracy" and bool(finite) and max(finite) / min(finite) > _LOG_FROM
    return Panel(label, _x(curve), y, low, high, tuple(lines), tuple(marks), wide)


def _differences(sweep: Sweep, factor: float, label: str) -> Panel:
    curve = sweep.curve
    found = [row.against_none for row in curve]
    y = _scaled([math.nan if c is None else c.difference for c in found], factor)
    errors = [None if c is None else c.standard_error for c in found]
    low = high = None
    if all(error is not None for error in errors):
        wide = [2 * factor * (error or 0.0) for error in errors]
        low = tuple(value - by for value, by in zip(y, wide, strict=True))
        high = tuple(value + by for value, by in zip(y, wide, strict=True))
    lines = [
        (_LABELS[name], row.against_none.difference * factor if row.against_none else 0.0)
        for name in _LABELS
        if (row := sweep.row(name)) is not None and (row.against_none is None or _finite(row.against_none))
    ]
    return Panel(label, _x(curve), y, low, high, tuple(lines))


def _finite(comparison: Comparison) -> bool:
    return math.isfinite(comparison.difference)


def _x(curve: tuple[SweepRow, ...]) -> tuple[float, ...]:
    return tuple(row.alpha or 0.0 for row in curve)


def _scaled(values: list[float], factor: float) -> tuple[float, ...]:
    return tuple(value * factor if math.isfinite(value) else math.nan for value in values)


def _short(model: str) -> str:
    return Path(model).name.rpartition(":")[2] or model


def _scheme(sweep: Sweep) -> str:
    weights, inputs = sweep.scheme["weights"], sweep.scheme["input_activations"]
    kind = "" if inputs is None else " dynamic" if sweep.scheme["dynamic"] else " static"
    return f"weights {weights}, inputs {inputs or 'float'}{kind}"


def verdict(sweep: Sweep) -> str:
    """One sentence: do best and worst α differ by more than two paired standard errors?"""
    spread = sweep.spread
    if spread is None:
        return "One α only: nothing to tell apart."
    found = spread.comparison
    if spread.best == spread.worst:
        return f"All {len(sweep.curve)} α score the same."
    if not math.isfinite(found.difference):
        return f"Best α {spread.best}; at the worst, {spread.worst}, the {sweep.metric} is infinite."
    if found.standard_error is None:
        return f"Best α {spread.best}, worst {spread.worst}, {difference(sweep, found)}; no error known."
    how = "more than" if spread.separated else "not more than"
    apart = difference(sweep, found)
    return f"Best α {spread.best} minus worst {spread.worst}: {apart}, {how} two paired standard errors."


def search_verdict(sweep: Sweep) -> tuple[str, ...]:
    """Up to two sentences: auto against the best α, and against one that was not picked on the same samples."""
    search = sweep.search
    if search is None or not _finite(search.against_best):
        return ()
    among = f"of {len(sweep.curve)}, picked on these samples" if len(sweep.curve) > 1 else "the only one"
    first = f"α = auto minus the best α ({search.best}, {among}): {difference(sweep, search.against_best)}."
    if search.against_picked is None or not _finite(search.against_picked) or len(sweep.curve) < 2:
        return (first,)
    words = " and ".join(dict.fromkeys(search.picked))
    second = f"α = auto minus the α picked on the other half ({words}): {difference(sweep, search.against_picked)}."
    return (first, second)


def difference(sweep: Sweep, found: Comparison) -> str:
    """A difference with one paired standard error, in percentage points where the metric is a share."""
    factor, unit = (100.0, " points") if sweep.metric == "accuracy" else (1.0, "")
    error = "" if found.standard_error is None else f" ± {found.standard_error * factor:.2f}"
    return f"{_signed(found.difference * factor)}{error}{unit}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def sweep_table(sweep: Sweep) -> Table:
    """Every point with its interval and what it differs by from no smoothing."""
    columns = [
        "point", sweep.metric, "95 % interval", "minus none", "±", "p", "folded", "multiplied", "SQNR dB", "s",
    ]  # fmt: skip
    title = f"{sweep.model}, {sweep.method}, {_scheme(sweep)}; {sweep.task}, n = {sweep.n:,}"
    return table(title, columns, [_cells(row) for row in sweep.rows])


def _cells(row: SweepRow) -> tuple[Any, ...]:
    interval = "–" if row.interval is None else f"{row.interval[0]:.4f} … {row.interval[1]:.4f}"
    against = row.against_none
    compared = (None,) * 3 if against is None else (f"{against.difference:+.4f}", against.standard_error, against.p)
    quantized = row.method is not None
    regions = [row.regions.get(status, 0) if quantized else None for status in ("folded", "multiplied")]
    name = _LABELS.get(row.name, row.name)
    return (name, row.metric, interval, *compared, *regions, row.mean_output_sqnr_db, sum(row.seconds.values()))
