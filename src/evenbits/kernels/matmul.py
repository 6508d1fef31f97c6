"""`int8_matmul`: checks, and the backend that serves the device.

M: rows, N: outputs, K: columns.
"""

from __future__ import annotations

import torch

from evenbits.errors import EvenbitsError
from evenbits.kernels import dispatch

_INT32_SAFE_K = (2**31 - 1) // 128**2


def int8_matmul(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] · int8 [N, K]ᵀ → int32 [M, N]; see ops.int8_matmul."""
    if a_MK.dtype != torch.int8:
        raise _refused(a_MK, b_NK)
    check_shapes(a_MK, b_NK)
    if not a_MK.numel() or not b_NK.numel():
        return torch.zeros(a_MK.shape[0], b_NK.shape[0], dtype=torch.int32, device=a_MK.device)
    return dispatch.matmul(a_MK.device.type)(a_MK, b_NK)


def check_shapes(a_MK: torch.Tensor, b_NK: torch.Tensor) -> None:
    """Raises EvenbitsError unless b is an int8 matrix with as many columns as a, few enough for int32 sums."""
    if b_NK.dtype != torch.int8 or a_MK.ndim != 2 or b_NK.ndim != 2 or a_MK.shape[1] != b_NK.shape[1]:
        raise _refused(a_MK, b_NK)
    if a_MK.device != b_NK.device:
        raise EvenbitsError(f"a lies on {a_MK.device} and b on {b_NK.device}: move one of them.")
    check_columns(a_MK.shape[1])


def _refused(a_MK: torch.Tensor, b_NK: torch.Tensor) -> EvenbitsError:
    return EvenbitsError(
        f"int8_matmul takes int8 [M, K] and int8 [N, K]; given {a_MK.dtype} {list(a_MK.shape)} and {b_NK.dtype} "
        f"{list(b_NK.shape)}."
    )


def check_columns(columns: int) -> None:
    """Raises EvenbitsError if a sum of so many int8 products may not fit int32."""
    if columns > _INT32_SAFE_K:
        raise EvenbitsError(f"a sum of {columns} int8 products may not fit int32; at most {_INT32_SAFE_K} fit.")
