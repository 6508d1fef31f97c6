"""Plain linear layers over parts of a fused parameter: nothing is copied while both forms exist.

What is written into such a layer's weight is written into the fused parameter, and the other way round. A layer that
outlives the fused form gets memory of its own (`own_memory`), so that it does not keep the whole of it alive.
"""

from __future__ import annotations

import torch
from torch import nn


def linear_view(
    weight_OI: torch.Tensor,
    bias: torch.Tensor | None,
    rows: slice | int = slice(None),
    bias_rows: slice | int = slice(None),
    *,
    turned: bool = False,
) -> nn.Linear:
    """A linear layer whose weight and bias are views of (parts of) parameters; turned: they are stored as [I, O]."""
    view = weight_OI.detach()[rows]
    view = view.t() if turned else view
    layer = nn.Linear(view.shape[1], view.shape[0], bias=bias is not None, device="meta", dtype=view.dtype)
    layer.weight = nn.Parameter(view, requires_grad=weight_OI.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach()[bias_rows], requires_grad=bias.requires_grad)
    return layer


def own_memory(module: nn.Module) -> None:
    """Copies every parameter of `module` that is a view of a larger one, or not stored row by row."""
    for parameter in module.parameters():
        if parameter.is_meta or parameter.untyped_storage().nbytes() == parameter.nbytes:
            continue
        parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
