"""Folding BatchNorm into the convolution or linear layer before it, the first step for nets that have it.

    y = γ·(W x + b − μ)/√(σ² + ε) + β        W' = W·γ/√(σ² + ε)        b' = (b − μ)·γ/√(σ² + ε) + β

In evaluation only, where the running statistics are constants. Which norm follows which layer is seen in the trace:
the norm's input is the layer's output, read by nothing else. Every fold is compared on the traced batch and undone if
the output differs by more than rounding.

Source: B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from evenbits.graph.rules import base_name_of
from evenbits.graph.trace import Ref, Trace
from evenbits.nn.folded import FoldedNorm
from evenbits.nn.layout import Layout
from evenbits.nn.replace import replace_modules
from evenbits.nn.unfuse import BATCH_NORMS


@dataclass(frozen=True)
class NormAfter:
    """A norm (by name) whose input is the output of `layer`, and of nothing else."""

    layer: str
    norm: str


def norms_after_layers(model: nn.Module, trace: Trace) -> list[NormAfter]:
    """The pairs that can be folded: each module ran once; the norm has running statistics, no forward hooks, and is in
    evaluation mode."""
    found, tied = [], _tied(model, trace)
    for op in trace.ops:
        if "batch_norm" not in base_name_of(op.name) or not isinstance(op.args[0], Ref):
            continue
        norm = model.get_submodule(op.module)
        value = op.args[0].value
        constant = type(norm) in BATCH_NORMS and not norm.training and norm.running_var is not None
        if not constant or norm._forward_hooks or norm._forward_pre_hooks or value in trace.escaped:
            continue
        index = trace.producer.get(value)
        layer = "" if index is None else trace.ops[index].module
        once = len(trace.calls.get(layer, [])) == 1 and len(trace.readers.get(value, [])) == 1
        if layer not in trace.flow.layers or layer in trace.flow.touched or layer in tied or not once:
            continue
        # A norm's channels are dimension 1, a layer's are counted from the end: of Linear's [N, L, O] they differ.
        aligned = len(trace.shapes[value]) + trace.flow.layers[layer].channel_dim == 1
        if aligned and _runs_once(trace, op.module):
            found.append(NormAfter(layer, op.module))
    return found


def _tied(model: nn.Module, trace: Trace) -> set[str]:
    """The modules whose weight is another module's, too: what is folded into it would change both."""
    homes = [
        [name.rpartition(".")[0] for name in names if name.endswith("weight")] for names in trace.parameters.values()
    ]
    return {home for names in homes for home in names if len({id(model.get_submodule(n)) for n in names}) > 1}


def _runs_once(trace: Trace, norm: str) -> bool:
    return sum(op.module == norm and "batch_norm" in op.name for op in trace.ops) == 1


def fold_norms(model: nn.Module, pairs: list[NormAfter], layouts: Mapping[str, Layout]) -> Callable[[], None]:
    """Folds the norms and puts FoldedNorm in their places. Returns what takes all of it back, bit for bit."""
    saved: list[tuple[nn.Module, torch.Tensor, Any]] = []

    def unfold() -> None:
        for module, weight, bias in saved:
            module.get_parameter("weight").data.copy_(weight)
            module._parameters["bias"] = bias

    try:
        for pair in pairs:
            saved.append(_fold(model, pair, layouts[pair.layer]))
    except BaseException:
        unfold()
        raise
    restore = replace_modules(model, {pair.norm: FoldedNorm() for pair in pairs})

    def undo() -> None:
        restore()
        unfold()

    return undo


def _fold(
    model: nn.Module, pair: NormAfter, layout: Layout
) -> tuple[nn.Module, torch.Tensor, nn.Parameter | torch.Tensor | None]:
    layer, norm = model.get_submodule(pair.layer), model.get_submodule(pair.norm)
    weight = layer.get_parameter("weight")
    bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]
    mean, variance = (norm.get_buffer(name).double() for name in ("running_mean", "running_var"))
    gain, shift = (None if p is None else p.detach().double() for p in (norm.weight, norm.bias))  # type: ignore[operator]
    factor_O = (variance + norm.eps).rsqrt()  # type: ignore[operator]
    factor_O = factor_O if gain is None else factor_O * gain
    before = torch.zeros_like(mean) if bias is None else bias.detach().double()
    moved_O = (before - mean) * factor_O
    moved_O = moved_O if shift is None else moved_O + shift
    kept = weight.detach().clone()
    weight.data.copy_(weight.detach().double() * layout.mount_outputs(factor_O, weight.ndim))
    layer.bias = nn.Parameter(moved_O.to(weight.dtype), requires_grad=weight.requires_grad)
    return layer, kept, bias
