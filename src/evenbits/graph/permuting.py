"""Folding a permutation of channels into the rows of the layers that compute them.

Elementwise operations commute with a permutation, so the channels of fc2's input in fc2(gelu(fc1(x))), or of down's in
down(silu(gate(x)) · up(x)), can be put in another order by moving the rows of fc1, or of gate and up. The trace shows
whether a value comes from matrix layers through elementwise operations only and is read by nobody else; a forward with
the permutation applied to the producers' outputs and undone at the readers' inputs has to give the same output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from evenbits.graph.folding import float_outputs, outputs_equal
from evenbits.graph.regions import foreign_reader
from evenbits.graph.trace import Ref, Trace

_UNARY = frozenset(
    f"aten.{name}" for name in ("relu", "gelu", "silu", "tanh", "sigmoid", "hardtanh", "leaky_relu", "elu", "mish")
)
_BINARY = frozenset({"aten.mul.Tensor", "aten.add.Tensor", "aten.sub.Tensor"})


def row_producers(trace: Trace, value: int, readers: Collection[str], layers: Collection[str]) -> tuple[str, ...]:
    """The matrix layers (of `layers`) whose rows are the channels of `value`, which `readers` read; () if not so."""
    found: list[str] = []
    if foreign_reader(trace, value, set(readers)) is not None:
        return ()
    pending = [value]
    while pending:
        current = pending.pop()
        index = trace.producer.get(current)
        if index is None:
            return ()
        op = trace.ops[index]
        if op.module in layers:  # what leaves a plain matrix layer is its output
            found.append(op.module)
            continue
        refs = [argument.value for argument in op.args if isinstance(argument, Ref)]
        same = all(trace.shapes[ref] == trace.shapes[current] for ref in refs)
        elementwise = same and (op.name.rpartition(".")[0] in _UNARY or op.name in _BINARY)
        if not refs or not (elementwise or trace.keeps_channels(op)):
            return ()
        if any(foreign_reader(trace, ref, set(), reading=index) is not None for ref in refs):
            return ()
        pending.extend(refs)
    return tuple(dict.fromkeys(found))


def prove_permutation(
    model: nn.Module,
    runs: Sequence[Callable[[], Any]],
    producers: Collection[str],
    readers: Collection[str],
    perm_I: torch.Tensor,
) -> bool:
    """Whether permuting the producers' outputs and undoing it at the readers' inputs leaves the output as it is."""
    inverse_I = perm_I.argsort()
    references = [float_outputs(run()) for run in runs]
    with ExitStack() as stack:
        for name in producers:
            hook = model.get_submodule(name).register_forward_hook(lambda _m, _a, y: y[..., perm_I.to(y.device)])
            stack.callback(hook.remove)
        for name in readers:
            hook = model.get_submodule(name).register_forward_pre_hook(_rearranged(inverse_I), with_kwargs=True)
            stack.callback(hook.remove)
        return all(
            bool(reference) and outputs_equal(reference, float_outputs(run()))
            for run, reference in zip(runs, references, strict=True)
        )


def _rearranged(order_I: torch.Tensor) -> Callable[..., Any]:
    def change(value: Any) -> Any:
        return value[..., order_I.to(value.device)] if isinstance(value, torch.Tensor) else value

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(change(arg) for arg in args), {name: change(value) for name, value in kwargs.items()}

    return hook
