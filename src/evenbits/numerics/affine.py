"""Affine and scale quantization: x ≈ scale · (code − zero_point).

    scale quantization (symmetric)   scale = absmax / 127  (or / 127.5),   zero_point = none
    affine                           scale = (max − min) / (qmax − qmin),  zero_point = qmin − round(min / scale)

The range of an affine format is widened to include zero, so that zero (padding, ReLU, a pruned weight) is a code,
unless the format says `free`: then the range is taken as it is and the zero point may lie outside the codes, which is
why it is kept as int32. Dividing max alone by 255, as some documents do, loses everything below zero and spreads the
codes over [0, max] even if min is far from it (docs/numerics.md works it through).

A range of zero width gives scale 1 (all zeros) or |c| (a constant c under `free`), never 0: no NaN comes out. A `free`
range far from zero has a scale of at least |x| / 2³⁰, so that its zero point fits into int32. Decoding saturates at the
largest finite number: a code may stand for half a step more than the float that it came from.
Rounding is to nearest, ties to even. Scales are float32; codes are computed with the float32 scale that is stored.
Source: B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018, section 2.1.
"""

from __future__ import annotations

import torch

from evenbits.errors import EvenbitsError
from evenbits.numerics.elements import largest
from evenbits.numerics.format import Format

_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max
_FREE_FLOOR = 2.0**-30  # scale / |x| of a free format; float32 itself resolves 2**-24


def qparams(lo: torch.Tensor, hi: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Range → (scale float32, zero_point int32 or None), elementwise.

    lo, hi: float tensors of one shape, lo ≤ hi. Raises EvenbitsError if an unsigned symmetric format meets a negative
    lo.
    """
    if fmt.rule.symmetric:
        return symmetric_scale(lo, hi, fmt), None
    qmin, qmax = fmt.code_range
    lo, hi = lo.double(), hi.double()  # max − min of two float32 is not a float32
    if fmt.rule.zero_exact:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    width = (hi - lo) / (qmax - qmin)
    if not fmt.rule.zero_exact:
        width = torch.where(width > 0, torch.maximum(width, torch.maximum(lo.abs(), hi.abs()) * _FREE_FLOOR), width)
    scale = _safe(width, torch.where(hi == 0, torch.ones_like(hi), hi.abs()))
    return scale, zero_points(lo, scale, fmt)


def zero_points(lo: torch.Tensor, scale: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The zero points (int32) that make the smallest code stand for lo, elementwise."""
    qmin, qmax = fmt.code_range
    lo = lo.double().clamp(max=0) if fmt.rule.zero_exact else lo.double()
    zero_point = qmin - torch.round(lo / scale.double())
    if fmt.rule.zero_exact:
        zero_point = zero_point.clamp(qmin, qmax)
    limit = torch.iinfo(torch.int32)
    return zero_point.clamp(limit.min, limit.max).to(torch.int32)


def symmetric_scale(lo: torch.Tensor, hi: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The scale (float32, positive) that maps the larger end of [lo, hi] to the largest value of the element type.

    Raises EvenbitsError if an unsigned type meets a negative lo.
    """
    if not fmt.dtype.signed and bool((lo < 0).any()):
        raise EvenbitsError(
            f"{fmt}: an unsigned format without a zero point cannot hold negative values (smallest: "
            f"{float(lo.min()):g}); use {fmt.dtype.name[1:]!r}, or ':affine' for integers."
        )
    if fmt.rule.full_range:
        levels = (fmt.integer.qmax - fmt.integer.qmin) / 2
    else:
        # MX: the exponent of the largest number, less that of FP4's largest (4 = 2²); 6 is reached by saturating.
        levels = 4.0 if fmt.rule.block == "mx" else largest(fmt.dtype)
    scale = torch.maximum(lo.abs(), hi.abs()) / levels
    return _safe(scale, torch.ones_like(scale))


def _safe(scale: torch.Tensor, if_zero: torch.Tensor) -> torch.Tensor:
    scale = torch.where(scale == 0, if_zero, scale)
    return scale.clamp(_TINY, _HUGE).float()


def to_codes(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, fmt: Format) -> torch.Tensor:
    """Floats → codes in the storage type of `fmt` (int8 or uint8); scale and zero point broadcast against x."""
    if zero_point is not None and not fmt.rule.zero_exact:
        x = x.double()  # a free zero point far from zero has more digits than float32
    codes = (x / scale).round_()
    if zero_point is not None:
        codes += zero_point
    return codes.clamp_(*fmt.code_range).to(fmt.integer.storage)


def from_codes(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
    """Codes → finite float32, scale · (code − zero_point)."""
    values = codes.to(torch.float32)
    if zero_point is not None:
        # In int32: a free zero point far from zero would lose its low bits in float32.
        values = (codes.to(torch.int32) - zero_point).to(torch.float32)
    return (values * scale).clamp_(-_HUGE, _HUGE)
