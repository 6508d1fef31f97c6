"""One balance per region: a scale that is folded or multiplied, or an order of channels that is folded or indexed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from evenbits.algorithms.base import Rebalance
from evenbits.errors import EvenbitsError
from evenbits.graph.folding import Fold, prove
from evenbits.graph.permuting import prove_permutation, row_producers
from evenbits.graph.regions import Region, find_regions
from evenbits.pipeline.methods import Methods
from evenbits.pipeline.plan import LayerPlan, weight_OI
from evenbits.pipeline.result import RegionRow
from evenbits.pipeline.watch import Watched


@dataclass(frozen=True)
class Balanced:
    """What was decided for the layers' inputs and outputs.

    scales: layer → s [I]; multiplied: layers that must divide their input by s themselves; folds: the others'.
    perms: layer → order of its input channels [I]; indexed: layers that must put them in order themselves.
    outputs: layer → order of its output channels [O], because a reader's order was folded into it.
    """

    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    multiplied: frozenset[str] = frozenset()
    folds: tuple[tuple[Fold, torch.Tensor], ...] = ()
    perms: dict[str, torch.Tensor] = field(default_factory=dict)
    indexed: frozenset[str] = frozenset()
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: tuple[RegionRow, ...] = ()
    notes: tuple[str, ...] = ()

    def delivered(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The float model's input of a layer as the balanced model delivers it, before what the layer does itself."""
        if name in self.scales and name not in self.multiplied:
            x = x / self.scales[name].to(x.device, x.dtype)
        if name in self.perms and name not in self.indexed:
            x = x[..., self.perms[name].to(x.device)]
        return x

    def seen(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The float model's input of a layer as the layer's quantizer and weight meet it."""
        if name in self.scales:
            x = x / self.scales[name].to(x.device, x.dtype)
        return x[..., self.perms[name].to(x.device)] if name in self.perms else x


def balance(model: nn.Module, plans: list[LayerPlan], watched: Watched, methods: Methods) -> Balanced:
    """Balances every region of the planned layers. Raises EvenbitsError if there is none."""
    if methods.balance is None:
        return Balanced()
    widths = {plan.name: plan.width for plan in plans if plan.width and watched.ranges[plan.name].seen}
    regions = _regions(watched, widths)
    decided = {region.name: _decide(model, region, watched, methods) for region in regions}
    unsmoothed = (*_unsmoothed(plans, watched), *skipped_convolutions(plans))
    if not regions:
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in unsmoothed[:5])
        raise EvenbitsError(f"smoothing was asked for and no region was smoothed. {reasons}")
    if any(choice.scale_I is not None for choice in decided.values()):
        found = _scaled(model, regions, decided, watched)
    else:
        found = _permuted(model, regions, decided, watched, widths)
    return replace(found, rows=(*found.rows, *unsmoothed))


def _decide(model: nn.Module, region: Region, watched: Watched, methods: Methods) -> Rebalance:
    absmax_I = torch.stack([watched.ranges[name].absmax for name in region.layers]).amax(dim=0)
    weights = [weight_OI(model.get_submodule(name)) for name in region.layers]
    decided: Rebalance = methods.balance(absmax_I, weights, **methods.balance_options)  # type: ignore[misc]
    return decided


def _scaled(model: nn.Module, regions: list[Region], decided: dict[str, Rebalance], watched: Watched) -> Balanced:
    candidates = [(region, Fold(model, region.producer)) for region in regions if region.producer is not None]
    failed = prove(model, watched.source.runs(), candidates)
    folds = {region.name: fold for region, fold in candidates if region.name not in failed}
    scales: dict[str, torch.Tensor] = {}
    multiplied: set[str] = set()
    applied: list[tuple[Fold, torch.Tensor]] = []
    rows: list[RegionRow] = []
    for region in regions:
        scale_I, alpha = decided[region.name].scale_I, decided[region.name].choice.get("alpha")
        if scale_I is None:
            rows.append(RegionRow(region.name, region.layers, "skipped", "the method left it alone", alpha))
            continue
        scales |= dict.fromkeys(region.layers, scale_I)
        if region.name in folds and folds[region.name].loses(scale_I):
            failed[region.name] = "the fold would lose precision in the type of the norm's parameters"
            del folds[region.name]
        if region.name in folds:
            applied.append((folds[region.name], scale_I))
            status, reason = "folded", f"into {region.producer.gain}" if region.producer else ""
        else:
            multiplied |= set(region.layers)
            status, reason = "multiplied", failed.get(region.name) or region.reason
        rows.append(RegionRow(region.name, region.layers, status, reason, alpha))
    return Balanced(scales, frozenset(multiplied), tuple(applied), rows=tuple(rows))


def _permuted(
    model: nn.Module,
    regions: list[Region],
    decided: dict[str, Rebalance],
    watched: Watched,
    widths: dict[str, int],
) -> Balanced:
    perms: dict[str, torch.Tensor] = {}
    indexed: set[str] = set()
    outputs: dict[str, torch.Tensor] = {}
    rows: list[RegionRow] = []
    for region in regions:
        perm_I = decided[region.name].perm_I
        if perm_I is None:
            rows.append(RegionRow(region.name, region.layers, "skipped", "no two outlier channels share a pair", None))
            continue
        perms |= dict.fromkeys(region.layers, perm_I)
        values = {watched.trace.root(value) for name in region.layers for value in watched.trace.calls.get(name, [])}
        producers = row_producers(watched.trace, values.pop(), region.layers, set(widths)) if len(values) == 1 else ()
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


def _regions(watched: Watched, widths: dict[str, int]) -> list[Region]:
    regions = find_regions(watched.trace, widths)
    found = {name for region in regions for name in region.layers}
    late = "it did not run on the first batch, which is the one that is traced"
    return regions + [Region((name,), width, None, late) for name, width in widths.items() if name not in found]


def _unsmoothed(plans: list[LayerPlan], watched: Watched) -> tuple[RegionRow, ...]:
    reason = "did not run on the calibration data: no statistics"
    names = [plan.name for plan in plans if plan.width and not watched.ranges[plan.name].seen]
    return tuple(RegionRow(name, (name,), "skipped", reason, None) for name in names)


def skipped_convolutions(plans: list[LayerPlan]) -> tuple[RegionRow, ...]:
    """A line for each quantized convolution: this version smooths matrix layers only."""
    names = [plan.name for plan in plans if plan.kind == "Conv2d" and not plan.reason]
    return tuple(RegionRow(n, (n,), "skipped", "convolutions are not smoothed in this version", None) for n in names)
