"""Packed 4-bit weights on a GPU: a byte is two weights, decoded on its way to the tensor cores.

Weights are the left factor (yᵀ = W · xᵀ): decoded registers are what the matrix instructions take there, and eight or
sixteen rows of activations cost no more than one. Even and odd columns have a product each, so decoded weights need no
interleaving. A group of columns is summed by itself, scaled, and added to the total, groups in order.

    int8 activations    Σ exact in int32, then as linear.py has it, to the bit
    E4M3 activations    Σ in float32 over weights decoded to E4M3, exact there, then as linear.py has it
    float activations   Σ in float32 over decoded numbers that the activations' type holds exactly, then times the scale

M: rows, N: outputs, B: bytes of a packed row, W: bytes of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evenbits.kernels.triton.epilogue import activated, biased, scale_at

# The adders of E4M3 products on Hopper (and, by what is published, Ada) keep about fourteen digits of a sum, not
# float32's twenty-four. So sums of 64 products at most are theirs, added up in float32 by ordinary additions; fewer
# would cost more additions, and fewer than 32 an instruction cannot do.
_COARSE = tl.constexpr(64)


@triton.jit
def _decoded(packed, table, ASM: tl.constexpr):
    """Bytes → (even, odd) numbers of the table's type. ASM: "" reads them from the table."""
    if ASM == "":
        at = table + packed.to(tl.int32) * 2
        return tl.load(at), tl.load(at + 1)
    kind = table.dtype.element_ty
    if kind == tl.int8 or kind == tl.uint8:
        return tl.inline_asm_elementwise(ASM, "=r,=r,r", [packed], (kind, kind), True, 4)
    return tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r", [packed], (kind, kind), True, 4)


@triton.jit
def _dot(weight, x, acc, IN_FLOAT32: tl.constexpr):
    """weight [N, W] · x [W, M] + acc. IN_FLOAT32: the interpreter's products of bfloat16 are wrong. E4M3 products start
    from zero and are added: older GPUs than Hopper would sum all of a row in their coarse adders, whatever
    max_num_imprecise_acc says (which keeps Triton from joining sum and product)."""
    if acc.dtype == tl.int32:
        return tl.dot(weight, x, acc, out_dtype=tl.int32)
    if weight.dtype == tl.float8e4nv and not IN_FLOAT32:
        AT_ONCE: tl.constexpr = _COARSE if weight.shape[1] > _COARSE else weight.shape[1]
        return acc + tl.dot(weight, x, max_num_imprecise_acc=AT_ONCE)
    if IN_FLOAT32:
        return tl.dot(weight.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(weight, x, acc, input_precision="ieee")


@triton.jit
def _codes(x, m, first, in_group, rows, plane, x_stride, W: tl.constexpr, GROUP: tl.constexpr):
    """int8 or E4M3 codes of W bytes' columns, even and odd, [W, M]: from two planes of each row, zeros between and
    behind."""
    b = first + tl.arange(0, W)
    mask = b < plane
    if GROUP % W:
        mask = mask & (in_group + tl.arange(0, W) < GROUP)
    at = x + m[None, :].to(tl.int64) * x_stride + b[:, None]
    mask = mask[:, None] & rows[None, :]
    return tl.load(at, mask=mask, other=0), tl.load(at + plane, mask=mask, other=0)


@triton.jit
def _floats(
    x, multiplier, m, first, in_group, rows, K, x_stride, BLOCK_M: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Activations of W bytes' columns, even and odd, [W, M]: read as they lie, beside each other, and parted."""
    k = 2 * first + tl.arange(0, 2 * W)
    mask = k < K
    if GROUP % W:
        mask = mask & (2 * in_group + tl.arange(0, 2 * W) < 2 * GROUP)
    found = tl.load(x + m[:, None].to(tl.int64) * x_stride + k[None, :], mask=rows[:, None] & mask[None, :], other=0.0)
    if multiplier is not None:
        found = found.to(tl.float32) * tl.load(multiplier + k, mask=mask, other=0.0)[None, :]
    even, odd = tl.split(tl.reshape(found, (BLOCK_M, W, 2)))
    return tl.trans(even), tl.trans(odd)


@triton.jit
def _tile(
    acc, x, m, rows, multiplier, weight, outputs, first, in_group, B, K, x_stride, table, rest, GROUP: tl.constexpr,
    ASM: tl.constexpr, REST: tl.constexpr, IN_FLOAT32: tl.constexpr, BLOCK_M: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """acc + the products of bytes first … first + W of every row, those of one group; the first is the group's byte
    in_group. Masks compare with B, K and constants alone: Triton sees that whole words of them are equal."""
    b = tl.arange(0, W)
    mask = first + b < B
    if GROUP % W:
        mask = mask & (in_group + b < GROUP)
    packed = tl.load(weight + (first + b)[None, :], mask=outputs[:, None] & mask[None, :], other=0)
    if x.dtype.element_ty == tl.int8 or x.dtype.element_ty == tl.uint8:
        x_even, x_odd = _codes(x, m, first, in_group, rows, K, x_stride, W, GROUP)
    else:
        x_even, x_odd = _floats(x, multiplier, m, first, in_group, rows, K, x_stride, BLOCK_M, W, GROUP)
    even, odd = _decoded(packed, table, ASM)
    if even.dtype == tl.uint8:  # bytes of E4M3 on both sides
        even, odd = even.to(tl.float8e4nv, bitcast=True), odd.to(tl.float8e4nv, bitcast=True)
        x_even, x_odd = x_even.to(tl.float8e4nv, bitcast=True), x_odd.to(tl.float8e4nv, bitcast=True)
    else:
        x_even, x_odd = x_even.to(even.dtype), x_odd.to(even.dtype)
    acc = _dot(even, x_even, acc, IN_FLOAT32)
    acc = _dot(odd, x_odd, acc, IN_FLOAT32)
    if rest is not None:
        even, odd = _decoded(packed, rest, REST)
        acc = _dot(even, x_even, acc, IN_FLOAT32)
        acc = _dot(odd, x_odd, acc, IN_FLOAT32)
    return acc


@triton.jit
def pair_kernel(
    x, weight, y, table, rest, x_scale, x_zero, multiplier, scale, factor, weight_sum, bias, M, N, K, B, x_stride,
    weight_stride, scale_row, unit, GROUP: tl.constexpr, SCALE_KIND: tl.constexpr, SHIFT: tl.constexpr,
    ACTIVATION: tl.constexpr, ASM: tl.constexpr, REST: tl.constexpr, IN_FLOAT32: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A tile of y. x: int8 or E4M3 (uint8) codes in two planes of K, with x_scale, or floats [M, K], without. GROUP:
    bytes that share a scale; 0: all of a row."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, outputs = m < M, n < N
    weight_rows = weight + n[:, None].to(tl.int64) * weight_stride
    KIND: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if GROUP else KIND)
    if GROUP:
        for start in range(0, B, GROUP):
            acc = tl.zeros((BLOCK_N, BLOCK_M), KIND)
            if GROUP <= W:
                acc = _tile(
                    acc, x, m, rows, multiplier, weight_rows, outputs, start, 0, B, K, x_stride, table, rest, GROUP,
                    ASM, REST, IN_FLOAT32, BLOCK_M, W,
                )  # fmt: skip
            else:
                for within in range(0, GROUP, W):
                    acc = _tile(
                        acc, x, m, rows, multiplier, weight_rows, outputs, start + within, within, B, K, x_stride,
                        table, rest, GROUP, ASM, REST, IN_FLOAT32, BLOCK_M, W,
                    )  # fmt: skip
            group_scale = scale_at(
                scale + n.to(tl.int64) * scale_row + start // GROUP, outputs, factor, unit, SCALE_KIND
            )
            total += (acc >> SHIFT if SHIFT else acc).to(tl.float32) * group_scale[:, None]
    else:
        for first in range(0, B, W):
            total = _tile(
                total, x, m, rows, multiplier, weight_rows, outputs, first, 0, B, K, x_stride, table, rest, GROUP,
                ASM, REST, IN_FLOAT32, BLOCK_M, W,
            )  # fmt: skip
        if SHIFT:
            total = total >> SHIFT
    _finish(
        total, y, m, n, M, N, x_scale, x_zero, scale, scale_row, factor, unit, weight_sum, bias, GROUP, SCALE_KIND,
        ACTIVATION,
    )  # fmt: skip


@triton.jit
def _finish(
    total, y, m, n, M, N, x_scale, x_zero, scale, scale_row, factor, unit, weight_sum, bias, GROUP: tl.constexpr,
    SCALE_KIND: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
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
