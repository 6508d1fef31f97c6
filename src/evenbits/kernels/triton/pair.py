"""Packed 4-bit weights on a GPU: a byte is two weights, decoded on its way to the tensor cores.

Weights are the left factor (yᵀ = W · xᵀ): decoded registers are what the matrix instructions take there, and eight or
sixteen rows of activations cost no more than one. Even and odd columns have a product each, so decoded weights need no
interleaving. A group of columns is summed by itself, scaled, and added to the total, groups in order.

    int8 activations    Σ exact in int32, then as linear.py has it, to the bit
    float activations   Σ in float32 over decoded numbers that the activations' type holds exactly, then times the scale

M: rows, N: outputs, B: bytes of a packed row, W: bytes of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evenbits.kernels.triton.epilogue import activated, biased, scale_at


@triton.jit
def _decoded(packed, table, ASM: tl.constexpr):
    """Bytes → (even, odd) numbers of the table's type. ASM: "" reads them from the table."""
    if ASM == "":
        at = table + packed.to(tl.int32) * 2
        return tl.load(at), tl.load(at + 1)
    kind = table.dtype.element_ty
    if kind == tl.int8:
        return tl.inline_asm_elementwise(ASM, "=r,=r,r", [packed], (kind, kind), True, 4)
    return tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r", [packed], (kind, kind), True, 4)


@triton.jit
def _dot(weight, x, acc, IN_FLOAT32: tl.constexpr):
    """weight [N, W] · x [W, M] + acc. IN_FLOAT32: the interpreter's products of bfloat16 are wrong."""
    if acc.dtype == tl.int32:
        return tl.dot(weight, x, acc, out_dtype=tl.int32)
    if IN_FLOAT32:
        return tl.dot(weight.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(weight, x, acc, input_precision="ieee")


@triton.jit
def _balanced(x, multiplier, columns, mask):
    if multiplier is not None:
        x = x.to(tl.float32) * tl.load(multiplier + columns, mask=mask, other=0.0)[:, None]
    return x


@triton.jit
def _tile(
    acc, x, x_step, x_odd, multiplier, weight, first, end, K, rows, outputs, table, rest, W: tl.constexpr, ASM: tl.constexpr, REST: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):  # fmt: skip
    """acc + the products of bytes first … first + W of every row, those before `end`. x: pointers of rows [1, M], whose
    column of byte b is at b·x_step (even) and at b·x_step + x_odd (odd)."""
    b = first + tl.arange(0, W)
    packed = tl.load(weight + b[None, :], mask=outputs[:, None] & (b < end)[None, :], other=0)
    is_even, is_odd = (b < end) & (2 * b < K), (b < end) & (2 * b + 1 < K)
    at = x + (b * x_step)[:, None]
    x_even = tl.load(at, mask=is_even[:, None] & rows[None, :], other=0)
    x_odd_tile = tl.load(at + x_odd, mask=is_odd[:, None] & rows[None, :], other=0)
    x_even = _balanced(x_even, multiplier, 2 * b, is_even)
    x_odd_tile = _balanced(x_odd_tile, multiplier, 2 * b + 1, is_odd)
    even, odd = _decoded(packed, table, ASM)
    if even.dtype == tl.float32:
        x_even, x_odd_tile = x_even.to(tl.float32), x_odd_tile.to(tl.float32)
    acc = _dot(even, x_even, acc, IN_FLOAT32)
    acc = _dot(odd, x_odd_tile, acc, IN_FLOAT32)
    if rest is not None:
        even, odd = _decoded(packed, rest, REST)
        acc = _dot(even, x_even, acc, IN_FLOAT32)
        acc = _dot(odd, x_odd_tile, acc, IN_FLOAT32)
    return acc


@triton.jit
def pair_kernel(
    x, weight, y, table, rest, x_scale, x_zero, multiplier, scale, factor, weight_sum, bias, M, N, K, B, x_stride, x_odd, weight_stride,
    scale_row, unit, GROUP: tl.constexpr, X_STEP: tl.constexpr, SCALE_KIND: tl.constexpr, SHIFT: tl.constexpr,
    ACTIVATION: tl.constexpr, ASM: tl.constexpr, REST: tl.constexpr, IN_FLOAT32: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A tile of y. x: int8 codes, with x_scale, or floats, without. GROUP: bytes that share a scale; 0: all of a row."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, outputs = m < M, n < N
    x_rows = x + m[None, :].to(tl.int64) * x_stride
    weight_rows = weight + n[:, None].to(tl.int64) * weight_stride
    KIND: tl.constexpr = tl.int32 if x_scale is not None else tl.float32
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if GROUP else KIND)
    if GROUP:
        for start in range(0, B, GROUP):
            acc = tl.zeros((BLOCK_N, BLOCK_M), KIND)
            end = tl.minimum(start + GROUP, B)
            if GROUP <= W:
                acc = _tile(acc, x_rows, X_STEP, x_odd, multiplier, weight_rows, start, end, K, rows, outputs, table, rest, W, ASM, REST, IN_FLOAT32)  # fmt: skip
            else:
                for first in range(start, end, W):
                    acc = _tile(acc, x_rows, X_STEP, x_odd, multiplier, weight_rows, first, end, K, rows, outputs, table, rest, W, ASM, REST, IN_FLOAT32)  # fmt: skip
            at = scale + n.to(tl.int64) * scale_row + start // GROUP
            total += (acc >> SHIFT if SHIFT else acc).to(tl.float32) * scale_at(at, outputs, factor, unit, SCALE_KIND)[:, None]
    else:
        for first in range(0, B, W):
            total = _tile(total, x_rows, X_STEP, x_odd, multiplier, weight_rows, first, B, K, rows, outputs, table, rest, W, ASM, REST, IN_FLOAT32)  # fmt: skip
        if SHIFT:
            total = total >> SHIFT
    _finish(total, y, m, n, M, N, x_scale, x_zero, scale, scale_row, factor, unit, weight_sum, bias, GROUP, SCALE_KIND, ACTIVATION)


@triton.jit
def _finish(total, y, m, n, M, N, x_scale, x_zero, scale, scale_row, factor, unit, weight_sum, bias, GROUP: tl.constexpr, SCALE_KIND: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """Sums [outputs, rows] → y [rows, outputs], of its type."""
    rows, outputs = m < M, n < N
    if x_scale is not None:
        row_scale = tl.load(x_scale + m, mask=rows, other=0.0)[None, :]
    if GROUP:
        result = total
        if x_scale is not None:
            result = result * row_scale
    else:
        if weight_sum is not None:
            zero = tl.load(x_zero + m, mask=rows, other=0)[None, :]
            total -= zero * tl.load(weight_sum + n, mask=outputs, other=0)[:, None]
        scales = scale_at(scale + n.to(tl.int64) * scale_row, outputs, factor, unit, SCALE_KIND)[:, None]
        if x_scale is not None:
            scales = row_scale * scales
        result = total.to(tl.float32) * scales
    result = activated(biased(result, bias, n[:, None], outputs[:, None]), ACTIVATION)
    at = y + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(at, tl.trans(result).to(y.dtype.element_ty), mask=rows[:, None] & outputs[None, :])
