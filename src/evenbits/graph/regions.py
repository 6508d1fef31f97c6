"""Regions: one tensor and everything that reads it, or several tensors that must be scaled alike.

Layers that read the same tensor, and a layer's own several inputs, must be smoothed with one s: they are a region. It
can be folded if every channel of it is the free variable of sources that can be changed (channels.py): gains and biases
of norms, rows of matrix layers. Then all layers that share a variable belong together, through residual additions and
concatenations, and everything that reads such a channel is scaled back: layers, quantized or not, and matrices of none.

Anything else is a reason, kept as text: the region is then served by an explicit multiply.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    first: dict[tuple[int, int], str] = {}  # the first name that has a value
    above = {name: name for name in roots}
    order = {name: position for position, name in enumerate(roots)}

    def top(name: str) -> str:
        while above[name] != name:
            above[name] = above[above[name]]
            name = above[name]
        return name

    for name, values in roots.items():
        for value in values:
            ends = sorted((top(name), top(first.setdefault(value, name))), key=order.__getitem__)
            above[ends[1]] = ends[0]
    found: dict[str, tuple[list[str], set[tuple[int, int]]]] = {}
    for name, values in roots.items():
        names, joint = found.setdefault(top(name), ([], set()))
        names.append(name)
        joint |= values
    return [(tuple(names), values) for names, values in found.values()]


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
    values = [value for name in group for value in trace.calls[name]]
    labels = [trace.flow.labels.get(value) for value in values]
    lost = [
        trace.flow.why_lost(v) if found is None else trace.flow.variables.why_fixed(found)
        for v, found in zip(values, labels, strict=True)
    ]
    if reason := next((text for text in lost if text and "not scaled by anything" not in text), ""):
        return reason
    if all(found is None for found in labels):
        return "its tensor comes from outside the model"
    index = trace.producer.get(trace.root(values[0]))
    module = "" if index is None else trace.ops[index].module
    if module in trace.flow.layers:
        return f"the rows of {module} also meet channels that nothing scales"
    return "some of its channels are not scaled by anything that can be changed"


def _joined_by_channels(flow: ChannelFlow, groups: Iterable[tuple[str, ...]]) -> list[Region]:
    """Regions of the groups that share variables."""
    classes = {name: flow.variables.find(flow.inputs[name]) for group in groups for name in group}
    roots = {group: {(int(c), 0) for name in group for c in classes[name].unique()} for group in groups}
    by_number = dict(enumerate(groups))
    members = [numbers for numbers, _ in components({str(i): roots[group] for i, group in by_number.items()})]
    layers = [tuple(name for number in numbers for name in by_number[int(number)]) for numbers in members]
    kinds = [torch.cat([classes[name] for name in names]).unique() for names in layers]
    owner = torch.full((len(flow.variables),), -1)  # of a class: the region whose channels it scales
    for number, classes_S in enumerate(kinds):
        owner[classes_S] = number

    def touched(variables: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """The regions that a source or reader has channels of, and where each of its channels stands there."""
        found = flow.variables.find(variables)
        for number in owner[found].unique().tolist():
            if number >= 0:
                yield number, _where(kinds[number], found)

    parts: list[list[Part]] = [[] for _ in kinds]
    compensated: list[dict[str, torch.Tensor]] = [{} for _ in kinds]
    matrices: list[dict[str, tuple[torch.Tensor, int]]] = [{} for _ in kinds]
    for source in flow.sources:
        for number, where in touched(source.variables):
            parts[number].append(Part(source, where))
    for name, channels_I in flow.inputs.items():
        for number, where in touched(channels_I) if name not in classes else ():
            compensated[number][name] = where
    for name, reader in flow.readers.items():
        for number, where in touched(reader.channels_I):
            matrices[number][name] = (where, reader.dim)
    found = []
    for i, names in enumerate(layers):
        index = {name: torch.searchsorted(kinds[i], classes[name]) for name in names}
        reason = "" if parts[i] else "its channels are zeros"
        made = tuple(parts[i]), compensated[i], matrices[i], reason
        found.append(Region(names, len(kinds[i]), index, flow.layers, *made))
    return found


def _where(kinds: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The position of each class in `kinds` (sorted), −1 for those that are not there."""
    at = torch.searchsorted(kinds, classes).clamp(max=len(kinds) - 1)
    return torch.where(kinds[at] == classes, at, -1)


def _multiplied(trace: Trace, group: tuple[str, ...], widths: Mapping[str, int], reason: str) -> Region:
    width = widths[group[0]]
    index = {name: torch.arange(width) for name in group}
    return Region(group, width, index, trace.flow.layers, reason=reason)


def same_tensor_regions(trace: Trace, widths: Mapping[str, int]) -> list[Region]:
    """One region for each tensor that layers of `widths` read, without anything to fold into."""
    groups = _same_tensor(trace, {name: trace.calls[name] for name in trace.calls if name in widths})
    return [_multiplied(trace, group, widths, "") for group in groups]


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
