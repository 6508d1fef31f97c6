"""Activations → int8 or E4M3 codes on a GPU, a program for each row: multiplier, range, scale, codes, in one launch.

The codes, scales and zero points of quantize.py (E4M3: of pair_fp8.py) to the bit, broken rows (NaN, infinities) too.
For packed weights, whose even and odd columns are decoded apart, codes are laid out likewise: all even columns of a
row, then all odd ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

_TINY, _LARGEST = tl.constexpr(1.1754943508222875e-38), tl.constexpr(3.4028234663852886e38)
_ROUND32, _ROUND64 = tl.constexpr(12582912.0), tl.constexpr(6755399441055744.0)
_FAR = tl.constexpr(4096.0)  # beyond any code and zero point together


@triton.jit
def _values(x, multiplier, columns, K):
    """Some columns of a row as float32, balanced; 0 beyond the row."""
    mask = columns < K
    v = tl.load(x + columns, mask=mask, other=0.0).to(tl.float32)
    if multiplier is not None:
        v = v * tl.load(multiplier + columns, mask=mask, other=0.0)
    return v


@triton.jit
def _range(v, columns, K):
    """Smallest and largest, and whether there is a NaN and an infinity among them."""
    inside = columns < K
    low = tl.min(tl.where(inside, v, float("inf")), axis=0)
    high = tl.max(tl.where(inside, v, float("-inf")), axis=0)
    return low, high, tl.max((v != v).to(tl.int32), axis=0), tl.max((tl.abs(v) == float("inf")).to(tl.int32), axis=0)


@triton.jit
def _parameters(low, high, levels, code_min, code_max, AFFINE: tl.constexpr):
    """Scale and zero point of a range, as affine.qparams has them."""
    if AFFINE:
        low64 = tl.minimum(low.to(tl.float64), 0.0)
        high64 = tl.maximum(high.to(tl.float64), 0.0)
        width = (high64 - low64) / (code_max - code_min).to(tl.float64)
        width = tl.where(width == 0, 1.0, width)
        scale = tl.minimum(tl.maximum(width, _TINY), _LARGEST).to(tl.float32)
        steps = low64 / scale.to(tl.float64)
        zero = code_min - ((steps + _ROUND64) - _ROUND64).to(tl.int32)
        zero = tl.minimum(tl.maximum(zero, code_min), code_max)
    else:
        scale = tl.div_rn(tl.maximum(tl.abs(low), tl.abs(high)), levels)
        scale = tl.where(scale == 0, 1.0, scale)
        scale = tl.minimum(tl.maximum(scale, _TINY), _LARGEST)
        zero = code_min * 0
    return scale, zero


@triton.jit
def _codes(v, scale, zero, broken, code_min, code_max):
    steps = tl.div_rn(v, scale)
    steps = tl.minimum(tl.maximum(steps, -_FAR), _FAR)
    steps = (steps + _ROUND32) - _ROUND32
    codes = tl.minimum(tl.maximum(steps + zero.to(tl.float32), code_min.to(tl.float32)), code_max.to(tl.float32))
    return tl.where(broken, 0.0, codes).to(tl.int8)


@triton.jit
def _row_range(x, multiplier, columns, K, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The first columns of a row, and the range of all."""
    v = _values(x, multiplier, columns, K)
    low, high, nan, infinite = _range(v, columns, K)
    for block in range(1, BLOCKS):
        more = _values(x, multiplier, block * BLOCK + columns, K)
        low2, high2, nan2, infinite2 = _range(more, block * BLOCK + columns, K)
        low, high = tl.minimum(low, low2), tl.maximum(high, high2)
        nan, infinite = nan | nan2, infinite | infinite2
    return v, low, high, nan, infinite


@triton.jit
def quantize_kernel(
    x, multiplier, given_scale, given_zero, codes, scales, zeros, K, x_stride, codes_stride, plane, levels, code_min,
    code_max, AFFINE: tl.constexpr, FINITE: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """One row. given_scale, given_zero: calibrated ones, or None. PLANES: column k goes to (k mod 2)·plane + k div 2,
    and zeros to what is left of two planes."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    v, low, high, nan, infinite = _row_range(x + row * x_stride, multiplier, columns, K, BLOCK, BLOCKS)
    if given_scale is None:
        scale, zero = _parameters(low, high, levels, code_min, code_max, AFFINE)
        broken = (nan | infinite) != 0
    else:
        scale, zero = tl.load(given_scale), code_min * 0
        if given_zero is not None:
            zero = tl.load(given_zero)
        broken = ((nan | infinite) if FINITE else nan) != 0
    tl.store(scales + row, tl.where(broken, float("nan"), scale))
    tl.store(zeros + row, tl.where(broken, 0, zero))
    for block in range(BLOCKS):
        where = block * BLOCK + columns
        if BLOCKS > 1:
            v = _values(x + row * x_stride, multiplier, where, K)
        found = _codes(v, scale, zero, broken | (scale != scale), code_min, code_max)
        if PLANES:
            found = tl.where(where < K, found, 0)
            tl.store(codes + row * codes_stride + (where % 2) * plane + where // 2, found, mask=where < 2 * plane)
        else:
            tl.store(codes + row * codes_stride + where, found, mask=where < K)


@triton.jit
def _e4m3_scale(low, high):
    """The row's largest magnitude / 448 with the eleven digits of a float16, to nearest even."""
    scale = tl.div_rn(tl.maximum(tl.abs(low), tl.abs(high)), 448.0)
    scale = tl.where(scale == 0, 1.0, scale)
    scale = tl.minimum(tl.maximum(scale, _TINY), _LARGEST)
    bits = scale.to(tl.int32, bitcast=True)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(u):
    """float32 → E4M3 bytes: to nearest, ties to the even one, beyond 448 saturated, no minus zero. Below 2⁻⁶ they are
    multiples of 2⁻⁹, the last digit of numbers beside 2¹⁴."""
    size = tl.minimum(tl.abs(u), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    tiny = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, tiny, normal)
    return tl.where((u < 0) & (code != 0), code | 128, code).to(tl.uint8)


@triton.jit
def e4m3_kernel(
    x, multiplier, codes, scales, K, x_stride, codes_stride, plane, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One row → E4M3 bytes in two planes, as `quantize_kernel` lays them out, and its scale."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    v, low, high, nan, infinite = _row_range(x + row * x_stride, multiplier, columns, K, BLOCK, BLOCKS)
    scale, broken = _e4m3_scale(low, high), (nan | infinite) != 0
    tl.store(scales + row, tl.where(broken, float("nan"), scale))
    for block in range(BLOCKS):
        where = block * BLOCK + columns
        if BLOCKS > 1:
            v = _values(x + row * x_stride, multiplier, where, K)
        found = tl.where(broken | (where >= K), 0, _e4m3(tl.div_rn(v, scale)))
        tl.store(codes + row * codes_stride + (where % 2) * plane + where // 2, found, mask=where < 2 * plane)
