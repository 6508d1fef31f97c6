"""Scale rules: which range [lo, hi] of the numbers in a group the codes should span.

`minmax` spans everything. `percentile` cuts the tails (nearest rank, no interpolation). `mse`, here for affine formats
only (numerics/search.py serves the symmetric ones), shrinks the min-max range by the factor of least squared error,
first in coarse steps, then in fine ones around the best; the full range is among the candidates, so it is never worse
than min-max.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from evenbits.numerics.affine import from_codes, qparams, to_codes
from evenbits.numerics.format import Format

_COARSE = [i / 10 for i in range(10, 1, -1)]  # 1.0, 0.9 … 0.2
_FINE = [i / 50 for i in range(-4, 5) if i]  # ±0.02 … ±0.08 around the best


def find_range(x_RGg: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Range of each group: float [R, G, g] → (lo, hi), each [R, G]. Raises what `qparams` raises."""
    rule = fmt.rule
    if rule.range == "percentile":
        return _percentile(x_RGg, rule.percentile, symmetric=rule.symmetric)
    lo, hi = x_RGg.amin(dim=-1), x_RGg.amax(dim=-1)
    return _least_error(x_RGg, lo, hi, fmt) if rule.range == "mse" else (lo, hi)


def _percentile(x_RGg: torch.Tensor, percent: float, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    size = x_RGg.shape[-1]
    # As a fraction of what is written: in floats, 99.9 % of 1000 is a hair above 999 and nothing would be cut.
    rank = min(size, max(1, math.ceil(Fraction(repr(percent)) * size / 100)))
    if symmetric:
        hi = x_RGg.abs().kthvalue(rank, dim=-1).values
        lo = torch.where(x_RGg.amin(dim=-1) < 0, -hi, torch.zeros_like(hi))
        return lo, hi
    return x_RGg.kthvalue(size - rank + 1, dim=-1).values, x_RGg.kthvalue(rank, dim=-1).values


def _least_error(
    x_RGg: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, fmt: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    best_ratio = torch.ones_like(lo)
    best_error = torch.full_like(lo, math.inf, dtype=torch.float64)

    def attempt(ratio: torch.Tensor) -> None:
        nonlocal best_ratio, best_error
        scale, zero_point = qparams(lo * ratio, hi * ratio, fmt)
        assert zero_point is not None  # symmetric formats are searched by numerics/search.py
        scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
        decoded = from_codes(to_codes(x_RGg, scale, zero_point, fmt), scale, zero_point)
        error = (decoded - x_RGg).double().square_().sum(dim=-1)  # squares of 1e-23 are zero in float32
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_ratio = torch.where(better, ratio, best_ratio)

    for ratio in _COARSE:
        attempt(torch.full_like(lo, ratio))
    centre = best_ratio.clone()
    for step in _FINE:
        attempt((centre + step).clamp(max=1.0))
    return lo * best_ratio, hi * best_ratio
