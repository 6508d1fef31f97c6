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

import math
from typing import Literal

import torch

Storage = Literal["float32", "float16", "e4m3", "e8m0"]
_E4M3_LARGEST, _E4M3_SMALLEST = 448.0, 2.0**-9
_FLOAT16_RANGE = (2.0**-13, 2.0**15)


def factor_for(scale: torch.Tensor, storage: Storage, used: torch.Tensor | None = None) -> torch.Tensor | None:
    """The per-tensor factor (float32 [1]) that scales of a tensor are stored relative to, or None if there is none.

    used: bool like scale, False for groups of zeros: their scale says nothing and must not crowd out the others.
    """
    if used is not None and bool(used.any()):
        scale = scale[used]
    largest = float(scale.max())
    if storage == "e4m3":
        return torch.tensor([max(largest / _E4M3_LARGEST, torch.finfo(torch.float32).tiny)], device=scale.device)
    if storage == "float16":
        low, high = _FLOAT16_RANGE
        if float(scale.min()) < low or largest > high:
            return torch.tensor([2.0 ** (math.floor(math.log2(largest)) - 10)], device=scale.device)
    return None


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
        lowest, highest, steps = 1, 126, (-2, -1, 1, 2)
    elif stored.dtype == torch.uint8:
        lowest, highest, steps = 0, 254, (-1, 1)
    else:
        return []
    codes = stored.view(torch.uint8).to(torch.int16)
    return [(codes + step).clamp(lowest, highest).to(torch.uint8).view(stored.dtype) for step in steps]
