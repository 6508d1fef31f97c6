"""int8 × int8 → int32 through operations that torch itself carries; no build step.

`int_mm`  torch._int_mm. On a CPU only with VNNI: without it the vendor's kernel adds pairs of products in 16 bits and
          saturates silently (measured: 54 % error on worst-case data). On CUDA it wants M > 16 and K, N multiples of 8,
          so operands are padded with zeros.
`fp32`    float32 products of the integer codes, in slices of K so short that float32 holds every partial sum exactly
          (1024 · 128² = 2²⁴), added up in int32. Exact anywhere, and as fast as float32: no gain.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_EXACT_K = 1024  # 1024 products of at most 128·128 sum to at most 2**24
_EXACT_K_WIDE = 512  # 512 products of at most 128·256
_CUDA_MIN_M, _CUDA_MULTIPLE = 17, 8


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turns autocast off inside the block: it would round exact float32 sums of codes to bfloat16 or float16."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def int_mm(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] · int8 [N, K]ᵀ → int32 [M, N] by torch._int_mm (b is passed as a transposed view, not copied)."""
    if a_MK.is_cuda:
        return _padded(a_MK, b_NK)
    if a_MK.shape[1] == 1:  # no strides of a [N, 1] matrix satisfy torch._int_mm: it returns unwritten memory
        return a_MK.to(torch.int32) * b_NK.to(torch.int32).t()
    return torch._int_mm(_plain_strides(a_MK), _plain_strides(b_NK).t())


def _plain_strides(x_MK: torch.Tensor) -> torch.Tensor:
    """x with strides (K, 1). Others, even of a dimension of size one, make torch._int_mm on a CPU return unwritten
    memory without a word (https://github.com/pytorch/pytorch/issues/195066). No copy where x is contiguous."""
    return x_MK.reshape(-1).view(x_MK.shape)


def _padded(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    rows, columns = a_MK.shape[0], b_NK.shape[0]
    pad_k = -a_MK.shape[1] % _CUDA_MULTIPLE
    a_MK = torch.nn.functional.pad(a_MK, (0, pad_k, 0, max(0, _CUDA_MIN_M - rows)))
    b_NK = torch.nn.functional.pad(b_NK, (0, pad_k, 0, -columns % _CUDA_MULTIPLE))
    return torch._int_mm(a_MK, b_NK.t())[:rows, :columns]


def fp32(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] · int8 [N, K]ᵀ → int32 [M, N] by exact float32 partial products."""
    return exact_product(a_MK, b_NK, _EXACT_K)


def exact_product(a_MK: torch.Tensor, b_NK: torch.Tensor, exact_k: int = _EXACT_K_WIDE) -> torch.Tensor:
    """int8 codes · integer values up to ±256, of any type → int32 [M, N], by float32 partial sums that are exact."""
    total = torch.zeros(a_MK.shape[0], b_NK.shape[0], dtype=torch.int32, device=a_MK.device)
    with without_autocast(a_MK.device):
        for start in range(0, a_MK.shape[1], exact_k):
            stop = start + exact_k
            total += (a_MK[:, start:stop].float() @ b_NK[:, start:stop].float().t()).to(torch.int32)
    return total
