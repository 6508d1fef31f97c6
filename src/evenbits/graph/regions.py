"""Regions: one tensor and everything that reads it, or several tensors that must be scaled alike.

Layers that read the same tensor, and a layer's own several inputs, must be smoothed with one s: they are a region. It
can be folded if every channel of it is the free variable of sources that can be changed (channels.py): gains and biases
of norms, rows of matrix layers. Then all layers that share a variable belong together, through residual additions and
concatenations, and everything that reads such a channel is scaled back: layers, quantized or not, and matrices of none.

Anything else is a reason, kept as text: the region is then served by an explicit multiply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from evenbits.graph.channels import ChannelFlow
from evenbits.graph.trace import Op, Ref, Trace
from evenbits.graph.variables import Source
from evenbits.nn.layout import Layout


@dataclass(frozen=True, eq=False)
class Part:
    """A source of a region: its channel i is divided by s[index_C[i]], where index_C[i] is not −1."""

    source: Source
    index_C: torch.Tensor


@dataclass(frozen=True, eq=False)
class Region:
    """Layers that are smoothed with one s of `width` channels.

    index: layer → int64 [I], which of the `width` channels each of its input channels is.
    parts: where s can be folded in; empty if it cannot, for the `reason`.
    compensated: further layers (not to be quantized) that read the same channels, with their index (−1: another).
    matrices: parameters of no layer that read them (channels.py), with their index and the dimension it lies along.
    layouts: of every layer that is named here.
    """

    layers: tuple[str, ...]
    width: int
    index: Mapping[str, torch.Tensor]
    layouts: Mapping[str, Layout]
    parts: tuple[Part, ...] = ()
    compensated: Mapping[str, torch.Tensor] = field(default_factory=dict)
    matrices: Mapping[str, tuple[torch.Tensor, int]] = field(default_factory=dict)
    reason: str = ""

    @property
    def name(self) -> str:
        return joined(self.layers)

    @property
    def into(self) -> str:
        """What it is folded into, in words."""
        rows = [part.source.name for part in self.parts if part.source.rows]
        gains = dict.fromkeys(part.source.name.rpartition(".")[0] for part in self.parts if not part.source.rows)
        words = [joined(gains)] if gains else []
        return " and ".join([*words, f"the rows of {joined(rows)}"] if rows else words)


def find_regions(trace: Trace, widths: Mapping[str, int]) -> list[Region]:
    """Regions of the layers in `widths` (name → input channels) that ran in `trace`, in order of first use."""
    flow = trace.flow
    groups = _same_tensor(trace, {name: trace.calls[name] for name in trace.calls if name in widths})
    reasons = _reasons(trace, groups)
    free = [group for group in groups if not reasons[group]]
    found = _joined_by_channels(flow, free)
    found += [_multiplied(trace, group, widths, reasons[group]) for group in groups if reasons[group]]
    order = {name: position for position, name in enumerate(trace.calls)}
    return sorted(found, key=lambda region: order[region.layers[0]])


def _same_tensor(trace: Trace, calls: Mapping[str, list[int]]) -> list[tuple[str, ...]]:
    """Layers in groups: those that read one tensor."""
    roots = {}
    for name, values in calls.items():
        spatial = trace.flow.layers[name].spatial if name in trace.flow.layers else 0
        roots[name] = {(trace.root(value, whole=spatial > 0), spatial) for value in values}
    return [names for names, _ in components(roots)]


def components(roots: Mapping[str, set[tuple[int, int]]]) -> list[tuple[tuple[str, ...], set[tuple[int, int]]]]:
    """Names whose sets touch, directly or through others, with the union of their sets; in order of first use."""
    found: list[tuple[list[str], set[tuple[int, int]]]] = []
    for name, values in roots.items():
        touching = [component for component in found if component[1] & values]
        merged = ([n for c in touching for n in c[0]] + [name], set(values).union(*(c[1] for c in touching)))
        position = found.index(touching[0]) if touching else len(found)
        found = [component for component in found if component not in touching]
        found.insert(position, merged)
    return [(tuple(names), values) for names, values in found]


def _reasons(trace: Trace, groups: list[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Why each group cannot be folded, "" if it can. What cannot be folded fixes what it shares with others."""
    flow, reasons = trace.flow, dict.fromkeys(groups, "")
    while True:
        changed = False
        for group in groups:
            if reasons[group]:
                continue
            # A layer that is quantized under a name the flow does not follow has no channels to speak of.
            channels = [flow.inputs.get(name) for name in group]
            if any(c is None or not bool(flow.variables.free(c).all()) for c in channels):
                reasons[group] = _why(trace, group)
                for c in channels:
                    if c is not None:
                        flow.variables.fix(c, f"{group[0]} reads it beside channels that cannot be scaled")
                changed = True
        if not changed:
            return reasons


def _why(trace: Trace, group: tuple[str, ...]) -> str:
    for name in group:
        channels = trace.flow.inputs.get(name)
        reason = "" if channels is None else trace.flow.variables.why_fixed(channels)
        if reason and "not scaled by anything" not in reason:
            return reason
    value = trace.root(trace.calls[group[0]][0])
    index = trace.producer.get(value)
    if index is None:
        return "its tensor comes from outside the model"
    op = trace.ops[index]
    if op.module in trace.flow.layers:
        return f"the rows of {op.module} also meet channels that nothing scales"
    return f"computed by {_short(op)}, through which no factor passes"


def _joined_by_channels(flow: ChannelFlow, groups: Iterable[tuple[str, ...]]) -> list[Region]:
    """Regions of the groups that share variables."""
    classes = {name: flow.variables.find(flow.inputs[name]) for group in groups for name in group}
    roots = {group: {(int(c), 0) for name in group for c in classes[name].unique()} for group in groups}
    regions = []
    for members, _ in components({str(i): roots[group] for i, group in enumerate(groups)}):
        by_number = dict(enumerate(groups))
        layers = tuple(name for member in members for name in by_number[int(member)])
        kinds = torch.cat([classes[name] for name in layers]).unique()
        width = len(kinds)
        index = {name: torch.searchsorted(kinds, classes[name]) for name in layers}
        parts = tuple(
            Part(source, where)
            for source in flow.sources
            if bool((where := _where(kinds, flow.variables.find(source.variables))).ge(0).any())
        )
        others = {name: c for name, c in flow.inputs.items() if name not in layers}
        compensated = _touching(flow, kinds, others)
        read = _touching(flow, kinds, {name: reader.channels_I for name, reader in flow.readers.items()})
        matrices = {name: (where, flow.readers[name].dim) for name, where in read.items()}
        regions.append(Region(layers, width, index, flow.layers, parts, compensated, matrices))
    return regions


def _touching(flow: ChannelFlow, kinds: torch.Tensor, readers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those that read a channel of `kinds`, with where each of their channels stands there (−1: not there)."""
    found = {name: _where(kinds, flow.variables.find(channels)) for name, channels in readers.items()}
    return {name: where for name, where in found.items() if bool(where.ge(0).any())}


def _where(kinds: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The position of each class in `kinds` (sorted), −1 for those that are not there."""
    at = torch.searchsorted(kinds, classes).clamp(max=len(kinds) - 1)
    return torch.where(kinds[at] == classes, at, -1)


def _multiplied(trace: Trace, group: tuple[str, ...], widths: Mapping[str, int], reason: str) -> Region:
    width = widths[group[0]]
    index = {name: torch.arange(width) for name in group}
    return Region(group, width, index, trace.flow.layers, reason=reason)


def same_tensor_regions(trace: Trace, widths: Mapping[str, int], reason: str) -> list[Region]:
    """One region for each tensor that layers of `widths` read, none of them to be folded."""
    groups = _same_tensor(trace, {name: trace.calls[name] for name in trace.calls if name in widths})
    return [_multiplied(trace, group, widths, reason) for group in groups]


def foreign_reader(trace: Trace, value: int, layers: set[str], reading: int | None = None) -> str | None:
    """Why the value cannot be rearranged under its readers, or None. Layers and the operation `reading` may read it."""
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in trace.mutated:
            return "its tensor is written in place"
        if current in trace.escaped:
            return "its tensor is an output of the model"
        for index in trace.readers.get(current, []):
            op = trace.ops[index]
            if index == reading or op.module in layers:
                continue
            if not trace.keeps_channels(op) or op.args[0] != Ref(current):
                return f"its tensor is also read by {_short(op)} in {op.module or 'the model'}"
            pending.extend(op.outputs)
    return None


def _short(op: Op) -> str:
    return op.name.removeprefix("aten.").partition(".")[0]


def joined(names: Iterable[str]) -> str:
    """`a.b.{q,k,v}` for names with one parent, `a.{0,1}.b` if one word differs, else separated by commas."""
    names = list(names)
    parts = [name.split(".") for name in names]
    if len(names) > 1 and len({len(part) for part in parts}) == 1:
        varying = [at for at, words in enumerate(zip(*parts, strict=True)) if len(set(words)) > 1]
        if len(varying) == 1:
            words = [part[varying[0]] for part in parts]
            return ".".join([*parts[0][: varying[0]], f"{{{','.join(words)}}}", *parts[0][varying[0] + 1 :]])
    return ",".join(names)
