"""The tables of `evenbits diagnose`."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from evenbits.pipeline.convergence import STATISTICS, Convergence
from evenbits.pipeline.diagnose import Diagnosis
from evenbits.pipeline.scoring import Accuracy, Difference
from evenbits.reporting.tables import show, size, table


def show_diagnosis(found: Diagnosis, calibration: str, folder: Path, files: list[str]) -> None:
    """Prints everything: errors (worst layer first), ranges, accuracy, convergence, and where the pictures are."""
    errors = found.errors
    columns = ["layer", "kind", "L1 isolated", "L1 cumulative", "SQNR isolated dB", "SQNR cumulative dB"]
    rows = [
        (r.name, r.kind, r.isolated_l1, r.cumulative_l1, r.isolated_sqnr_db, r.cumulative_sqnr_db)
        for r in errors.worst_first
    ]
    show(table(f"{len(rows)} layers, worst first ({found.method}, on {calibration})", columns, rows, left=2))
    show(*(f"{row.name}: {row.note}." for row in errors.rows if row.note))
    show(_output_line(found), "")
    show(_ranges(found), "")
    if found.accuracy is not None:
        show(_accuracy(found.accuracy), *_accuracy_lines(found.accuracy), "")
    if found.convergence is not None:
        show(_convergence(found.convergence), "")
        if found.convergence.scores:
            show(_scores(found.convergence), "")
        show(*settled_lines(found.convergence), *found.convergence.notes, "")
    show(*found.notes)
    pictures = [name for name in files if name.endswith(".png")]
    show(f"{len(pictures)} pictures (SVG and PNG) and diagnosis.json in {folder}: {', '.join(pictures)}")


def _output_line(found: Diagnosis) -> str:
    errors = found.errors
    held = f"Outputs held at most, of one batch: {size(errors.held_bytes)}; {errors.batches} batches."
    if errors.output_l1 is None or errors.output_sqnr_db is None:
        return f"The model's outputs have other shapes when it is quantized; they are not compared. {held}"
    return f"Model output: L1 {errors.output_l1:.4f}, SQNR {errors.output_sqnr_db:.2f} dB. {held}"


def _ranges(found: Diagnosis) -> Any:
    columns = ["layer", "inputs", "smoothing", "max |x|", "→", "max/median channel", "→", "scale", "→"]
    rows = [
        (
            r.name, r.input_format, r.smoothing, r.absmax_before, r.absmax_after, r.unevenness_before,
            r.unevenness_after, _scale(r.scale_before), _scale(r.scale_after),
        )
        for r in found.ranges
    ]  # fmt: skip
    return table("range of every input quantizer, before → after smoothing (scale –: from each input)", columns, rows,
                 left=3)  # fmt: skip


def _scale(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def _accuracy(found: Accuracy) -> Any:
    columns = ["model", found.metric, "95 % interval", "against float", "±", "p"]
    rows = []
    for row in found.rows:
        apart, interval = row.against_float, row.interval
        spread = "–" if interval is None else f"{interval[0]:.4f} … {interval[1]:.4f}"
        rows.append((row.name, row.metric, spread, *_difference(apart)))
    return table(f"{found.task}, n = {found.n:,}", columns, rows)


def _difference(apart: Difference | None) -> tuple[Any, Any, Any]:
    if apart is None:
        return None, None, None
    return apart.value, _margin(apart), apart.p


def _margin(apart: Difference) -> Any:
    return f"{apart.interval[0]:.4f} … {apart.interval[1]:.4f}" if apart.interval is not None else apart.standard_error


def _accuracy_lines(found: Accuracy) -> list[str]:
    nats = found.metric == "perplexity"
    lines = [
        "against float: nats per token on the same documents, ±: 95 % interval."
        if nats
        else "against float: the same items, paired; ±: one standard error; p: exact McNemar test."
    ]
    if found.smoothing is not None:
        word = "more than luck" if found.smoothing.beyond_luck else "no more than luck"
        p = "" if found.smoothing.p is None else f" (p = {found.smoothing.p:.3g})"
        lines.append(
            f"{found.rows[2].name.capitalize()} against {found.rows[1].name}: {found.smoothing.value:+.4f}{p}: {word}."
        )
    return lines


def _convergence(found: Convergence) -> Any:
    """A line for each statistic and size: as many columns beside each other would not fit a terminal."""
    columns = ["statistic", "samples", "median layer %", "worst layer %", "least … most", "per doubling %"]
    rows: list[tuple[Any, ...]] = []
    for statistic in STATISTICS:
        for number in found.sizes if any(c.statistic == statistic for c in found.changes) else ():
            changes = [c for c in found.changes if c.statistic == statistic and c.size == number]
            steps = [c.doubling_median for c in changes if c.doubling_median is not None]
            medians, largest = [c.median for c in changes], [c.max for c in changes]
            spread = f"{100 * min(medians):.2f} … {100 * max(medians):.2f}"
            rows.append((statistic, number, _percent(medians), _percent(largest), spread, _percent(steps)))
    title = f"change against {found.sizes[-1]:,} samples; means of {found.orders} random orders, spread of the median"
    return table(title, columns, rows)


def _percent(values: list[float]) -> str | None:
    return f"{100 * mean(values):.2f}" if values else None


def _scores(found: Convergence) -> Any:
    columns = ["samples", *(f"order {order + 1}" for order in range(found.orders)), "lowest p against the largest"]
    rows = []
    for number in found.sizes:
        scores = sorted((s for s in found.scores if s.size == number), key=lambda score: score.order)
        figures = [score.metric for score in scores]
        figures += figures * (found.orders - len(figures))  # at the largest size all orders are one set
        p = [s.against_largest.p for s in scores if s.against_largest is not None and s.against_largest.p is not None]
        rows.append((number, *figures, min(p) if p else None))
    floating = "–" if found.float_metric is None else f"{found.float_metric:.4f}"
    return table(f"{found.metric} of the calibrated model (float: {floating})", columns, rows)


def settled_lines(found: Convergence) -> list[str]:
    """One sentence for each statistic: from how many samples it stays where the largest size has it."""
    lines = []
    for statistic in STATISTICS:
        if not any(change.statistic == statistic for change in found.changes):
            continue
        settled = found.settled_at(statistic)
        where = f"settled from {settled:,} samples" if settled else f"not settled before {found.sizes[-1]:,} samples"
        lines.append(f"{statistic}: {where} (median layer within 1 %, worst within 5 %, in every order).")
    return lines
