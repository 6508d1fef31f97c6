"""The oracle of every integer kernel: exact and slow.

a_MK · b_NKᵀ with int8 operands is accumulated in int64, which holds any K (2⁶³ / 2¹⁴ columns); the result is int32 and
raises if it would not fit (|sum| ≤ 2¹⁴·K, so K > 131071 with worst-case data). M: rows, N: outputs, K: columns, G:
groups of columns that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from evenbits.errors import EvenbitsError


def int8_matmul(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] · int8 [N, K]ᵀ → int32 [M, N], exact."""
    return exact_product(a_MK, b_NK)


def exact_product(codes_MK: torch.Tensor, values_NK: torch.Tensor) -> torch.Tensor:
    """int8 codes · integer values (of any type, beyond int8 too) → int32 [M, N], exact."""
    product = codes_MK.to(torch.int64) @ values_NK.to(torch.int64).t()
    if product.numel() and int(product.abs().max()) > torch.iinfo(torch.int32).max:
        raise EvenbitsError(f"an int8 product over K = {codes_MK.shape[1]} does not fit into int32.")
    return product.to(torch.int32)


def grouped_product(
    codes_MK: torch.Tensor,
    values_NK: torch.Tensor,
    scales_NG: torch.Tensor,
    group: int,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = exact_product,
) -> torch.Tensor:
    """Σ over groups, in order, of float32(Σ codes · values of the group) · scale → float32 [M, N].

    The order and the roundings are part of the definition: product rounded, sum rounded, first group first.
    """
    total_MN = torch.zeros(len(codes_MK), len(values_NK), device=codes_MK.device)
    for g in range(scales_NG.shape[1]):
        columns = slice(g * group, (g + 1) * group)
        total_MN = total_MN + product(codes_MK[:, columns], values_NK[:, columns]).float() * scales_NG[:, g]
    return total_MN
