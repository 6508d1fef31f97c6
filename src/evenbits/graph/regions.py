"""Regions: one tensor and everything that reads it.

A layer's input is followed back through views and copies to the value where it was computed. Layers that read the same
value belong to one region and must be smoothed with one s. A layer that ran several times on different values joins
their regions. A region may be folded into its producer only if the trace shows that

    * one operation computed the value and multiplied it by a per-channel parameter (a norm's gain) used nowhere else,
    * every reader of the value is a layer of the region,
    * the value is not written in place and does not leave the model.

Anything else is a reason, kept as text: the region is then served by an explicit multiply.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from evenbits.graph.trace import Op, Ref, Trace


@dataclass(frozen=True)
class Producer:
    """Parameters (by name) that carry the value's per-channel gain: dividing them by s divides the value by s.

    gain: the multiplier, used as (offset + gain) (offset 1 for norms written as 1 + w); shift: the added bias, or None.
    """

    gain: str
    shift: str | None
    offset: float


@dataclass(frozen=True)
class Region:
    """Layers that read one tensor of `width` channels; `producer` if the trace allows a fold, else `reason`."""

    layers: tuple[str, ...]
    width: int
    producer: Producer | None
    reason: str
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _joined(self.layers))


def find_regions(trace: Trace, widths: Mapping[str, int]) -> list[Region]:
    """Regions of the layers in `widths` (name → input channels) that ran in `trace`, in order of first use."""
    roots = {name: {trace.root(value) for value in trace.calls.get(name, [])} for name in widths}
    regions: list[Region] = []
    for names, values in _components({name: values for name, values in roots.items() if values}):
        width = widths[names[0]]
        if len(values) > 1:
            reason = "a layer of it reads several tensors (it runs more than once)"
            regions.append(Region(names, width, None, reason))
            continue
        producer, reason = _producer(trace, next(iter(values)), set(names), width)
        regions.append(Region(names, width, producer, reason))
    return regions


def _components(roots: Mapping[str, set[int]]) -> list[tuple[tuple[str, ...], set[int]]]:
    found: list[tuple[list[str], set[int]]] = []
    for name, values in roots.items():
        touching = [component for component in found if component[1] & values]
        merged = ([n for c in touching for n in c[0]] + [name], set(values).union(*(c[1] for c in touching)))
        position = found.index(touching[0]) if touching else len(found)
        found = [component for component in found if component not in touching]
        found.insert(position, merged)
    return [(tuple(names), values) for names, values in found]


def _producer(trace: Trace, value: int, layers: set[str], width: int) -> tuple[Producer | None, str]:
    index = trace.producer.get(value)
    if index is None:
        return None, "its tensor comes from outside the model"
    op = trace.ops[index]
    producer = _norm_gain(trace, op, width) or _scaled_by_parameter(trace, op, value, width)
    if producer is None:
        return None, f"computed by {_short(op)}, which has no per-channel gain to fold into"
    other = foreign_reader(trace, value, layers)
    if other is not None:
        return None, other
    return producer, ""


def foreign_reader(trace: Trace, value: int, layers: set[str], reading: int | None = None) -> str | None:
    """Why the value cannot be changed under its readers, or None. Layers and the operation `reading` may read it."""
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
            if index == reading or _inside(op.module, layers):
                continue
            if not trace.keeps_channels(op) or op.args[0] != Ref(current):
                return f"its tensor is also read by {_short(op)} in {op.module or 'the model'}"
            pending.extend(op.outputs)
    return None


def _inside(module: str, layers: set[str]) -> bool:
    return module in layers


def _norm_gain(trace: Trace, op: Op, width: int) -> Producer | None:
    base = op.name.rpartition(".")[0]
    if base not in ("aten.native_layer_norm", "aten._fused_rms_norm", "aten.rms_norm"):
        return None
    if len(op.args) < 3 or op.args[1] != (width,):
        return None
    gain = _parameter(trace, op.args[2])
    has_shift = base == "aten.native_layer_norm" and len(op.args) > 3 and op.args[3] is not None
    shift = _parameter(trace, op.args[3]) if has_shift else None
    if gain is None or (has_shift and shift is None):
        return None
    return Producer(gain, shift, 0.0)


def _scaled_by_parameter(trace: Trace, op: Op, value: int, width: int) -> Producer | None:
    if op.name != "aten.mul.Tensor" or len(op.args) != 2 or not all(isinstance(a, Ref) for a in op.args):
        return None
    for argument in op.args:
        if trace.shapes[argument.value] != (width,):
            continue
        if gain := _parameter(trace, argument):
            return Producer(gain, None, 0.0)
        origin = trace.producer.get(trace.root(argument.value))
        if origin is None or len(trace.readers.get(argument.value, [])) != 1:
            continue
        add = trace.ops[origin]
        constants = [a for a in add.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
        if add.name == "aten.add.Tensor" and len(add.args) == 2 and constants:
            gain = next((name for a in add.args if (name := _parameter(trace, a))), None)
            if gain is not None:
                return Producer(gain, None, float(constants[0]))
    return None


def _parameter(trace: Trace, argument: object) -> str | None:
    """The name of the parameter behind an argument, if it has one name and one reader; else None."""
    if not isinstance(argument, Ref):
        return None
    value = argument.value
    while True:
        if len(trace.readers.get(value, [])) != 1:
            return None
        names = trace.parameters.get(value)
        if names is not None:
            return names[0] if len(names) == 1 else None
        index = trace.producer.get(value)
        if index is None or not trace.keeps_channels(trace.ops[index]):
            return None
        value = trace.ops[index].args[0].value


def _short(op: Op) -> str:
    return op.name.removeprefix("aten.").partition(".")[0]


def _joined(names: tuple[str, ...]) -> str:
    """`a.b.{q,k,v}` for layers with one parent, else the names separated by commas."""
    parents = Counter(name.rpartition(".")[0] for name in names)
    if len(names) > 1 and len(parents) == 1:
        parent = next(iter(parents))
        inner = ",".join(name.rpartition(".")[2] for name in names)
        return f"{parent}.{{{inner}}}" if parent else f"{{{inner}}}"
    return ",".join(names)
