"""The oracle of every integer kernel: exact and slow.

a_MK · b_NKᵀ with int8 operands is accumulated in int64, which holds any K (2⁶³ / 2¹⁴ columns); the result is int32 and
raises if it would not fit (|sum| ≤ 2¹⁴·K, so K > 131071 with worst-case data).
"""

from __future__ import annotations

import torch

from evenbits.errors import EvenbitsError


def int8_matmul(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] · int8 [N, K]ᵀ → int32 [M, N], exact."""
    product = a_MK.to(torch.int64) @ b_NK.to(torch.int64).t()
    if product.numel() and int(product.abs().max()) > torch.iinfo(torch.int32).max:
        raise EvenbitsError(f"an int8 product over K = {a_MK.shape[1]} does not fit into int32.")
    return product.to(torch.int32)
