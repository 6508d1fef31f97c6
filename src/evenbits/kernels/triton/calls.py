"""Launches of Triton's kernels: tensors → grids, tiles and arguments. Importing this imports Triton.

Tile sizes and the choice between kernels follow from the shape alone, in `tiles` and `loader.int_mm_from`. Both are
guesses that no GPU has confirmed: benchmarks/linear_gpu.py is for that. Every launch turns fused multiply-adds off: the
epilogue's roundings are part of the definition.

M: rows, K: columns, N: outputs, B: bytes of a packed weight row, G: groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from evenbits.kernels import torch_int8
from evenbits.kernels.fused import INT8_WEIGHT, WIDE_PAIRS, Rows, Weight
from evenbits.kernels.triton import loader
from evenbits.kernels.triton.gemm import epilogue_kernel, int8_kernel
from evenbits.kernels.triton.pair import pair_kernel
from evenbits.kernels.triton.rows import e4m3_kernel, quantize_kernel
from evenbits.kernels.triton.tables import Decoder, e4m3_decoder, float_decoder, int8_decoder

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_WHOLE_ROW = 16384  # columns of a row that stay in registers between its range and its codes
_ALIGNED = 16
_SCALES = {torch.float32: 0, torch.float16: 0, torch.float8_e4m3fn: 1, torch.uint8: 2}


class Tiles(NamedTuple):
    """Rows, outputs and columns (packed: bytes) that a program takes, warps that do it, loads in flight."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def tiles(rows: int, packed: bool, group: int = 0, single: bool = False) -> Tiles:
    """Of a product; group: columns that share a scale; single: of float32 numbers. Few rows wait for memory: many loads
    in flight; many rows reuse what they have decoded. float32 has no matrix instructions: its operands are in
    registers, and larger tiles than these spill."""
    if single:
        return Tiles(16, 32, 16, 4, 2)
    if not packed:
        return Tiles(16, 64, 128, 4, 4) if rows <= 16 else Tiles(128, 128, 64, 8, 3)
    few = rows <= 16
    widest = 128 if few else 64
    width = min(widest, max(32, triton.next_power_of_2(group // 2))) if group else widest
    return Tiles(16, 64, width, 4, 4) if few else Tiles(64, 128, width, 8, 3)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 3, **meta: Any) -> None:
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, wherever the tensors are
        kernel[grid](*arguments, **meta, num_warps=warps, num_stages=stages, enable_fp_fusion=False)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] → [M, K] of a type the kernels read, columns beside each other."""
    x_MK = x.reshape(-1, x.shape[-1])
    x_MK = x_MK if x_MK.dtype in _FLOATS else x_MK.float()
    return x_MK if x_MK.stride(1) == 1 or x_MK.shape[1] == 1 else x_MK.contiguous()


def _output(x: torch.Tensor, x_MK: torch.Tensor, outputs: int) -> torch.Tensor:
    """[..., N], to be written by a kernel. The interpreter cuts float32 to bfloat16 where it should round: there torch
    does it."""
    cut = loader.interpreted() and x_MK.dtype == torch.bfloat16
    return x_MK.new_empty(*x.shape[:-1], outputs, dtype=torch.float32 if cut else x_MK.dtype)


def quantize(x: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., K] → (codes int8 [M, K], scale float32 [M, 1], zero point int32 [M, 1])."""
    x_MK = _rows(x)
    return _quantized(x_MK, rows, x_MK.new_empty(x_MK.shape, dtype=torch.int8), 0)


def _quantized(
    x_MK: torch.Tensor, rows: Rows, codes: torch.Tensor, plane: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """plane: 0, or how far odd columns are behind the even ones."""
    count, columns = x_MK.shape
    scale = x_MK.new_empty(count, 1, dtype=torch.float32)
    zero = x_MK.new_empty(count, 1, dtype=torch.int32)
    if not count:
        return codes, scale, zero
    stored = 2 * plane or columns
    block = _block(stored)
    _launch(
        quantize_kernel,
        (count,),
        *(x_MK, rows.multiplier, rows.scale, rows.zero_point, codes, scale, zero),
        *(columns, x_MK.stride(0), codes.stride(0), plane, float(rows.levels), rows.code_min, rows.code_max),
        AFFINE=rows.affine,
        FINITE=rows.finite,
        PLANES=plane > 0,
        BLOCK=block,
        BLOCKS=triton.cdiv(stored, block),
        warps=_warps(block),
    )
    return codes, scale, zero


def _block(stored: int) -> int:
    """Columns of a row that a program holds."""
    return min(_WHOLE_ROW, int(triton.next_power_of_2(stored)))


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


def _plane(columns: int) -> int:
    """How far odd columns are behind the even ones of a row for packed weights."""
    return -(-columns // (2 * _ALIGNED)) * _ALIGNED


def quantize_e4m3(x_MK: torch.Tensor, multiplier: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] → (E4M3 bytes uint8 [M, 2 planes], scale float32 [M, 1])."""
    (count, columns), plane = x_MK.shape, _plane(x_MK.shape[1])
    codes = x_MK.new_empty(count, 2 * plane, dtype=torch.uint8)
    scale, block = x_MK.new_empty(count, 1, dtype=torch.float32), _block(2 * plane)
    _launch(
        e4m3_kernel,
        (count,),
        *(x_MK, multiplier, codes, scale, columns, x_MK.stride(0), codes.stride(0), plane),
        BLOCK=block,
        BLOCKS=triton.cdiv(2 * plane, block),
        warps=_warps(block),
    )
    return codes, scale


def linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, rows: Rows, activation: str = "none"
) -> torch.Tensor:
    """x [..., K] float → y [..., N] in x's type (float64: float32): linear.py in two launches, three with
    torch._int_mm."""
    x_MK, outputs = _rows(x), weight.bytes.shape[0]
    y = _output(x, x_MK, outputs)
    if not y.numel():
        return y.to(x_MK.dtype)
    if weight.kind == INT8_WEIGHT:
        _int8(x_MK, weight, bias, rows, activation, y)
        return y.to(x_MK.dtype)
    plane = _plane(x_MK.shape[1])
    codes, scale, zero = _quantized(x_MK, rows, x_MK.new_empty(len(x_MK), 2 * plane, dtype=torch.int8), plane)
    paired, wide = weight.kind > 1, weight.kind == WIDE_PAIRS
    decoder = int8_decoder(weight.tables, paired, False)
    rest = int8_decoder(weight.tables, paired, True) if wide else None
    _pair(codes, plane, weight, decoder, bias, activation, y, rest=rest, x_rows=(scale, zero if rows.affine else None))
    return y.to(x_MK.dtype)


def _int8(
    x_MK: torch.Tensor, weight: Weight, bias: torch.Tensor | None, rows: Rows, activation: str, y: torch.Tensor
) -> None:
    codes, scale, zero = _quantized(x_MK, rows, x_MK.new_empty(x_MK.shape, dtype=torch.int8), 0)
    step = int(weight.scale.numel() > 1)
    row_sum = weight.row_sum if rows.affine else None
    if len(codes) < loader.int_mm_from():
        _product(codes, weight.bytes, y, scale, zero, weight.scale, row_sum, bias, step, activation)
        return
    multiply = torch_int8.int_mm if codes.is_cuda else torch_int8.fp32
    product, (m, n) = multiply(codes, weight.bytes), (32, 128)
    grid = (triton.cdiv(len(codes), m), triton.cdiv(y.shape[-1], n))
    operands = (product, y, scale, zero, weight.scale, row_sum, bias, *product.shape, product.stride(0), step)
    _launch(epilogue_kernel, grid, *operands, ACTIVATION=activation, BLOCK_M=m, BLOCK_N=n)


def _product(
    codes: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    row_sum: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    step: int = 0,
    activation: str = "none",
) -> None:
    (rows, columns), outputs = codes.shape, len(weight)
    tile = tiles(rows, packed=False)
    _launch(
        int8_kernel,
        (triton.cdiv(rows, tile.m), triton.cdiv(outputs, tile.n)),
        *(codes, weight, y, scale, zero, weight_scale, row_sum, bias, rows, outputs, columns),
        *(codes.stride(0), weight.stride(0), step),
        RAW=weight_scale is None,
        ACTIVATION=activation,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        warps=tile.warps,
        stages=tile.stages,
    )


def int8_matmul(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] · int8 [N, K]ᵀ → int32 [M, N], exact."""
    y = a_MK.new_empty(len(a_MK), len(b_NK), dtype=torch.int32)
    _product(a_MK.contiguous(), b_NK.contiguous(), y)
    return y


def linear_float(
    x: torch.Tensor,
    weight: Weight,
    values: tuple[float, ...],
    bias: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    activation: str = "none",
) -> torch.Tensor:
    """x [..., K] float → y [..., N] in x's type (float64: float32), activations unquantized: weight_only.py in one
    launch. In 16 bits where the weight's numbers are exact in them and there is no multiplier, else in float32."""
    x_MK, outputs = _rows(x), weight.bytes.shape[0]
    y = _output(x, x_MK, outputs)
    if not y.numel():
        return y.to(x_MK.dtype)
    dtype = torch.float32 if multiplier is not None else x_MK.dtype
    decoder = float_decoder(values, weight.kind > 1, dtype) or float_decoder(values, weight.kind > 1, torch.float32)
    assert decoder is not None
    _pair(x_MK, x_MK.shape[1], weight, decoder, bias, activation, y, multiplier=multiplier)
    return y.to(x_MK.dtype)


def linear_e4m3(
    x: torch.Tensor,
    weight: Weight,
    values: tuple[float, ...],
    bias: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    activation: str = "none",
) -> torch.Tensor:
    """x [..., K] float → y [..., N] in x's type (float64: float32), E4M3 between: pair_fp8.py in two launches."""
    x_MK, outputs = _rows(x), weight.bytes.shape[0]
    y = _output(x, x_MK, outputs)
    if not y.numel():
        return y.to(x_MK.dtype)
    codes, scale = quantize_e4m3(x_MK, multiplier)
    decoder = e4m3_decoder(values, weight.kind > 1)
    _pair(codes, codes.shape[1] // 2, weight, decoder, bias, activation, y, x_rows=(scale, None))
    return y.to(x_MK.dtype)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """E4M3 as bytes: GPUs before 8.9 have no such type."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _pair(
    x: torch.Tensor,
    columns: int,
    weight: Weight,
    decoder: Decoder,
    bias: torch.Tensor | None,
    activation: str,
    y: torch.Tensor,
    *,
    rest: Decoder | None = None,
    x_rows: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    multiplier: torch.Tensor | None = None,
) -> None:
    """columns: of x, or of one of its two planes. x_rows: scales of the rows, and zero points if they are affine."""
    rows, (outputs, width) = len(x), weight.bytes.shape
    tile, interpreted = tiles(rows, True, weight.group, decoder.dtype == torch.float32), loader.interpreted()
    _launch(
        pair_kernel,
        (triton.cdiv(outputs, tile.n), triton.cdiv(rows, tile.m)),
        *(x, weight.bytes, y, _bytes(decoder.table(x.device)), None if rest is None else rest.table(x.device)),
        *(*x_rows, multiplier, _bytes(weight.scale), weight.global_scale),
        *(None if x_rows[1] is None else weight.row_sum, bias),
        *(rows, outputs, columns, width, x.stride(0), weight.bytes.stride(0)),
        *(weight.scale.numel() // outputs if weight.scale.numel() > 1 else 0, float(weight.unit)),
        GROUP=weight.group // 2,
        SCALE_KIND=_SCALES[weight.scale.dtype],
        SHIFT=decoder.shift,
        ACTIVATION=activation,
        ASM="" if interpreted else decoder.asm,
        REST="" if interpreted or rest is None else rest.asm,
        IN_FLOAT32=interpreted,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        W=tile.k,
        warps=tile.warps,
        stages=tile.stages,
    )
