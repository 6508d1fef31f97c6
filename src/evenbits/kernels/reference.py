"""The oracle of every kernel: exact (integers) or in the one order that is defined (floats), and slow.

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


_LANES, _STEPS = 16, 8


def float_product(x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """Float rows · decoded weights, both float32 → float32 [M, N], summed as csrc/floats.h has it.

    Lane j of 16 sums columns 8j … 8j + 7 of every 128, in order, each by a fused multiply-add; then halves are added:
    16 → 8 → 4 → 2 → 1.
    """
    padding = -x_MK.shape[1] % (_LANES * _STEPS)
    x, weight = (torch.nn.functional.pad(part, (0, padding)) for part in (x_MK, weight_NK))
    x_MSL, weight_NSL = (
        part.view(len(part), -1, _LANES, _STEPS).transpose(2, 3).reshape(len(part), -1, _LANES) for part in (x, weight)
    )
    sums_MNL = torch.zeros(len(x), len(weight), _LANES, device=x.device)
    for step in range(x_MSL.shape[1]):
        sums_MNL = fused_multiply_add(x_MSL[:, None, step], weight_NSL[None, :, step], sums_MNL)
    while sums_MNL.shape[2] > 1:
        half = sums_MNL.shape[2] // 2
        sums_MNL = sums_MNL[..., :half] + sums_MNL[..., half:]
    return sums_MNL[..., 0]


def fused_multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a · b + c of float32 tensors, rounded once.

    In float64 the product is exact. A sum that is not is made odd in its last bit: that keeps it on its side of every
    number where float32 changes direction (S. Boldo and G. Melquiond, "Emulation of a FMA and correctly rounded sums:
    proved algorithms using rounding to odd", IEEE Transactions on Computers 57(4), 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(torch.int64)
    inexact = (error != 0) & error.isfinite() & (bits % 2 == 0)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(inexact, bits + away, bits).view(torch.float64).float()
