"""Activations → int8 codes, by fused kernels (C, Triton) or by torch: the same codes and scales, bit for bit.

M: rows (tokens), K: columns (input channels).
"""

from __future__ import annotations

from functools import cache

import torch

from evenbits.kernels import dispatch
from evenbits.kernels.fused import Rows
from evenbits.numerics.affine import qparams, to_codes
from evenbits.numerics.format import Format
from evenbits.numerics.qdtypes import QDtype

parse_format = cache(Format.parse)


def quantize_rows(
    x: torch.Tensor,
    fmt: Format,
    multiplier: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., K] → (codes int8 [M, K], scale float32 [M, 1], zero point int32 [M, 1]); see ops.quantize_rows."""
    rows = fused_rows(x, fmt, multiplier, scale, zero_point)
    if rows is not None:
        return rows.kernels.quantize(x, rows)
    x_MK = _balanced(x, multiplier)
    lo, hi = _row_range(x_MK)
    # A code can be neither NaN nor infinite, so a row that holds one gets the scale NaN: it comes out as NaN and not as
    # a plausible number. With a calibrated scale, infinities saturate like anything beyond it.
    broken = hi.isnan() if scale is not None else ~(lo.isfinite() & hi.isfinite())
    if scale is None:
        scale, zero_point = _dynamic(lo, hi, fmt)
    codes = to_codes(x_MK, scale, zero_point, fmt).masked_fill_(broken, 0)
    row_scale = torch.where(broken, torch.nan, scale.reshape(-1, 1)).expand(x_MK.shape[0], 1)
    zero = scale.new_zeros((), dtype=torch.int32) if zero_point is None else zero_point
    # An op may not hand back its own input: of one row, `contiguous` alone would be the calibrated zero point itself.
    row_zero = torch.where(broken, 0, zero.reshape(-1, 1)).expand(x_MK.shape[0], 1)
    return codes, row_scale.contiguous(), row_zero.clone(memory_format=torch.contiguous_format)


def fused_rows(
    x: torch.Tensor,
    fmt: Format,
    multiplier: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
) -> Rows | None:
    """The fused kernels' account of this quantization, or None where torch has to do it: another backend, formats whose
    zero point is not a code, unsigned codes, a scale for every row given, a float64 multiplier."""
    limits, kernels = _limits(fmt), dispatch.fused(x.device.type)
    if limits is None or kernels is None:
        return None
    odd_scale = (scale is not None and scale.numel() != 1) or (zero_point is not None and zero_point.numel() != 1)
    if odd_scale or not x.is_floating_point() or x.shape[-1] == 0:
        return None
    if multiplier is not None:
        if multiplier.dtype == torch.float64:
            return None
        multiplier = multiplier.float().contiguous()
    whole = scale is None and fmt.granularity.kind == "tensor"
    if whole and x.numel():
        lo, hi = _row_range(_balanced(x, multiplier))
        scale, zero_point = _dynamic(lo, hi, fmt)
    scale = None if scale is None else scale.float()
    zero_point = None if zero_point is None else zero_point.to(torch.int32)
    return Rows(kernels, *limits, multiplier, scale, zero_point, finite=whole)


@cache
def _limits(fmt: Format) -> tuple[int, int, float, bool] | None:
    """Smallest and largest code, levels, whether affine; None if fused kernels do not have the format."""
    dtype, rule = fmt.dtype, fmt.rule
    if not isinstance(dtype, QDtype) or not dtype.signed or not rule.zero_exact:
        return None
    levels = (dtype.qmax - dtype.qmin) / 2 if rule.full_range else float(dtype.qmax)
    return *fmt.code_range, levels, not rule.symmetric


def _balanced(x: torch.Tensor, multiplier: torch.Tensor | None) -> torch.Tensor:
    x_MK = x.reshape(-1, x.shape[-1]).float()
    return x_MK if multiplier is None else x_MK * multiplier


def _dynamic(lo: torch.Tensor, hi: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor | None]:
    if fmt.granularity.kind == "tensor" and lo.numel():
        lo, hi = lo.amin(dim=0, keepdim=True), hi.amax(dim=0, keepdim=True)
    return qparams(lo, hi, fmt)


def _row_range(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each row, [M, 1] each."""
    if not x_MK.numel():
        zeros = x_MK.new_zeros(x_MK.shape[0], 1)
        return zeros, zeros
    # Two passes: torch.aminmax over a dimension is ten times slower than amin and amax together (CPU, torch 2.13).
    return x_MK.amin(dim=1, keepdim=True), x_MK.amax(dim=1, keepdim=True)
