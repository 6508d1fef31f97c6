"""What `sweep` returns: a row for every point, each compared with no smoothing and with float on the same samples.

The interval of a row says how sure its own score is. Rows share their samples, so the difference of two is known far
better than their intervals suggest: it is the paired comparisons that say whether α matters.

The best of many α was picked on the samples that it is scored on, and part of its lead is luck. So `auto`, which was
not picked, is compared twice: with that best α, which is strict, and by halves: the even samples with the α that is
best on the odd ones, and the odd with the best on the even. The second is free of that luck.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evenbits.evaluation.paired import paired
from evenbits.evaluation.paired_documents import paired_documents
from evenbits.evaluation.result import finite
from evenbits.pipeline.points import Point

_Z95 = 1.959964
_SEPARATED = 2.0  # paired standard errors


@dataclass(frozen=True)
class Comparison:
    """A row minus another on the same samples, in the metric's unit. The error, its 95 % interval and p (exact McNemar,
    or sign flips over documents) are None where they cannot be estimated."""

    difference: float
    standard_error: float | None
    interval: tuple[float, float] | None
    p: float | None

    @property
    def separated(self) -> bool:
        """Whether the difference is more than two paired standard errors."""
        return self.standard_error is not None and abs(self.difference) > _SEPARATED * self.standard_error


@dataclass(frozen=True)
class SweepRow:
    """One point. name: "float", "none" (no smoothing), "auto" or α; regions: status → how many; region_alphas: what
    `auto` chose; mean_output_sqnr_db: over the quantized layers, on the first calibration batches."""

    name: str
    alpha: float | None
    method: str | None
    metric: float
    interval: tuple[float, float] | None
    against_none: Comparison | None
    against_float: Comparison | None
    regions: dict[str, int]
    region_alphas: dict[str, float | None]
    mean_output_sqnr_db: float | None
    weight_bytes: int | None
    seconds: dict[str, float]


@dataclass(frozen=True)
class Spread:
    """The best α beside the worst: `comparison` is best minus worst, `separated` whether that is more than two paired
    standard errors. The two were picked among all, so that a small multiple of the error may still be luck."""

    best: str
    worst: str
    comparison: Comparison
    separated: bool


@dataclass(frozen=True)
class Search:
    """α = auto beside the α of the sweep. against_best: auto minus the best α, which was picked on the same samples;
    below: whether auto is worse by more than one paired standard error; picked: the best α of the even and of the odd
    samples; against_picked: auto minus a model that answers each half with the α picked on the other, None for one
    sample."""

    best: str
    against_best: Comparison
    below: bool
    picked: tuple[str, str]
    against_picked: Comparison | None


@dataclass(frozen=True)
class Sweep:
    """A finished sweep. metric: the figure's name; n: samples; spread: None with fewer than two α; search: None without
    auto; key: digest of all that the results depend on."""

    model: str
    task: str
    metric: str
    higher_is_better: bool
    n: int
    scheme: dict[str, Any]
    method: str
    options: dict[str, Any]
    calibration: str
    rows: tuple[SweepRow, ...]
    spread: Spread | None
    search: Search | None
    key: str
    notes: tuple[str, ...]

    def row(self, name: str) -> SweepRow | None:
        """The row of a name, if there is one."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def curve(self) -> tuple[SweepRow, ...]:
        """The rows of numbers, by ascending α."""
        return tuple(row for row in self.rows if row.alpha is not None)

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; infinite and absent figures are null."""
        plain: dict[str, Any] = finite({"format": "evenbits.sweep/1", **asdict(self)})
        return plain


def summarise(points: Sequence[Point], found: Mapping[str, Mapping[str, Any]], **about: Any) -> Sweep:
    """Rows and comparisons from what the points' files hold. about: the fields of Sweep that are not counted here."""
    first = found[points[0].name]["evaluation"]
    metric = next(iter(first["metrics"]))
    better = metric != "perplexity"
    rows = tuple(_row(found[point.name], found, metric) for point in points)
    curve = [row for row in rows if row.alpha is not None]
    notes = dict.fromkeys(
        note for point in points for note in (*found[point.name]["evaluation"]["notes"], *found[point.name]["notes"])
    )
    return Sweep(
        metric=metric,
        higher_is_better=better,
        n=int(first["n"]),
        rows=rows,
        spread=_spread(curve, found, better),
        search=_search(curve, found, better) if "auto" in found else None,
        notes=tuple(notes),
        **about,
    )


def _row(point: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]], metric: str) -> SweepRow:
    scored = point["evaluation"]
    against = {
        name: None if name == point["name"] else compare(_items(found[name]), _items(point))
        for name in ("none", "float")
    }
    return SweepRow(
        name=point["name"],
        alpha=point["alpha"],
        method=point["method"],
        metric=_figure(scored["metrics"][metric]),
        interval=None
        if scored["interval"] is None
        else (_figure(scored["interval"][0]), _figure(scored["interval"][1])),
        against_none=against["none"],
        against_float=against["float"],
        regions=point["regions"],
        region_alphas=point["region_alphas"] if point["name"] == "auto" else {},
        mean_output_sqnr_db=point["mean_output_sqnr_db"],
        weight_bytes=point["weight_bytes"],
        seconds=point["seconds"],
    )


def _figure(value: float | None) -> float:
    """JSON has no infinity: a perplexity that is null was infinite."""
    return math.inf if value is None else float(value)


def _items(point: Mapping[str, Any]) -> list[Any]:
    items: list[Any] = point["evaluation"]["items"]
    return items


def compare(first: Iterable[Any], second: Iterable[Any]) -> Comparison:
    """The second minus the first; items are 1 or 0 of a class, or (nats, tokens) of a document.

    Raises EvenbitsError if they are not of the same samples.
    """
    one, two = list(first), list(second)
    if one and isinstance(one[0], (list, tuple)):
        documents = paired_documents([(a, int(t)) for a, t in one], [(b, int(t)) for b, t in two])
        return _comparison(documents.difference, documents.standard_error, documents.p)
    found = paired(one, two)
    return _comparison(found.difference, found.standard_error, found.p)


def _comparison(difference: float, error: float | None, p: float | None) -> Comparison:
    interval = None if error is None else (difference - _Z95 * error, difference + _Z95 * error)
    return Comparison(difference, error, interval, p)


def _spread(curve: Sequence[SweepRow], found: Mapping[str, Mapping[str, Any]], better: bool) -> Spread | None:
    if len(curve) < 2:
        return None
    scores = {row.name: _signed(row.metric, better) for row in curve}
    best, worst = _best(curve, scores), _best(curve, {name: -score for name, score in scores.items()})
    comparison = compare(_items(found[worst]), _items(found[best]))
    return Spread(best, worst, comparison, comparison.separated)


def _search(curve: Sequence[SweepRow], found: Mapping[str, Mapping[str, Any]], better: bool) -> Search | None:
    if not curve:
        return None
    best = _best(curve, {row.name: _signed(row.metric, better) for row in curve})
    items = {row.name: _items(found[row.name]) for row in curve}
    auto = _items(found["auto"])
    against = compare(items[best], auto)
    shortfall = -_signed(against.difference, better)
    below = shortfall > (against.standard_error or 0.0)
    if len(auto) < 2:
        return Search(best, against, below, (best, best), None)
    picked = tuple(_best(curve, {name: _score(of[half::2]) for name, of in items.items()}) for half in (0, 1))
    crossed = [items[picked[1 - index % 2]][index] for index in range(len(auto))]
    return Search(best, against, below, (picked[0], picked[1]), compare(crossed, auto))


def _best(curve: Sequence[SweepRow], scores: Mapping[str, float]) -> str:
    """Of equal scores the one nearest to 0.5, which needs no second explanation."""
    return max(curve, key=lambda row: (scores[row.name], -abs((row.alpha or 0.0) - 0.5))).name


def _score(items: Sequence[Any]) -> float:
    """The share that is right, or minus the nats per token; larger is better."""
    if not isinstance(items[0], (list, tuple)):
        return float(sum(items)) / len(items)
    nats = sum(math.inf if item[0] is None else float(item[0]) for item in items)
    return -nats / sum(int(item[1]) for item in items)


def _signed(value: float, better: bool) -> float:
    return value if better else -value
