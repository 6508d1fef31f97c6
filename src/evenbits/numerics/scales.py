"""How scales are stored: float32, float16, E4M3 with one float32 factor per tensor, or powers of two.

float32  integer formats; any format with one scale per tensor
float16  other formats per row or in groups of 64 and more; a power-of-two factor per tensor if out of range
e4m3     groups below 64; the factor maps the largest scale of the tensor to E4M3's largest, 448
e8m0     MX formats: 2^(code − 127)

The factor of E4M3 scales follows from the largest group scale and not from the tensor's absmax: what a group scale may
be is the format's business, and a factor taken from absmax / 96 makes ordinary scales saturate (13.4 dB instead of
20.2).
A scale that is not zero never becomes zero: it is rounded up to the smallest one the storage has.
"""

from __future__ import annotations

from typing import Literal

import torch

Storage = Literal["float32", "float16", "e4m3", "e8m0"]
_E4M3_LARGEST, _E4M3_SMALLEST = 448.0, 2.0**-9
_FLOAT16_RANGE = (2.0**-13, 2.0**15)


def factor_for(
    scale: torch.Tensor, storage: Storage, used: torch.Tensor | None = None, *, by_row: bool = False
) -> torch.Tensor | None:
    """The factor (float32 [1], of a tensor) that scales are stored relative to, or None if there is none.

    used: bool like scale, False for groups of zeros: their scale says nothing and must not crowd out the others.
    by_row: a factor for each row of scales [R, G] instead, [R, 1], as if each row were a tensor: 1 where there is none.
    """
    if storage not in ("e4m3", "float16"):
        return None
    scale = scale if by_row else scale.reshape(1, -1)
    used = torch.ones_like(scale, dtype=torch.bool) if used is None else used.reshape(scale.shape)
    used = used | ~used.any(dim=1, keepdim=True)
    largest = scale.masked_fill(~used, 0.0).amax(dim=1, keepdim=True)
    if storage == "e4m3":
        factor = (largest.double() / _E4M3_LARGEST).clamp(min=torch.finfo(torch.float32).tiny).float()
        return factor if by_row else factor.reshape(1)
    low, high = _FLOAT16_RANGE
    smallest = scale.masked_fill(~used, torch.inf).amin(dim=1, keepdim=True)
    outside = (smallest < low) | (largest > high)
    if not by_row and not bool(outside):
        return None
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 11)
    factor = torch.where(outside, power, torch.ones_like(power))
    return factor if by_row else factor.reshape(1)


def store(scale: torch.Tensor, storage: Storage, factor: torch.Tensor | None) -> torch.Tensor:
    """Positive float32 scales → stored ones (float32, float16, float8_e4m3fn or uint8), to nearest."""
    relative = scale if factor is None else scale / factor
    if storage == "e4m3":
        return relative.clamp(_E4M3_SMALLEST, _E4M3_LARGEST).to(torch.float8_e4m3fn)
    if storage == "float16":
        return relative.clamp(2.0**-24, 65504.0).to(torch.float16)
    if storage == "e8m0":
        return (torch.frexp(relative).exponent + 126).clamp(0, 254).to(torch.uint8)
    return relative


def real(stored: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """Stored scales → float32."""
    if stored.dtype == torch.uint8:
        return torch.exp2(stored.float() - 127)
    scale = stored.float()
    # Of the very largest scales the rounded one may lie beyond float32.
    return scale if factor is None else (scale * factor).clamp(max=torch.finfo(torch.float32).max)


def neighbours(stored: torch.Tensor) -> list[torch.Tensor]:
    """Of one-byte scales: those up to two steps below and above each of `stored` (powers of two: one step); of others
    nothing, their steps are fine."""
    if stored.dtype == torch.float8_e4m3fn:
        lowest, highest, steps = 1, 126, [-2, -1, 1, 2]
    elif stored.dtype == torch.uint8:
        lowest, highest, steps = 0, 254, [-1, 1]
    else:
        return []
    codes = stored.view(torch.uint8).to(torch.int16)
    return [(codes + step).clamp(lowest, highest).to(torch.uint8).view(stored.dtype) for step in steps]
