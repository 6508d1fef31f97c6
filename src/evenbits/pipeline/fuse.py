"""Chains of bytes: static convolutions handed from one to the next as uint8, with ReLU and addition inside.

A quantized convolution between float tensors spends its gain on conversions. `fuse` symbolically traces the model
(torch.fx), joins each convolution with the addition and the ReLU or ReLU6 behind it, and lets tensors between them stay
codes on the grid of the convolution that reads them. Additions are done on codes, too: the one thing that is rounded
more often than in the model before, which the returned agreement shows.

BatchNorm has to be folded before quantization (`quantize` does it). A smoothing that had to become an explicit multiply
goes into the scales of the convolution before it: relu6(y)·m is y·m clipped to 0..6·m, a largest code per channel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from evenbits.errors import EvenbitsError
from evenbits.evaluation.running import evaluation_mode
from evenbits.kernels.conv_u8 import from_bytes, max_pool_u8, report_conv, to_bytes
from evenbits.nn.base import QuantizedLayer
from evenbits.nn.conv_u8 import Grid, PerChannel, U8Conv2d
from evenbits.numerics.metrics import RunningError
from evenbits.pipeline.batches import Batches
from evenbits.pipeline.patterns import Group, byte_groups, is_max_pool, passes, pool_arguments, same, zero_padding


@dataclass(frozen=True)
class ChainRow:
    """One convolution. status: "u8" (bytes in and out), "float out" or "apart"; with what is fused, or why not."""

    name: str
    status: str
    reason: str


@dataclass(frozen=True)
class Fused:
    """model: runs like the given one; rows: what became of each convolution; sqnr_db: agreement of the outputs with
    those of the given model on the data; backend: who computes the byte convolutions, and why."""

    model: fx.GraphModule
    rows: tuple[ChainRow, ...]
    sqnr_db: float
    backend: str

    @property
    def summary(self) -> str:
        """How many convolutions became bytes, and how far that moved the output."""
        inside = sum(row.status == "u8" for row in self.rows)
        return (
            f"byte chains: {inside} of {len(self.rows)} convolutions hand on bytes, by {self.backend}; they agree with "
            f"the quantized model to {self.sqnr_db:.1f} dB."
        )


def fuse(model: nn.Module, data: Iterable[Any]) -> Fused:
    """A byte-chain version of a model quantized with static int8 activations. The given model is left as it is; what
    is not changed is shared with it.

    data: a few batches as for `quantize`; ranges of added tensors are taken from them. Raises EvenbitsError if the
    model cannot be traced symbolically, or no two convolutions can be chained.
    """
    with evaluation_mode(model):
        graph = _graph(model)
        batches = Batches(model, data, progress=False)
        seen = _seen(model, graph, batches)
        groups, apart = byte_groups(model, graph, {node: value.shape for node, value in seen.items()})
        if not any(group.grid_out for group in groups):
            found = {group.name: group.why for group in groups if group.why} | apart
            raise EvenbitsError(f"no convolution hands bytes to another one. {_why_none(found)}")
        fused = _Builder(model, graph, groups, _ranges(groups, seen)).build().eval()
        error = RunningError()
        for batch in batches.kept:
            error.add(_output(model, batch), _output(fused, batch))
    rows = [_row(group) for group in groups] + [ChainRow(name, "apart", why) for name, why in apart.items()]
    backend, why = report_conv(next(model.buffers()).device.type)
    return Fused(fused, tuple(rows), error.sqnr_db, f"{backend} ({why})")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, QuantizedLayer) or super().is_leaf_module(m, qualified_name)


def _graph(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(model)
    except Exception as error:  # whatever Python the model runs
        raise EvenbitsError(
            f"the model cannot be traced symbolically ({type(error).__name__}: {error}); byte chains need a forward "
            "without branches on tensors. The quantized model works as it is."
        ) from error


def _why_none(apart: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in list(apart.items())[:5]) or "None reads another."


def _row(group: Group) -> ChainRow:
    inside = [
        *(["addition"] if group.addend is not None else []),
        *([group.activation] if group.activation != "none" else []),
        *(["smoothing multiply"] if group.multiplier is not None else []),
    ]
    reason = "; ".join(part for part in (" and ".join(inside), group.why) if part)
    return ChainRow(group.name, "u8" if group.grid_out else "float out", reason)


def _output(model: nn.Module, batch: Any) -> torch.Tensor:
    found = Batches(model, [batch], progress=False).run(batch)
    if not isinstance(found, torch.Tensor):
        raise EvenbitsError(
            f"byte chains are for models that return one tensor; this one returns {type(found).__name__}."
        )
    return found


@dataclass(frozen=True)
class _Value:
    """What the batches show of a tensor: its shape and type in the first one, and the range of all."""

    shape: torch.Size
    dtype: torch.dtype
    low: float
    high: float


def _seen(model: nn.Module, graph: fx.Graph, batches: Batches) -> dict[fx.Node, _Value]:
    watcher = _Watcher(model, graph)
    watching = Batches(watcher, batches.kept, progress=False)
    for batch in batches.kept:
        watching.run(batch)
    for node, value in watcher.seen.items():
        if value.dtype != torch.float32:
            raise EvenbitsError(f"byte chains are float32 outside; {node.name} is {value.dtype}. Use model.float().")
    return watcher.seen


class _Watcher(nn.Module):
    """Runs a graph node by node and remembers what its float tensors look like."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        self.module = fx.GraphModule(model, graph)
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.seen: dict[fx.Node, _Value] = {}

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Arguments by position, then by name, then by default, as the model takes them."""
        outer = self

        class _Interpreter(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                    outer.see(n, value)
                return value

        named = [kwargs.get(str(n.target), n.args[0] if n.args else None) for n in self.inputs[len(args) :]]
        _Interpreter(self.module).run(*args, *(named if kwargs else ()))

    def see(self, node: fx.Node, value: torch.Tensor) -> None:
        """Takes one tensor in."""
        known = self.seen.get(node, _Value(value.shape, value.dtype, 0.0, 0.0))
        low, high = value.aminmax()
        self.seen[node] = replace(known, low=min(known.low, float(low)), high=max(known.high, float(high)))


def _ranges(groups: list[Group], seen: dict[fx.Node, _Value]) -> dict[fx.Node, Grid]:
    """Grids of tensors that only additions read, and of what is added and was no convolution's; they span what the
    batches show."""
    ends = {group.end for group in groups}
    wanted = {group.end for group in groups if group.needs_range}
    wanted |= {group.addend for group in groups if group.addend is not None and group.addend not in ends}
    return {node: _spanning(seen[node].low, seen[node].high) for node in wanted}


def _spanning(low: float, high: float) -> Grid:
    scale = (high - low) / 255 or 1.0
    return Grid(scale, round(-low / scale))


class _Bytes(NamedTuple):
    """Codes of a tensor, on a grid, times a multiplier of its channels if there is one."""

    node: fx.Node
    grid: Grid
    multiplier: torch.Tensor | None = None


class _Builder:
    """Writes the new graph: every value is a float node, a byte node on a grid, or both.

    rounded: values whose bytes were made from floats, for convolutions; whoever reads floats gets those, as before.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, groups: list[Group], grids: dict[fx.Node, Grid]) -> None:
        self.model, self.graph = model, graph
        self.by_end = {group.end: group for group in groups}
        self.inner = {node for group in groups for node in group.inner}
        self.grids = grids
        self.new = fx.Graph()
        self.floats: dict[fx.Node, fx.Node] = {}
        self.bytes: dict[fx.Node, _Bytes] = {}
        self.rounded: set[fx.Node] = set()
        self.made: dict[str, nn.Module] = {}

    def build(self) -> fx.GraphModule:
        """The new model."""
        for node in self.graph.nodes:
            if node in self.by_end:
                self._group(self.by_end[node])
            elif node not in self.inner:
                self._plain(node)
        used = {str(n.target) for n in self.new.nodes if n.op in ("call_module", "get_attr")}
        kept = {name: _member(self.model, name) for name in used if name not in self.made}
        module = fx.GraphModule({**kept, **self.made}, self.new)
        module.recompile()
        return module

    def _group(self, group: Group) -> None:
        x = self._as_bytes(group.source, group.grid_in, group.layer.input_multiplier)
        args: tuple[fx.Node, ...] = (x,)
        addend = None
        if group.addend is not None:
            known = self.bytes.get(group.addend)
            addend = known.grid if known and known.multiplier is None else self.grids[group.addend]
            args = (x, self._as_bytes(group.addend, addend))
        out = group.grid_out or (None if group.keeps_floats else self.grids.get(group.end))
        name = self._new_name(group.name)
        self.made[name] = U8Conv2d(group.layer, group.grid_in, group.activation, out, addend, group.multiplier)
        node = self.new.call_module(name, args)
        if out is None:
            self.floats[group.end] = node
        else:
            self.bytes[group.end] = _Bytes(node, out, group.multiplier)

    def _new_name(self, name: str) -> str:
        """A name for the byte form of a convolution: one may be called twice, "a.b" and "a_b" may both be there."""
        name = name.replace(".", "_") + "_u8"
        while name in self.made or hasattr(self.model, name):
            name += "_"
        return name

    def _plain(self, node: fx.Node) -> None:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is not None and source in self.bytes and source not in self.rounded:
            known = self.bytes[source]
            if passes(self.model, node):
                self.bytes[node] = known
                return
            if is_max_pool(self.model, node):  # multipliers are positive, so they keep the order of codes
                pooled = self.new.call_function(max_pool_u8, (known.node, *pool_arguments(self.model, node)))
                self.bytes[node] = known._replace(node=pooled)
                return
            sizes = zero_padding(self.model, node)
            if sizes is not None:
                padded = self.new.call_function(F.pad, (known.node, sizes, "constant", known.grid.zero))
                self.bytes[node] = known._replace(node=padded)
                return
        views = node.op == "call_method" and node.target in ("view", "view_as")

        def taken(argument: fx.Node) -> fx.Node:  # chains are channels last, of which not every view can be taken
            floats = self._as_float(argument)
            return self.new.call_method("contiguous", (floats,)) if views and argument is node.args[0] else floats

        self.floats[node] = self.new.node_copy(node, taken)

    def _as_float(self, node: fx.Node) -> fx.Node:
        if node not in self.floats:
            code, grid, _ = self.bytes[node]  # multiplied bytes of a convolution have no readers but convolutions
            self.floats[node] = self.new.call_function(from_bytes, (code, grid.scale, grid.zero))
        return self.floats[node]

    def _as_bytes(self, node: fx.Node, grid: Grid, multiplier: torch.Tensor | None = None) -> fx.Node:
        known = self.bytes.get(node)
        if known is not None and known.grid == grid and same(known.multiplier, multiplier):
            return known.node
        floats = self._as_float(node)
        if multiplier is not None:
            name = self._new_name("multiply")
            self.made[name] = PerChannel(multiplier)
            floats = self.new.call_module(name, (floats,))
        made = self.new.call_function(to_bytes, (floats, grid.scale, grid.zero))
        if known is None:
            self.bytes[node] = _Bytes(made, grid, multiplier)
            self.rounded.add(node)
        return made


def _member(model: nn.Module, name: str) -> Any:
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part)
    return found
