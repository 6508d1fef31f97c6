"""Chains of bytes: static convolutions handed from one to the next as uint8, with ReLU and addition inside.

A quantized convolution between float tensors spends its gain on conversions. `fuse` symbolically traces the model
(torch.fx), joins each convolution with the addition and the ReLU or ReLU6 behind it, and lets tensors between them stay
codes on the grid of the convolution that reads them. Additions are done on codes, too: the one thing that is rounded
more often than in the model before, which the returned agreement shows.

BatchNorm has to be folded before quantization (`quantize` does it); a smoothing that had to become an explicit multiply
ends a chain, and the report says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from evenbits.errors import EvenbitsError
from evenbits.evaluation.running import evaluation_mode
from evenbits.kernels.conv_u8 import from_bytes, max_pool_u8, report_conv, to_bytes
from evenbits.nn.base import QuantizedLayer
from evenbits.nn.conv_u8 import Grid, U8Conv2d
from evenbits.numerics.metrics import RunningError
from evenbits.pipeline.batches import Batches
from evenbits.pipeline.patterns import Group, byte_groups, is_max_pool, passes, pool_arguments


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


def fuse(model: nn.Module, data: Iterable[Any]) -> Fused:
    """A byte-chain version of a model quantized with static int8 activations. The given model is left as it is; what
    is not changed is shared with it.

    data: a few batches as for `quantize`; ranges of added tensors are taken from them. Raises EvenbitsError if the
    model cannot be traced symbolically, or no two convolutions can be chained.
    """
    with evaluation_mode(model):
        graph = _graph(model)
        groups, apart = byte_groups(model, graph)
        if not any(group.grid_out for group in groups):
            reasons = "; ".join(f"{name}: {why}" for name, why in list(apart.items())[:5])
            raise EvenbitsError(f"no convolution hands bytes to another one. {reasons or 'There is none.'}")
        batches = Batches(model, data, progress=False)
        ranges = _ranges(model, graph, [g for g in groups if g.needs_range], batches)
        fused = _Builder(model, graph, groups, ranges).build()
        error = RunningError()
        for batch in batches.kept:
            with torch.no_grad():
                error.add(_call(model, batch), _call(fused, batch))
    rows = [_row(group) for group in groups] + [ChainRow(name, "apart", why) for name, why in apart.items()]
    backend, why = report_conv(next(model.buffers()).device.type)
    return Fused(fused.eval(), tuple(rows), error.sqnr_db, f"{backend} ({why})")


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


def _row(group: Group) -> ChainRow:
    inside = [
        *(["addition"] if group.addend is not None else []),
        *([group.activation] if group.activation != "none" else []),
    ]
    return ChainRow(group.name, "u8" if group.grid_out else "float out", " and ".join(inside))


def _call(model: nn.Module, batch: Any) -> torch.Tensor:
    if isinstance(batch, dict):
        found = model(**batch)
    else:
        found = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    if not isinstance(found, torch.Tensor):
        raise EvenbitsError(
            f"byte chains are for models that return one tensor; this one returns {type(found).__name__}."
        )
    return found


def _ranges(model: nn.Module, graph: fx.Graph, groups: list[Group], batches: Batches) -> dict[fx.Node, Grid]:
    """Grids of tensors that only additions read: they span what the batches show."""
    wanted = {group.end for group in groups}
    if not wanted:
        return {}
    seen: dict[fx.Node, tuple[float, float]] = {}

    class _Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in wanted:
                low, high = seen.get(n, (0.0, 0.0))
                seen[n] = min(low, float(value.min())), max(high, float(value.max()))
            return value

    watch = _Watch(fx.GraphModule(model, graph))
    for batch in batches.kept:
        given = (
            batch
            if isinstance(batch, (tuple, list))
            else tuple(batch.values())
            if isinstance(batch, dict)
            else (batch,)
        )
        with torch.no_grad():
            watch.run(*given)
    return {node: _spanning(low, high) for node, (low, high) in seen.items()}


def _spanning(low: float, high: float) -> Grid:
    scale = (high - low) / 255 or 1.0
    return Grid(scale, round(-low / scale))


class _Builder:
    """Writes the new graph: every value is a float node, a byte node on a grid, or both."""

    def __init__(self, model: nn.Module, graph: fx.Graph, groups: list[Group], grids: dict[fx.Node, Grid]) -> None:
        self.model, self.graph = model, graph
        self.by_end = {group.end: group for group in groups}
        self.inner = {node for group in groups for node in group.inner}
        self.grids = grids
        self.new = fx.Graph()
        self.floats: dict[fx.Node, fx.Node] = {}
        self.bytes: dict[fx.Node, tuple[fx.Node, Grid]] = {}
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
        x = self._as_bytes(group.source, group.grid_in)
        args: tuple[fx.Node, ...] = (x,)
        addend = None
        if group.addend is not None:
            known = self.bytes.get(group.addend)
            addend = known[1] if known else self.grids.get(group.addend) or group.grid_out or group.grid_in
            args = (x, self._as_bytes(group.addend, addend))
        out = group.grid_out or self.grids.get(group.end)
        name = group.name.replace(".", "_") + "_u8"
        self.made[name] = U8Conv2d(group.layer, group.activation, out, addend)
        node = self.new.call_module(name, args)
        if out is None:
            self.floats[group.end] = node
        else:
            self.bytes[group.end] = (node, out)

    def _plain(self, node: fx.Node) -> None:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source in self.bytes and passes(self.model, node):
            self.bytes[node] = self.bytes[source]
            return
        if source in self.bytes and is_max_pool(self.model, node):
            code, grid = self.bytes[source]
            self.bytes[node] = (self.new.call_function(max_pool_u8, (code, *pool_arguments(self.model, node))), grid)
            return
        self.floats[node] = self.new.node_copy(node, self._as_float)

    def _as_float(self, node: fx.Node) -> fx.Node:
        if node not in self.floats:
            code, grid = self.bytes[node]
            self.floats[node] = self.new.call_function(from_bytes, (code, grid.scale, grid.zero))
        return self.floats[node]

    def _as_bytes(self, node: fx.Node, grid: Grid) -> fx.Node:
        known = self.bytes.get(node)
        if known is not None and known[1] == grid:
            return known[0]
        made = self.new.call_function(to_bytes, (self._as_float(node), grid.scale, grid.zero))
        if known is None:
            self.bytes[node] = (made, grid)
        return made


def _member(model: nn.Module, name: str) -> Any:
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part)
    return found
