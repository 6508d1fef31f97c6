"""One smoothing per region: found in the trace, proved, scaled by the balance method, folded or multiplied."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from evenbits.errors import EvenbitsError
from evenbits.graph.folding import Fold, prove
from evenbits.graph.regions import Region, find_regions
from evenbits.pipeline.methods import Methods
from evenbits.pipeline.plan import LayerPlan, weight_OI
from evenbits.pipeline.result import RegionRow
from evenbits.pipeline.watch import Watched


@dataclass(frozen=True)
class Balanced:
    """scales: layer → s [I]; multiplied: layers that must divide their input by s themselves; folds: the others'."""

    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    multiplied: frozenset[str] = frozenset()
    folds: tuple[tuple[Fold, torch.Tensor], ...] = ()
    rows: tuple[RegionRow, ...] = ()
    notes: tuple[str, ...] = ()


def balance(model: nn.Module, plans: list[LayerPlan], watched: Watched, methods: Methods) -> Balanced:
    """Smooths every region of the planned layers. Raises EvenbitsError if there is none to smooth."""
    if methods.balance is None:
        return Balanced()
    widths = {plan.name: plan.width for plan in plans if plan.width and watched.ranges[plan.name].seen}
    regions = _regions(watched, widths)
    candidates = [(region, Fold(model, region.producer)) for region in regions if region.producer is not None]
    failed = prove(model, watched.source.runs(), candidates)
    folds = {region.name: fold for region, fold in candidates if region.name not in failed}

    scales: dict[str, torch.Tensor] = {}
    multiplied: set[str] = set()
    applied: list[tuple[Fold, torch.Tensor]] = []
    rows: list[RegionRow] = []
    for region in regions:
        absmax_I = torch.stack([watched.ranges[name].absmax for name in region.layers]).amax(dim=0)
        weights = [weight_OI(model.get_submodule(name)) for name in region.layers]
        decided = methods.balance(absmax_I, weights, **methods.balance_options)
        scales |= dict.fromkeys(region.layers, decided.scale_I)
        if region.name in folds and folds[region.name].loses(decided.scale_I):
            failed[region.name] = "the fold would lose precision in the type of the norm's parameters"
            del folds[region.name]
        if region.name in folds:
            applied.append((folds[region.name], decided.scale_I))
            status, reason = "folded", f"into {region.producer.gain}" if region.producer else ""
        else:
            multiplied |= set(region.layers)
            status, reason = "multiplied", failed.get(region.name) or region.reason
        rows.append(RegionRow(region.name, region.layers, status, reason, decided.choice.get("alpha")))
    rows += _unsmoothed(plans, watched)
    if not scales:
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in (*rows, *skipped_convolutions(plans))[:5])
        raise EvenbitsError(f"smoothing was asked for and no region was smoothed. {reasons}")
    return Balanced(scales, frozenset(multiplied), tuple(applied), tuple(rows))


def _regions(watched: Watched, widths: dict[str, int]) -> list[Region]:
    regions = find_regions(watched.trace, widths)
    found = {name for region in regions for name in region.layers}
    late = "it did not run on the first batch, which is the one that is traced"
    return regions + [Region((name,), width, None, late) for name, width in widths.items() if name not in found]


def _unsmoothed(plans: list[LayerPlan], watched: Watched) -> list[RegionRow]:
    reason = "did not run on the calibration data: no statistics"
    names = [plan.name for plan in plans if plan.width and not watched.ranges[plan.name].seen]
    return [RegionRow(name, (name,), "skipped", reason, None) for name in names]


def skipped_convolutions(plans: list[LayerPlan]) -> tuple[RegionRow, ...]:
    """A line for each quantized convolution: this version smooths matrix layers only."""
    names = [plan.name for plan in plans if plan.kind == "Conv2d" and not plan.reason]
    return tuple(RegionRow(n, (n,), "skipped", "convolutions are not smoothed in this version", None) for n in names)
