"""`UnfusedAttention`: what nn.MultiheadAttention computes, made of four plain linear layers.

nn.MultiheadAttention keeps q, k and v in one parameter (`in_proj_weight`) and hands it, with out_proj's weight, to one
function: there is no layer that could be replaced, and nn.TransformerEncoderLayer reads them all (its own two linear
layers, too) in one fused operation. The unfused form computes the same with q_proj, k_proj, v_proj and out_proj, which
are found, smoothed and quantized like any others.

    q, k, v = q_proj(query), k_proj(key), v_proj(value)     per head: softmax(q·kᵀ/√d + mask)·v, joined → out_proj

The fused paths of nn.TransformerEncoderLayer and nn.TransformerEncoder ask for `in_proj_bias`, `_qkv_same_embed_dim`
and the tensors they would read. What they find here switches them off.

N: batch, L: queries, S: keys, E: embedding, h: heads, d: E/h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn import functional as F

from evenbits.errors import EvenbitsError
from evenbits.nn.views import linear_view

_PARAMETERS = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v"}


class _Unfused:
    """Stands where the fused weight was. Having `__torch_function__`, it keeps the fused paths away; whoever reads it
    all the same is told."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise EvenbitsError(
            f"{getattr(func, '__name__', func)} reads in_proj_weight, which was split into q_proj, k_proj and v_proj; "
            "keep the attention in float: add its name to the scheme's 'ignore'."
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"in_proj_weight was split into q_proj, k_proj and v_proj; it has no {name!r}.")


class UnfusedAttention(nn.Module):
    """Takes the place of an nn.MultiheadAttention: same arguments, same results, in evaluation and in training.

    Its layers' weights are views of the fused parameters: nothing is copied, and what is written into one is written
    into both. Two things differ from the fused form in evaluation: nested tensors are not taken, and so
    nn.TransformerEncoder does not zero its output at padded positions.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    bias_k: torch.Tensor | None
    bias_v: torch.Tensor | None
    in_proj_weight = _Unfused()
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = fused.embed_dim, fused.kdim, fused.vdim
        self.num_heads, self.head_dim = fused.num_heads, fused.head_dim
        self.dropout, self.batch_first, self.add_zero_attn = fused.dropout, fused.batch_first, fused.add_zero_attn
        if fused._qkv_same_embed_dim:
            weights = [(fused.in_proj_weight, rows) for rows in self._thirds()]
        else:
            separate = (fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight)
            weights = [(weight, slice(None)) for weight in separate]
        for name, (weight, rows), third in zip("qkv", weights, self._thirds(), strict=True):
            self.add_module(f"{name}_proj", linear_view(weight, fused.in_proj_bias, rows, third))
        self.out_proj = linear_view(fused.out_proj.weight, fused.out_proj.bias)
        self.bias_k, self.bias_v = fused.bias_k, fused.bias_v
        self.training = fused.training
        for layer in self.children():
            layer.training = fused.training

    def _thirds(self) -> list[slice]:
        return [slice(i * self.embed_dim, (i + 1) * self.embed_dim) for i in range(3)]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """nn.MultiheadAttention's forward: [L, N, E] (batch_first: [N, L, E]; unbatched: [L, E]) and the weights.

        Raises EvenbitsError for is_causal without a mask, and for nested tensors.
        """
        if is_causal and attn_mask is None:
            raise EvenbitsError("is_causal says that attn_mask is causal, and there is no attn_mask; pass it, too.")
        if query.is_nested or key.is_nested or value.is_nested:
            raise EvenbitsError("unfused attention takes no nested tensors; pass padded ones and key_padding_mask.")
        order, back = self._orders(batched=query.dim() == 3)
        q, k, v = self.q_proj(order(query)), self.k_proj(order(key)), self.v_proj(order(value))
        q, k, v = (self._heads(x) for x in (q, *self._extended(k, v)))
        mask = self._mask(attn_mask, key_padding_mask, q, extra=k.shape[2] - order(key).shape[1])
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            out = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if query.dim() == 3 else weights.squeeze(0)
        else:
            causal = is_causal and key_padding_mask is None
            out = F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout, causal)
        return back(self.out_proj(out.transpose(1, 2).flatten(2))), weights

    def _orders(self, *, batched: bool) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
        """How to bring an input to [N, L, E], and an output back."""
        if not batched:
            return lambda x: x.unsqueeze(0), lambda y: y.squeeze(0)
        if self.batch_first:
            return lambda x: x, lambda y: y
        return lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _extended(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [N, S, E] with the learned and the zero one behind them, if the layer has such."""
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return k, v

    def _mask(
        self, attn_mask: torch.Tensor | None, padding_mask: torch.Tensor | None, q: torch.Tensor, *, extra: int
    ) -> torch.Tensor | None:
        """Both masks as numbers to add to the scores, broadcasting to [N, h, L, S + extra]; None if there is none."""
        parts = []
        if attn_mask is not None:
            attn_mask = additive(attn_mask, q.dtype)
            per_head = attn_mask.dim() == 3
            parts.append(attn_mask.unflatten(0, (len(q), self.num_heads)) if per_head else attn_mask[None, None])
        if padding_mask is not None:
            padding = additive(padding_mask, q.dtype)
            parts.append((padding if padding.dim() == 2 else padding.unsqueeze(0))[:, None, None])
        if not parts:
            return None
        total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return F.pad(total, (0, extra)) if extra else total

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as numbers to add: True (leave out) becomes −∞. Raises EvenbitsError for masks of integers."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise EvenbitsError(f"an attention mask is of booleans or floats; given {mask.dtype}.")
    return mask.to(dtype)


def why_fused(module: nn.MultiheadAttention) -> str:
    """Why an nn.MultiheadAttention (or a subclass) must stay as it is; "" if it can be unfused."""
    if type(module).forward is not nn.MultiheadAttention.forward:
        return f"{type(module).__name__} has a forward of its own"
    own = {*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))}
    if extra := sorted((own - _PARAMETERS) | {name for name, _ in module.named_children()} - {"out_proj"}):
        return f"it carries {extra[0]!r} besides the weights of nn.MultiheadAttention"
    inner = {*dict(module.out_proj.named_parameters()), *dict(module.out_proj.named_buffers())} - {"weight", "bias"}
    return f"its out_proj carries {min(inner)!r}" if inner else ""
