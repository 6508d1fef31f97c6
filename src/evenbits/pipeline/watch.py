"""What calibration learns: the data flow (one traced forward) and the input ranges of every layer (all batches)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import nn

from evenbits.graph.trace import Trace, trace
from evenbits.observers.calibrate import channel_ranges
from evenbits.observers.channel_range import ChannelRange
from evenbits.observers.second_moment import SecondMoment
from evenbits.pipeline.batches import Batches
from evenbits.pipeline.methods import Methods
from evenbits.pipeline.plan import LayerPlan, outside_readers, unwatched_readers
from evenbits.pipeline.rehearse import rehearse
from evenbits.schemes.scheme import Scheme


@dataclass(frozen=True)
class Watched:
    """The trace of the first batch, the input ranges over all batches, and how many batches there were."""

    trace: Trace
    ranges: Mapping[str, ChannelRange]
    source: Batches
    moments: Mapping[str, SecondMoment] = field(default_factory=dict)

    @property
    def batches(self) -> int:
        return self.source.count


def watch(
    model: nn.Module, plans: list[LayerPlan], batches: Batches | None, scheme: Scheme, methods: Methods
) -> tuple[list[LayerPlan], Watched | None]:
    """Runs the calibration. Returns what was seen, and the plans with reasons added for layers that must stay float."""
    if batches is None:
        return plans, None
    dims = {plan.name: plan.channels.channel_dim for plan in plans if not plan.reason}
    wanted = "second_moment" in methods.weight.needs | methods.weight.uses
    moments = {name: SecondMoment() for name in dims} if wanted else None
    ranges = channel_ranges(model, dims, batches.run_all, moments)
    first = batches.runs()[0]
    layers = {plan.name: plan.layout for plan in plans if plan.layout is not None}
    with without_cache(model):
        flow, bare = trace(model, first, layers), trace(model, first, {}, hooks=False)
    open_plans = [plan for plan in plans if not plan.reason]
    blocked = outside_readers(flow, open_plans) | unwatched_readers(flow, bare, open_plans)
    formats = {plan.name: scheme.of(plan.name).weights for plan in open_plans if plan.name not in blocked}
    blocked |= rehearse(model, formats, first)
    unseen = dict.fromkeys(dims, "did not run on the calibration data: no activation scale")
    blocked |= {name: reason for name, reason in unseen.items() if scheme.of(name).static and not ranges[name].seen}
    plans = [replace(plan, reason=plan.reason or blocked.get(plan.name, "")) for plan in plans]
    return plans, Watched(flow, ranges, batches, moments or {})


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Turns a Hugging Face model's key-value cache off: its tensors would count as outputs, and what a cache holds is
    the model's own affair."""
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True
