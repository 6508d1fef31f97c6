"""Scale search: the scale of least squared error, per tensor, row or group, for any symmetric element type.

The range of the type (for pairs: of its normal values) is mapped to r · base. `base` is three standard deviations for
pairs, as OliVe anchors it, and absmax for everything else. r runs over a coarse geometric grid and then takes halving
steps around the best, down to about 6 % for pairs and 2.5 % for the rest: 13 and 16 passes instead of the released
code's 88.

The error is that of the element type as it is packed, under the encoder's policy, weighted by `importance` if given.
Groups are searched all at once, in slices of rows that fit the cache. R: rows, G: groups, g: group size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from evenbits.numerics import elements
from evenbits.numerics.elements import ElementType, PairType
from evenbits.numerics.scales import Storage, neighbours, real, store

_GRID_PAIRS = (0.2, 0.33, 0.55, 0.9, 1.5, 2.4)  # times 3σ
_GRID = (1.5, 1.22, 0.82, 0.67, 0.55, 0.45, 0.37, 0.3, 0.25)  # times absmax; 1.0 is always tried
_FINER_PAIRS = ((0.78, 1.28), (0.885, 1.13), (0.94, 1.065))  # times the best so far
_FINER = ((0.905, 1.105), (0.952, 1.05), (0.976, 1.025))
_SLICE = 1 << 15  # elements


@dataclass
class SearchCost:
    """What searching took: full passes over tensors (one candidate for every group) and seconds."""

    passes: int = 0
    seconds: float = 0.0
    elements: int = 0
    started: float = field(default=0.0, repr=False)


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

    def error(self, scale_RG: torch.Tensor, element: ElementType, policy: str) -> torch.Tensor:
        """Squared error [R, G] (shared: [1, 1]) of the groups under their scales."""
        rows, groups, size = self.x_RGg.shape
        step = max(1, _SLICE // (groups * size))
        parts = []
        for start in range(0, rows, step):
            x = self.x_RGg[start : start + step]
            scale = scale_RG if self.shared else scale_RG[start : start + step]
            scale = scale.unsqueeze(-1)
            importance = None if self.importance_Gg is None else self.importance_Gg.reshape(-1)
            u = (x / scale).reshape(len(x), -1)
            miss = elements.nearest(u, element, policy, importance).sub_(u).square_().reshape(x.shape)
            if self.importance_Gg is not None:
                miss = miss * self.importance_Gg
            parts.append(miss.sum(dim=-1) * scale.squeeze(-1).square())
        error = torch.cat(parts)
        return error.sum(dim=(0, 1), keepdim=True) if self.shared else error

    def base(self, element: ElementType) -> torch.Tensor:
        """What r is relative to: [R, G], or [1, 1] if shared; 0 where a group is all zeros."""
        dims = (0, 1, 2) if self.shared else (2,)
        if isinstance(element, PairType):
            value = 3 * self.x_RGg.square().mean(dim=dims).sqrt()
        else:
            value = self.x_RGg.abs().amax(dim=dims)
        return value.reshape(1, 1) if self.shared else value


def search_scale(block: Block, element: ElementType, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The best unrounded scale of every group and its squared error, float32 [R, G] each (shared: [1, 1]).

    Groups of zeros get scale 1. Never worse than spanning absmax.
    """
    start = time.perf_counter()
    pairs = isinstance(element, PairType)
    base = block.base(element)
    empty = base == 0
    unit = torch.where(empty, torch.ones_like(base), base) / elements.largest(element)
    top = block.x_RGg.abs().amax(dim=(0, 1, 2) if block.shared else (2,)).reshape(base.shape)
    spanning = torch.where(empty, torch.ones_like(base), top / elements.largest(element))
    best_scale = spanning.clamp(min=torch.finfo(torch.float32).tiny)
    best_error = block.error(best_scale, element, policy)
    passes = 1
    grid, finer = (_GRID_PAIRS, _FINER_PAIRS) if pairs else (_GRID, _FINER)
    for stage, ratios in enumerate((grid, *finer)):
        centre = best_scale if stage else unit
        for ratio in ratios:
            scale = (centre * ratio).clamp(min=torch.finfo(torch.float32).tiny)
            error = block.error(scale, element, policy)
            better = error < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_error = torch.where(better, error, best_error)
            passes += 1
    best_scale = torch.where(empty, torch.ones_like(base), best_scale)
    _count(block, passes, start)
    return best_scale, best_error


def round_scale(
    block: Block, scale: torch.Tensor, element: ElementType, policy: str, storage: Storage, factor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales as stored and the groups' errors under them; coarse storages try the steps beside the nearest as well."""
    start = time.perf_counter()
    best = store(scale, storage, factor)
    best_error = block.error(real(best, factor), element, policy)
    others = neighbours(best) if storage == "e4m3" else []
    for other in others:
        error = block.error(real(other, factor), element, policy)
        better = error < best_error
        # float8 has no where: it is chosen as bytes.
        chosen = torch.where(better, other.view(torch.uint8), best.view(torch.uint8))
        best, best_error = chosen.view(torch.float8_e4m3fn), torch.where(better, error, best_error)
    _count(block, 1 + len(others), start)
    return best, best_error


def _count(block: Block, passes: int, start: float) -> None:
    cost = _cost.get()
    if cost is not None:
        cost.passes += passes
        cost.elements += passes * block.x_RGg.numel()
        cost.seconds += time.perf_counter() - start
