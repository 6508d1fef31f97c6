"""How many calibration samples are enough: what the statistics, and the calibrated model, are at 25, 50, … samples.

One pass over the data, one sample at a time, serves all sizes and several random orders (observers/snapshots.py). Each
statistic is compared with itself at the largest size, where the change is 0 by definition; so a second figure stands
beside it, the change per doubling since the size before, which knows nothing of the largest.

    absmax           max |x| of a layer's input: the static scale without smoothing, times 127
    channel absmax   mean over channels of the relative change of max |x_j|
    s                mean over channels of the relative change of SmoothQuant's s at α = 0.5, by region
    static scale     of the input after that s: what a calibrated model uses

O: orders, K: sizes, C: channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log2
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm.auto import tqdm

from evenbits.algorithms.base import Rebalance
from evenbits.errors import EvenbitsError
from evenbits.evaluation.result import Evaluation
from evenbits.graph.regions import Region, find_regions
from evenbits.numerics.affine import qparams
from evenbits.numerics.format import Format
from evenbits.numerics.qdtypes import QDtype
from evenbits.observers.calibrate import watching
from evenbits.observers.channel_range import ChannelRange
from evenbits.observers.second_moment import SecondMoment
from evenbits.observers.snapshots import Snapshots, random_orders
from evenbits.pipeline.balance import balance, decide
from evenbits.pipeline.methods import Methods
from evenbits.pipeline.prepare import Prepared
from evenbits.pipeline.scoring import Accuracy, Difference, Score, deployed_score, difference
from evenbits.pipeline.solve import solve
from evenbits.pipeline.watch import Watched, without_cache

STATISTICS = ("absmax", "channel absmax", "s", "static scale")
SETTLED = {"median": 0.01, "max": 0.05}  # what counts as settled: median and largest change over the layers
Figures: TypeAlias = dict[str, dict[str, torch.Tensor]]  # statistic → layer or region → one figure, or one per channel


@dataclass(frozen=True)
class Change:
    """A statistic at one size of one order. median, max: over layers, of the relative change against the largest size;
    worst: the layer of the largest change; doubling_median, doubling_max: of the change per doubling since the size
    before (None at the first)."""

    statistic: str
    order: int
    size: int
    median: float
    max: float
    worst: str
    doubling_median: float | None
    doubling_max: float | None


@dataclass(frozen=True)
class SizeScore:
    """The calibrated model's metric at one size of one order, and against that of the largest size."""

    order: int
    size: int
    metric: float
    interval: tuple[float, float] | None
    against_largest: Difference | None


@dataclass(frozen=True)
class Convergence:
    """float_metric, float_interval: of the float model, where models were scored."""

    sizes: tuple[int, ...]
    orders: int
    seed: int
    changes: tuple[Change, ...]
    metric: str | None
    scores: tuple[SizeScore, ...]
    float_metric: float | None
    float_interval: tuple[float, float] | None
    notes: tuple[str, ...] = ()

    def settled_at(self, statistic: str) -> int | None:
        """The smallest size from which, in every order, the median over layers stays within 1 % of the largest size's
        and the worst layer within 5 %. None if only the largest itself does."""
        found = None
        for size in reversed(self.sizes[:-1]):
            rows = [row for row in self.changes if row.statistic == statistic and row.size == size]
            if not all(row.median <= SETTLED["median"] and row.max <= SETTLED["max"] for row in rows):
                break
            found = size
        return found


def samples_of(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches cut into samples: of every tensor that is as long as the batch's first one, one row."""
    for given in batches:
        batch = dict(given) if isinstance(given, Mapping) else given
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
        count = len(tensors[0]) if tensors and tensors[0].ndim else 1
        for index in range(count):
            yield tree_map(lambda leaf, i=index, n=count: _row(leaf, i, n), batch)


def _row(leaf: Any, index: int, count: int) -> Any:
    whole = not isinstance(leaf, torch.Tensor) or not leaf.ndim or len(leaf) != count
    return leaf if whole else leaf[index : index + 1]


def check_sizes(sizes: Sequence[int], orders: int) -> None:
    """Raises EvenbitsError unless there are at least two ascending sizes and one order."""
    if len(sizes) < 2 or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise EvenbitsError(f"sizes must be at least two ascending whole numbers, such as 25,50,100; given {sizes}.")
    if orders < 1:
        raise EvenbitsError(f"orders must be at least 1; given {orders}.")


def too_few(samples: int, wanted: int) -> EvenbitsError:
    """The error for sizes that go beyond the data."""
    return EvenbitsError(
        f"the calibration data has {samples:,} samples and the sizes go to {wanted:,}; give smaller sizes or more data."
    )


def convergence(
    model: nn.Module,
    prepared: Prepared,
    watched: Watched,
    data: Iterable[Any],
    sizes: Sequence[int],
    *,
    orders: int,
    seed: int,
    score: Score | None,
    baseline: Accuracy | None,
    run: Callable[[Any], Any],
    progress: bool,
) -> Convergence:
    """Statistics, and with `score` the calibrated model's metric, at each size of each order.

    data: batches, of which the first sizes[-1] samples are used; run: a forward on one batch; baseline: the accuracies
    at hand, for the float model's. The model is in evaluation mode, and unchanged afterwards. Raises EvenbitsError if
    the data has fewer samples, or if α is searched and models are to be scored (a search would see all of the data at
    every size).
    """
    check_sizes(sizes, orders)
    if score is not None and isinstance(prepared.methods.balance_options.get("alpha"), str):
        raise EvenbitsError("accuracy by calibration size needs alpha as a number: a search sees all data each time.")
    snapshots = _Pass(model, prepared, watched, sizes, random_orders(sizes[-1], orders, seed))
    snapshots.walk(data, run, progress=progress)
    regions = _regions(prepared, watched)
    figures = [[_figures(model, prepared, snapshots.at(o, n), regions) for n in sizes] for o in range(orders)]
    changes = [change for o in range(orders) for change in _changes(figures[o], sizes, o)]
    found = Convergence(tuple(sizes), orders, seed, tuple(changes), None, (), None, None, _notes(prepared))
    if score is None or baseline is None:
        return found
    return _scored(model, prepared, found, snapshots, score, baseline, progress=progress)


class _Pass:
    """One walk over the samples; ranges (and second moments, if a method wants them) at every size of every order."""

    def __init__(
        self, model: nn.Module, prepared: Prepared, watched: Watched, sizes: Sequence[int], places: list[list[int]]
    ) -> None:
        self._model, self._watched, self._count = model, watched, sizes[-1]
        self._dims = {plan.name: plan.channels.channel_dim for plan in prepared.chosen}
        self._ranges = {name: Snapshots(ChannelRange, sizes, places) for name in self._dims}
        self._moments = {name: Snapshots(SecondMoment, sizes, places) for name in self._dims if watched.moments}

    def walk(self, data: Iterable[Any], run: Callable[[Any], Any], *, progress: bool) -> None:
        ranges: dict[str, ChannelRange] = {}
        moments: dict[str, SecondMoment] = {}

        def see(name: str, x: torch.Tensor, _: torch.Tensor) -> None:
            ranges.setdefault(name, ChannelRange()).update(x, self._dims[name])
            if self._moments:
                moments.setdefault(name, SecondMoment()).update(x, self._dims[name])

        walked = 0
        bar = tqdm(total=self._count, desc="calibrating", unit="sample", disable=not progress or None)
        with torch.no_grad(), without_cache(self._model), watching(self._model, self._dims, see), bar:
            for sample in samples_of(data):
                run(sample)
                for name in ranges:
                    self._ranges[name].add(walked, ranges[name])
                    if self._moments:
                        self._moments[name].add(walked, moments[name])
                ranges.clear()
                moments.clear()
                walked += 1
                bar.update()
                if walked == self._count:
                    return
        raise too_few(walked, self._count)

    def at(self, order: int, size: int) -> Watched:
        """What a calibration on the first `size` samples of an order would have seen."""
        ranges = {name: snapshots.at(order, size) for name, snapshots in self._ranges.items()}
        moments = {name: snapshots.at(order, size) for name, snapshots in self._moments.items()}
        return replace(self._watched, ranges=ranges, moments=moments)


def _regions(prepared: Prepared, watched: Watched) -> list[Region]:
    widths = {p.name: p.channels.in_channels for p in prepared.chosen if watched.ranges[p.name].seen}
    return find_regions(watched.trace, widths)


def _figures(model: nn.Module, prepared: Prepared, watched: Watched, regions: Sequence[Region]) -> Figures:
    half = Methods.parse("smoothquant", {"alpha": 0.5})
    seen = {name: ranges for name, ranges in watched.ranges.items() if ranges.seen}
    found: Figures = {name: {} for name in STATISTICS}
    for name, ranges in seen.items():
        found["absmax"][name] = ranges.absmax.max().reshape(1).cpu()
        found["channel absmax"][name] = ranges.absmax.cpu()
    for region in regions:
        if not all(name in seen for name in region.layers):
            continue
        decided = decide(model, region, watched, half)
        assert isinstance(decided, Rebalance) and decided.scale_I is not None  # a number for α is no search
        scale_S = decided.scale_I.cpu()
        found["s"][region.name] = scale_S
        for name in region.layers:
            scale_I, ranges = scale_S[region.index[name].cpu()], seen[name]
            lo, hi = (ranges.lo.cpu() / scale_I).amin(), (ranges.hi.cpu() / scale_I).amax()
            found["static scale"][name] = qparams(lo.reshape(1), hi.reshape(1), _format(prepared, name))[0]
    return found


def _format(prepared: Prepared, name: str) -> Format:
    """The layer's input format if it has one scale of an integer type, else int8 with one scale."""
    fmt = prepared.modules[name].input_format
    plain = fmt is not None and isinstance(fmt.dtype, QDtype) and fmt.granularity.kind == "tensor"
    return fmt if plain and fmt is not None else Format.parse("int8:tensor")


def _changes(figures: Sequence[Figures], sizes: Sequence[int], order: int) -> Iterator[Change]:
    for statistic in STATISTICS:
        for index, size in enumerate(sizes):
            final = _relative(figures[index][statistic], figures[-1][statistic])
            if not final:
                continue
            worst = max(final, key=final.__getitem__)
            step: list[float] = []
            if index:
                doublings = log2(size / sizes[index - 1])
                steps = _relative(figures[index - 1][statistic], figures[index][statistic])
                step = [value / doublings for value in steps.values()]
            yield Change(
                statistic,
                order,
                size,
                median(final.values()),
                final[worst],
                worst,
                median(step) if step else None,
                max(step) if step else None,
            )


def _relative(found: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Layer → mean over channels of |found − reference| / |reference|; what has not been seen yet changed by all of it.
    Channels where both are zero have not changed."""
    changes = {}
    for name, wanted in reference.items():
        given = found.get(name, torch.zeros_like(wanted)).double()
        apart = (given - wanted.double()).abs() / wanted.double().abs()
        changes[name] = float(torch.where(given == wanted, 0.0, apart).mean())
    return changes


def _notes(prepared: Prepared) -> tuple[str, ...]:
    fixed = sorted({str(_format(prepared, name)) for name in prepared.modules})
    return (f"static scale: of {', '.join(fixed)} after s at α = 0.5, whatever the scheme's own activations are",)


def _scored(
    model: nn.Module,
    prepared: Prepared,
    found: Convergence,
    snapshots: _Pass,
    score: Score,
    baseline: Accuracy,
    *,
    progress: bool,
) -> Convergence:
    metric, floating = baseline.metric, baseline.rows[0]
    largest = _score_at(model, prepared, snapshots.at(0, found.sizes[-1]), score)  # the same set in every order
    scores = []
    pairs = [(order, size) for size in found.sizes[:-1] for order in range(found.orders)]
    for order, size in tqdm(pairs, desc="scoring", unit="model", disable=not progress or None):
        scored = _score_at(model, prepared, snapshots.at(order, size), score)
        scores.append(_size_score(order, size, scored, metric, largest))
    scores.append(_size_score(0, found.sizes[-1], largest, metric, None))
    return replace(
        found,
        metric=metric,
        scores=tuple(scores),
        float_metric=floating.metric,
        float_interval=floating.interval,
    )


def _size_score(order: int, size: int, scored: Evaluation, metric: str, largest: Evaluation | None) -> SizeScore:
    apart = None if largest is None else difference(largest, scored)
    return SizeScore(order, size, scored.metrics[metric], scored.interval, apart)


def _score_at(model: nn.Module, prepared: Prepared, watched: Watched, score: Score) -> Evaluation:
    """The score of the model as a calibration on these statistics would have made it."""
    scheme, methods, chosen = prepared.scheme, prepared.methods, prepared.chosen
    balanced = balance(model, chosen, watched, scheme, methods)
    solved = solve(model, chosen, scheme, methods, balanced, watched, progress=False)
    return deployed_score(model, replace(prepared, balanced=balanced, solved=solved), score)
