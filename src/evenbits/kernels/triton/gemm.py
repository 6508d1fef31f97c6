"""int8 × int8 on a GPU's tensor cores, and what follows it: zero points, scales, bias, activation function.

Two kernels: product and epilogue in one, and the epilogue alone, for a product that torch._int_mm has made. M: rows, N:
outputs, K: columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evenbits.kernels.triton.epilogue import activated, biased


@triton.jit
def _store(
    acc, y, m, n, M, N, x_scale, x_zero, scale, scale_step, weight_sum, bias, RAW: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """int32 sums [rows, outputs] → y, of its type. RAW: as they are."""
    inside = (m < M)[:, None] & (n < N)[None, :]
    if RAW:
        result = acc
    else:
        if weight_sum is not None:
            zero = tl.load(x_zero + m, mask=m < M, other=0)
            acc -= zero[:, None] * tl.load(weight_sum + n, mask=n < N, other=0)[None, :]
        rows = tl.load(x_scale + m, mask=m < M, other=0.0)
        outputs = tl.load(scale + n * scale_step, mask=n < N, other=0.0)
        result = acc.to(tl.float32) * (rows[:, None] * outputs[None, :])
        result = activated(biased(result, bias, n[None, :], (n < N)[None, :]), ACTIVATION)
    tl.store(y + m[:, None].to(tl.int64) * N + n[None, :], result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def int8_kernel(
    codes, weight, y, x_scale, x_zero, scale, weight_sum, bias, M, N, K, codes_stride, weight_stride, scale_step,
    RAW: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of y. Neighbouring programs share weights: rows vary first."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a = codes + m[:, None].to(tl.int64) * codes_stride + k[None, :]
    b = weight + n[None, :].to(tl.int64) * weight_stride + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first in range(0, K, BLOCK_K):
        left = k < K - first
        a_tile = tl.load(a + first, mask=(m < M)[:, None] & left[None, :], other=0)
        b_tile = tl.load(b + first, mask=left[:, None] & (n < N)[None, :], other=0)
        acc = tl.dot(a_tile, b_tile, acc, out_dtype=tl.int32)
    _store(acc, y, m, n, M, N, x_scale, x_zero, scale, scale_step, weight_sum, bias, RAW, ACTIVATION)


@triton.jit
def epilogue_kernel(
    product, y, x_scale, x_zero, scale, weight_sum, bias, M, N, product_stride, scale_step, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """int32 [M, N] → y."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    acc = tl.load(product + m[:, None].to(tl.int64) * product_stride + n[None, :], mask=inside, other=0)
    _store(acc, y, m, n, M, N, x_scale, x_zero, scale, scale_step, weight_sum, bias, False, ACTIVATION)
