"""The tables of docs/collapse.md, from the runs of collapse.py."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

Run = dict[str, Any]


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share their mean rank."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found, start = [0.0] * len(values), 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for i in order[start : end + 1]:
            found[i] = (start + end) / 2 + 1
        start = end + 1
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation; None for fewer than three pairs or a constant side."""
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return statistics.correlation(ranks(a), ranks(b))


def report(runs: list[Run]) -> str:
    """Markdown: the ends of the curves, the predictors with and without interventions, and where there are such runs,
    what each direction does alone and how many parts are reasonable."""
    runs = [{"direction": "both", **r} for r in runs]
    sets = [r for r in runs if r["method"].startswith("multi8x")]
    one_way = [r for r in runs if r["direction"] != "both"]
    grids = [r for r in runs if r not in sets and r not in one_way]
    plain = [r for r in grids if "-" not in r["method"]]
    parts = [results(grids), predictors(plain, "quantizers"), predictors(grids, "with interventions")]
    if one_way:
        pairs = {(r["method"], r["bits"]) for r in one_way}
        parts.append(
            results([r for r in grids if (r["method"], r["bits"]) in pairs or r["method"] == "none"] + one_way)
        )
    if sets:
        parts.append(results([r for r in grids if r["method"] == "none"] + sets))
    return "\n\n".join(parts)


def jsonl(runs: list[Run]) -> str:
    """The runs, a line each, without what can be left out."""
    return "".join(json.dumps(run, separators=(",", ":")) + "\n" for run in runs)


def _text(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _each(runs: list[Run], pick: Any, digits: int) -> str:
    return " ".join(_text(pick(r), digits) for r in runs)


def results(runs: list[Run]) -> str:
    """One line per method and bits, one figure per seed."""
    titles = (
        "bits",
        "quantizer",
        "final loss",
        "test accuracy %",
        "stem SNR dB",
        "stem DC ratio",
        "its maximum",
        "stem β, × start",
    )
    head = f"| {' | '.join(titles)} |"
    lines = [head, "|" + "---|" * 8]
    order = {
        name: i
        for i, name in enumerate(("none", "minmax", "minmax-centred", "minmax-channels", "zero", "zero-shifted"))
    }
    keys = sorted({(-r["bits"], order.get(r["method"], 9), _parts(r["method"]), r["direction"]) for r in runs})
    for bits, _, (_, method), direction in keys:
        kind = (-bits, method, direction)
        same = sorted((r for r in runs if (r["bits"], r["method"], r["direction"]) == kind), key=lambda r: r["seed"])
        cells = [
            str(-bits),
            method if direction == "both" else f"{method}, {direction} only",
            _each(same, lambda r: r["loss"], 2),
            _each(same, lambda r: None if r["accuracy"] is None else 100 * r["accuracy"], 0),
            _each(same, lambda r: r["stem"]["snr_db"], 1),
            _each(same, lambda r: r["stem"]["dc_ratio"], 2),
            _each(same, lambda r: r["stem"]["dc_ratio_max"], 1),
            _each(same, lambda r: r["bias_norm"][-1] / r["bias_norm"][0], 2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _parts(method: str) -> tuple[int, str]:
    """What puts multi8x2 before multi8x16."""
    count = method.rpartition("x")[2]
    return int(count) if count.isdigit() else 0, method


def drift(run: Run) -> float:
    """How far the norm of the stem's β went, up or down: the largest |ln(norm / norm at the start)|."""
    return max(abs(math.log(norm / run["bias_norm"][0])) for norm in run["bias_norm"])


def predictors(runs: list[Run], words: str) -> str:
    """Spearman's rank correlation of what was measured with what became of the run."""
    whole = [r for r in runs if r["method"] != "none" and r["loss"] is not None and r["stem"]["snr_db"] is not None]
    start = {(r["seed"], r["size"], r["steps"]): r for r in runs if r["method"] == "none"}
    paired = [(r, start[key]) for r in whole if (key := (r["seed"], r["size"], r["steps"])) in start]
    ends = {
        "loss − its seed's unquantized loss": [r["loss"] - s["loss"] for r, s in paired],
        "accuracy − its seed's unquantized accuracy": [r["accuracy"] - s["accuracy"] for r, s in paired],
        "drift of the stem's β": [drift(r) for r, _ in paired],
    }
    lines = [f"| {words}: {len(paired)} runs | {' | '.join(ends)} |", "|" + "---|" * (len(ends) + 1)]
    for title, key in (("DC ratio", "dc_ratio"), ("SNR", "snr_db")):
        for span, said in (("", "median of the run"), ("_first", "median of its first quarter")):
            values = [r["stem"][key + span] for r, _ in paired]
            cells = [_text(spearman(values, end), 2) for end in ends.values()]
            lines.append(f"| {title}, {said} | {' | '.join(cells)} |")
    return "\n".join(lines)
