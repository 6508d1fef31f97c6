"""One balance per region: a scale that is folded or multiplied, or an order of channels that is folded or indexed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from evenbits.algorithms.alpha import Search
from evenbits.algorithms.base import Rebalance
from evenbits.errors import EvenbitsError
from evenbits.graph.folding import Fold, prove
from evenbits.graph.permuting import prove_permutation, row_producers
from evenbits.graph.regions import Region, find_regions, same_tensor_regions
from evenbits.nn.layout import Layout
from evenbits.pipeline.balanced import Balanced
from evenbits.pipeline.methods import Methods
from evenbits.pipeline.plan import LayerPlan
from evenbits.pipeline.result import RegionRow
from evenbits.pipeline.trials import Trials
from evenbits.pipeline.tuning import tune
from evenbits.pipeline.watch import Watched, without_cache
from evenbits.schemes.scheme import Scheme

_FIRST_ONLY = "α was tuned on the first {} batches: the data can be walked only once. Pass a list to tune on all of it."

# The pairs of a weight run along (in, kernel height, kernel width), those of an activation along the pixels.
_NO_ORDER = (
    "an order of channels is for linear layers: a convolution's pairs are kernel positions and pixels of one channel"
)
_NO_GAIN = (
    "warning: nothing was smoothed: the search for α found nothing to gain; of all it tried, leaving a region alone "
    "had the least loss in each of {} regions"
)
_UNSEEN = "did not run on the calibration data: no statistics"


def balance(
    model: nn.Module,
    plans: list[LayerPlan],
    watched: Watched,
    scheme: Scheme,
    methods: Methods,
    *,
    progress: bool = False,
) -> Balanced:
    """Balances every region of the planned layers. Raises EvenbitsError if there is none."""
    layouts = {plan.name: plan.channels for plan in plans}
    if methods.balance is None:
        return Balanced(layouts=layouts)
    # A layer may have run on no rows (an expert nothing was routed to): it reads what the others read, and is scaled.
    ran = {name for name in layouts if watched.ranges[name].seen} | watched.trace.flow.inputs.keys()
    permutes = methods.balance.permutes
    reasons = {plan.name: _why_left_out(plan, ran, permutes=permutes) for plan in plans}
    widths = {name: layouts[name].in_channels for name, reason in reasons.items() if not reason}
    regions = _regions(watched, widths, layouts, permutes=permutes)
    asked = {region.name: decide(model, region, watched, methods) for region in regions}
    decided = {name: found for name, found in asked.items() if isinstance(found, Rebalance)}
    searches = {name: found for name, found in asked.items() if not isinstance(found, Rebalance)}
    if searches:
        trials = Trials(model, {plan.name: plan for plan in plans}, scheme, methods, watched)
        decided |= tune(trials, [region for region in regions if region.name in searches], searches, progress=progress)
    unsmoothed = tuple(RegionRow(name, (name,), "skipped", reason, None) for name, reason in reasons.items() if reason)
    if not regions:
        raise EvenbitsError(_nothing_smoothed(unsmoothed))
    arrange = _permuted if permutes else _scaled
    found = arrange(model, regions, decided, watched, widths)
    notes = () if not searches or watched.source.repeatable else (_FIRST_ONLY.format(len(watched.source.kept)),)
    rows = (*found.rows, *unsmoothed)
    if not permutes and all(row.status == "skipped" for row in rows):
        alone = sum(_is_untouched(choice) for choice in decided.values())
        if not alone:
            raise EvenbitsError(_nothing_smoothed(rows))
        notes = (*notes, _NO_GAIN.format(alone))
    return replace(found, layouts=layouts, rows=rows, notes=notes)


def _nothing_smoothed(rows: Sequence[RegionRow]) -> str:
    listed = "; ".join(f"{row.name}: {row.reason}" for row in rows[:5])
    return f"smoothing was asked for and no region was smoothed. {listed}"


def _is_untouched(choice: Rebalance) -> bool:
    return choice.scale_I is None and "untouched" in choice.choice


def _regions(
    watched: Watched, widths: dict[str, int], layouts: Mapping[str, Layout], *, permutes: bool
) -> list[Region]:
    if permutes:
        regions = same_tensor_regions(watched.trace, widths)
    else:
        regions = find_regions(watched.trace, widths)
    found = {name for region in regions for name in region.layers}
    late = "it did not run on the first batch, which is the one that is traced"
    return regions + [
        Region((name,), width, {name: torch.arange(width)}, layouts, reason=late)
        for name, width in widths.items()
        if name not in found
    ]


def decide(model: nn.Module, region: Region, watched: Watched, methods: Methods) -> Rebalance | Search:
    """What the balance method says of one region: figures per channel of the region, [width]; or its search for it."""
    seen = {name: watched.ranges[name].absmax for name in region.layers if watched.ranges[name].seen}
    if not seen:
        return Rebalance(None, {})
    absmax_S = largest_per_channel(region, seen)
    weights = [_columns(model, region, name) for name in region.layers]
    decided: Rebalance | Search = methods.balance(absmax_S, weights, **methods.balance_options)  # type: ignore[misc]
    return decided


def largest_per_channel(region: Region, figures: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Figures per input channel of layers, joined to one per channel of the region: the largest."""
    device = next(iter(figures.values())).device
    largest_S = torch.zeros(region.width, device=device)
    for name, figure_I in figures.items():
        index_I = region.index[name].to(device)
        largest_S.scatter_reduce_(0, index_I, figure_I.to(device, torch.float32), "amax")
    return largest_S


def _columns(model: nn.Module, region: Region, name: str) -> torch.Tensor:
    """A layer's weight as [R, width]: what multiplies each channel of the region."""
    weight, layout = model.get_submodule(name).get_parameter("weight").detach(), region.layouts[name]
    index_I = region.index[name]
    if len(index_I) == region.width and torch.equal(index_I, torch.arange(region.width)):
        return layout.columns(weight)
    return largest_per_channel(region, {name: layout.input_absmax(weight)}).unsqueeze(0)


def _scaled(
    model: nn.Module, regions: list[Region], decided: dict[str, Rebalance], watched: Watched, widths: dict[str, int]
) -> Balanced:
    with without_cache(model):
        failed = prove(model, watched.source.runs(), regions, narrowest=watched.trace.narrowest)
    scales: dict[str, torch.Tensor] = {}
    row_factors: dict[str, torch.Tensor] = {}
    multiplied: set[str] = set()
    folds: list[tuple[Fold, torch.Tensor]] = []
    rows: list[RegionRow] = []
    for region in regions:
        scale_S, choice = decided[region.name].scale_I, decided[region.name].choice
        if scale_S is None:
            left = _is_untouched(decided[region.name])
            why = "leaving it alone had the least loss" if left else "the method left it alone"
            why, curve = _why_skipped(region, watched, why), decided[region.name].curve
            rows.append(RegionRow(region.name, region.layers, "skipped", why, None, curve))
            continue
        scales |= {name: scale_S[index.to(scale_S.device)] for name, index in region.index.items()}
        fold, reason = Fold(model, region), failed.get(region.name) or region.reason
        if not reason and fold.loses(scale_S):
            reason = "the fold would lose precision in the type of the parameters"
        if reason:
            multiplied |= set(region.layers)
        else:
            folds.append((fold, scale_S))
            for name, factor_O in fold.row_factors(scale_S).items():
                row_factors[name] = row_factors.get(name, 1.0) * factor_O
        status, why = ("multiplied", reason) if reason else ("folded", f"into {region.into}")
        curve = decided[region.name].curve
        rows.append(RegionRow(region.name, region.layers, status, why, choice.get("alpha"), curve))
    return Balanced(scales, frozenset(multiplied), tuple(folds), row_factors, rows=tuple(rows))


def _permuted(
    model: nn.Module, regions: list[Region], decided: dict[str, Rebalance], watched: Watched, widths: dict[str, int]
) -> Balanced:
    perms: dict[str, torch.Tensor] = {}
    indexed: set[str] = set()
    outputs: dict[str, torch.Tensor] = {}
    rows: list[RegionRow] = []
    for region in regions:
        perm_I = decided[region.name].perm_I
        if perm_I is None:
            reason = _why_skipped(region, watched, "no two outlier channels share a pair")
            rows.append(RegionRow(region.name, region.layers, "skipped", reason, None))
            continue
        perms |= dict.fromkeys(region.layers, perm_I)
        values = {watched.trace.root(value) for name in region.layers for value in watched.trace.calls.get(name, [])}
        producers = row_producers(watched.trace, values.pop(), region.layers, widths.keys()) if len(values) == 1 else ()
        free = producers and not set(producers) & set(outputs)
        if free and prove_permutation(model, watched.source.runs(), producers, region.layers, perm_I):
            outputs |= dict.fromkeys(producers, perm_I)
            rows.append(
                RegionRow(region.name, region.layers, "folded", f"into the rows of {', '.join(producers)}", None)
            )
        else:
            indexed |= set(region.layers)
            reason = "the order is an index at run time: no matrix layers whose rows could be moved compute its tensor"
            rows.append(RegionRow(region.name, region.layers, "indexed", reason, None))
    return Balanced(perms=perms, indexed=frozenset(indexed), outputs=outputs, rows=tuple(rows))


def _why_skipped(region: Region, watched: Watched, method: str) -> str:
    return method if any(watched.ranges[name].seen for name in region.layers) else _UNSEEN


def _why_left_out(plan: LayerPlan, ran: Collection[str], *, permutes: bool) -> str:
    if plan.name not in ran:
        return _UNSEEN
    return _NO_ORDER if permutes and plan.channels.spatial else ""
