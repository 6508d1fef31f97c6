"""Scale search: the scale of least squared error, per tensor, row or group, for any symmetric element type.

The range of the type (for pairs: of its normal values) is mapped to r · base. `base` is three standard deviations for
pairs, as OliVe anchors it, and absmax for everything else. r runs over a coarse geometric grid and then takes halving
steps around the best, down to about 6 % for pairs and 2.5 % for the rest: 17 and 16 passes instead of the released
code's 88 (a few more where one far outlier sets absmax and numbers are not pairs).

The error is that of the element type as it is packed, under the encoder's policy, weighted by `importance` if given.
Groups are searched all at once, in slices of rows that fit the cache. R: rows, G: groups, g: group size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from evenbits.numerics import elements
from evenbits.numerics.elements import PairType
from evenbits.numerics.format import Format
from evenbits.numerics.scales import neighbours, real, store

_GRID_PAIRS = tuple(0.15 * 16 ** (i / 11) for i in range(12))  # 0.15 … 2.4 times 3σ
_GRID = (1.5, 1.22, 0.82, 0.67, 0.55, 0.45, 0.37, 0.3, 0.25)  # times absmax; 1.0 is always tried
_LOWEST = 1e-3
_FINER_PAIRS = ((0.885, 1.13), (0.94, 1.065))  # times the best so far
_FINER = ((0.905, 1.105), (0.952, 1.05), (0.976, 1.025))
_SLICE = 1 << 15  # elements
_WIDE = 2.0**48


@dataclass
class SearchCost:
    """What searching took: full passes over tensors (one candidate for every group) and seconds."""

    passes: int = 0
    seconds: float = 0.0
    elements: int = 0


_cost: ContextVar[SearchCost | None] = ContextVar("evenbits_search_cost", default=None)


@contextmanager
def counting_cost() -> Iterator[SearchCost]:
    """Adds up the cost of every search inside the block."""
    cost = SearchCost()
    token = _cost.set(cost)
    try:
        yield cost
    finally:
        _cost.reset(token)


@dataclass(frozen=True)
class Block:
    """Groups of one size. x_RGg: float32; shared: one scale for all rows (per tensor); importance_Gg: weights."""

    x_RGg: torch.Tensor
    shared: bool = False
    importance_Gg: torch.Tensor | None = None

    def error(self, scale_RG: torch.Tensor, fmt: Format, policy: str) -> torch.Tensor:
        """Squared error, float64 [R, G] (shared: [1, 1]), of the groups under their scales."""
        rows, groups, size = self.x_RGg.shape
        level = elements.largest(fmt.dtype)
        level = level if level > _WIDE else 1.0  # wide powers of two: their squares overflow float32
        step = max(1, _SLICE // (groups * size))
        parts = []
        for start in range(0, rows, step):
            x = self.x_RGg[start : start + step]
            scale = scale_RG if self.shared else scale_RG[start : start + step]
            scale = scale.unsqueeze(-1)
            importance = None if self.importance_Gg is None else self.importance_Gg.reshape(-1)
            u = (x / scale).float().reshape(len(x), -1)
            miss = elements.nearest(u, fmt.dtype, policy, importance, full_range=fmt.rule.full_range).sub_(u)
            miss = (miss if level == 1 else miss.div_(level)).square_().reshape(x.shape)
            if self.importance_Gg is not None:
                miss = miss * self.importance_Gg
            # Squares of scales below 1e-23 are zero in float32, and above 1e19 infinite.
            parts.append(miss.sum(dim=-1).double() * (scale.squeeze(-1).double() * level).square())
        error = torch.cat(parts)
        return error.sum(dim=(0, 1), keepdim=True) if self.shared else error

    def absmax(self) -> torch.Tensor:
        """The largest magnitude of each group: [R, G], or [1, 1] if shared."""
        dims = (0, 1, 2) if self.shared else (2,)
        value = torch.maximum(self.x_RGg.amax(dim=dims), -self.x_RGg.amin(dim=dims))  # no copy of x
        return value.reshape(1, 1) if self.shared else value

    def base(self, fmt: Format) -> torch.Tensor:
        """What r is relative to, as a multiple of absmax: 1, or of pairs 3σ / absmax; [R, G], or [1, 1] if shared."""
        top = self.absmax()
        if not isinstance(fmt.dtype, PairType):
            return torch.ones_like(top)
        # Divided first: squares of what is below 1e-23 are zero in float32.
        divisor, step = _or_one(top).unsqueeze(-1), max(1, _SLICE // self.x_RGg[0].numel())
        means = [
            (part / (divisor if self.shared else divisor[start : start + step])).square_().mean(dim=2)
            for start in range(0, len(self.x_RGg), step)
            for part in [self.x_RGg[start : start + step]]
        ]
        mean = torch.cat(means)
        return 3 * (mean.mean(dim=(0, 1), keepdim=True) if self.shared else mean).sqrt()


def _or_one(top: torch.Tensor) -> torch.Tensor:
    return torch.where(top == 0, torch.ones_like(top), top)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)


def search_scale(block: Block, fmt: Format, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The best unrounded scale of every group and its squared error, [R, G] each (shared: [1, 1]).

    Groups of zeros get scale 1. Never worse than spanning absmax.
    """
    start = time.perf_counter()
    pairs = isinstance(fmt.dtype, PairType)
    top = block.absmax()
    spanning = top / elements.largest(fmt.dtype)
    unit = spanning * block.base(fmt)
    best_scale = _positive(spanning)
    best_error = block.error(best_scale, fmt, policy)
    passes = 1

    def attempt(scale: torch.Tensor) -> None:
        nonlocal best_scale, best_error, passes
        scale = _positive(scale)
        error = block.error(scale, fmt, policy)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
        passes += 1

    grid, finer = (_GRID_PAIRS, _FINER_PAIRS) if pairs else (_GRID, _FINER)
    for ratio in grid:
        attempt(unit * ratio)
    # Few levels and a far outlier: where the smallest scale of the grid is best, a smaller one may be better.
    while not pairs and ratio > _LOWEST and bool((best_scale < unit * (ratio * 1.001)).any()):
        ratio *= 0.8
        attempt(unit * ratio)
    for ratios in finer:
        centre = best_scale
        for ratio in ratios:
            attempt(centre * ratio)
    best_scale = torch.where(top == 0, torch.ones_like(top), best_scale)
    _count(block, passes, start)
    return best_scale, best_error


def search_released(block: Block, fmt: Format, policy: str) -> torch.Tensor:
    """The released OliVe search: r · max(|mean ± 3 std|), r = 0.75, 0.77 … 2.49; [R, 1] or [1, 1]."""
    start = time.perf_counter()
    top = block.absmax()
    unit = _or_one(top)
    x = block.x_RGg / unit.unsqueeze(-1)
    x = x.reshape(1, 1, -1) if block.shared else x
    mean, deviation = x.mean(dim=-1), x.std(dim=-1)
    base = torch.maximum((mean + 3 * deviation).abs(), (mean - 3 * deviation).abs())
    base = torch.where(top == 0, torch.ones_like(top), base) * (unit / elements.largest(fmt.dtype))
    best_scale = _positive(base * 0.75)
    best_error = block.error(best_scale, fmt, policy)
    for percent in range(77, 250, 2):
        scale = _positive(base * (percent / 100))
        error = block.error(scale, fmt, policy)
        better = error < best_error
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    _count(block, 88, start)
    return best_scale


def round_scale(
    block: Block, scale: torch.Tensor, fmt: Format, policy: str, factor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales as stored and the groups' errors under them; coarse storages try the steps beside the nearest as well."""
    start = time.perf_counter()
    best = store(scale, fmt.storage, factor)
    best_error = block.error(real(best, factor), fmt, policy)
    others = neighbours(best)
    for other in others:
        error = block.error(real(other, factor), fmt, policy)
        better = error < best_error
        # float8 has no `where`: one-byte scales are chosen as bytes.
        best = torch.where(better, other.view(torch.uint8), best.view(torch.uint8)).view(best.dtype)
        best_error = torch.where(better, error, best_error)
    _count(block, 1 + len(others), start)
    return best, best_error


def _count(block: Block, passes: int, start: float) -> None:
    cost = _cost.get()
    if cost is not None:
        cost.passes += passes
        cost.elements += passes * block.x_RGg.numel()
        cost.seconds += time.perf_counter() - start
