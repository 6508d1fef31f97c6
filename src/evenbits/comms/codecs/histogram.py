"""A histogram that tails do not spoil, and what partitions need of it: no sort, a few passes.

Bins are even in t(x) = ± log(1 + |x| / m), m the mean magnitude rounded to a power of two. Even bins in x itself put
the bulk of a heavy-tailed gradient (largest element 100 to 1000 times the mean) into a handful of bins, and then every
partition built on them is as coarse as that. t is linear in the bulk and gives the tails bins of equal relative width,
a percent or less. Each bin keeps the smallest and largest element that fell into it, so that the widths of parts are
exact whatever the bins are.
n: elements, B: bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_WIDEST, _FINEST = 1e37, 1e-30  # ranges that float32 can be divided by; others are binned in float64


@dataclass(frozen=True)
class Histogram:
    """Which bin every element is in, and what the bins hold.

    x_n: the elements, float32, or float64 where float32 would overflow or underflow. bins_n: int32.
    counts_B: int64. least_B, most_B: the smallest and largest element of a bin (of empty bins +inf and −inf).
    """

    x_n: torch.Tensor
    bins_n: torch.Tensor
    counts_B: torch.Tensor
    least_B: torch.Tensor
    most_B: torch.Tensor


def workable(flat: torch.Tensor) -> torch.Tensor:
    """float32 [n] as it is, or in float64 if differences of its elements are beyond float32's range."""
    top = max(float(flat.amax()), -float(flat.amin()))
    return flat.double() if top > _WIDEST or 0 < top < _FINEST else flat


def histogram(flat: torch.Tensor, bins: int) -> Histogram:
    """Finite float32 [n], n > 0 → Histogram of `bins` bins."""
    x_n = workable(flat)
    mean = float(x_n.abs().mean())
    middle = 2.0 ** round(math.log2(mean)) if mean else 1.0
    t_n = (x_n.abs() / middle).log1p_().copysign_(x_n)
    lo, hi = float(t_n.amin()), float(t_n.amax())
    factor = bins / (hi - lo) if hi - lo > _FINEST else 0.0
    bins_n = t_n.sub_(lo).mul_(factor).to(torch.int32).clamp_(0, bins - 1)
    index_n = bins_n.long()
    return Histogram(x_n, bins_n, torch.bincount(index_n, minlength=bins), *spans(index_n, x_n, x_n, bins))


def spans(
    index_n: torch.Tensor, least_n: torch.Tensor, most_n: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest of least_n and the largest of most_n for every value of the index, [count] each (+inf, −inf where
    there is none)."""
    empty = least_n.new_full((count,), torch.inf)
    return empty.scatter_reduce(0, index_n, least_n, "amin"), (-empty).scatter_reduce(0, index_n, most_n, "amax")


def cube_root(found: Histogram, parts: int) -> torch.Tensor:
    """The part of every bin, int64 [B]: parts of equal ∫ f^(1/3), the asymptotic optimum (Panter and Dite, 1951).

    Of a bin with share h and width w, f^(1/3) · w = h^(1/3) · w^(2/3).
    """
    counts = found.counts_B.double()
    edges = torch.where(counts > 0, found.most_B.double(), -torch.inf).cummax(dim=0).values
    start = found.least_B.double()
    # A bin reaches from the largest element before it to its own largest.
    before = torch.cat([start.amin().reshape(1), edges[:-1]])
    width = torch.where(counts > 0, edges - torch.maximum(before, start.amin()), 0.0)
    weight = counts.pow(1 / 3) * width.pow(2 / 3)
    total = float(weight.sum())
    if total == 0:
        return torch.zeros_like(found.counts_B)
    middle = weight.cumsum(dim=0) - weight / 2
    return (middle * (parts / total)).long().clamp_(0, parts - 1)


def least_error(found: Histogram, parts: int) -> torch.Tensor:
    """The part of every bin, int64 [B]: of all cuts into at most `parts` parts the one of least Σ P w², where P is the
    share of a part and w the width of what lies in it; by dynamic programming, O(parts · B²)."""
    counts = found.counts_B.double()
    size = len(counts)
    total = torch.cat([counts.new_zeros(1), counts.cumsum(dim=0)])
    # From bin k to bin j − 1: the largest element before j and the smallest one from k on.
    most = torch.cat([counts.new_full((1,), -torch.inf), found.most_B.double().cummax(dim=0).values])
    least = torch.cat([found.least_B.double().flip(0).cummin(dim=0).values.flip(0), counts.new_full((1,), torch.inf)])
    unit = float(most[-1] - least[0]) or 1.0
    width = (most[None, :] - least[:, None]).div_(unit).clamp_(min=0)
    cost = (total[None, :] - total[:, None]).mul_(width.square_())
    cost.masked_fill_(torch.ones_like(cost, dtype=torch.bool).tril(-1), torch.inf)
    best, choices = cost[0], []
    for _ in range(parts - 1):
        best, chosen = (best[:, None] + cost).min(dim=0)
        choices.append(chosen)
    part_B = torch.zeros(size, dtype=torch.int64, device=counts.device)
    end = size
    for part, chosen in zip(range(parts - 1, 0, -1), reversed(choices), strict=True):
        start = int(chosen[end])
        part_B[start:end] = part
        end = start
    return part_B
