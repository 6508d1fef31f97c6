"""Scale search: the scale of least squared error, per tensor, row or group, for any symmetric element type.

The largest value of the type is mapped to r · absmax. r runs over a coarse geometric grid and then takes halving steps
around the best, down to about 2.5 %: 16 passes (a few more for groups where one far outlier sets absmax). Pairs have a
search of their own (numerics/pair_search.py).

The error is that of the element type as it is packed, under the encoder's policy, weighted by `importance` if given.
R: rows, G: groups, g: group size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from evenbits.numerics import elements, ovp, pair_search
from evenbits.numerics.blocks import Block, positive
from evenbits.numerics.elements import PairType
from evenbits.numerics.format import Format
from evenbits.numerics.scales import neighbours, real, store

_GRID = (1.5, 1.22, 0.82, 0.67, 0.55, 0.45, 0.37, 0.3, 0.25)  # times absmax; 1.0 is always tried
_LOWEST = 1e-3
_FINER = ((0.905, 1.105), (0.952, 1.05), (0.976, 1.025))  # times the best so far


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


def search_scale(block: Block, fmt: Format, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The best unrounded scale of every group and its squared error, [R, G] each (shared: [1, 1]).

    Groups of zeros get scale 1. Never worse than spanning absmax.
    """
    start = time.perf_counter()
    if isinstance(fmt.dtype, PairType):
        kind, finest = ovp.pair_kind(fmt.dtype.kind), fmt.storage != "e4m3"
        scale, error, passes = pair_search.searched(block, kind, policy, finest=finest)
        _count(block, passes, start)
        return scale, error
    top = block.absmax()
    unit = top / elements.largest(fmt.dtype)
    best_scale = positive(unit)
    best_error = block.error(best_scale, fmt, policy)
    passes = 1

    def attempt(scale: torch.Tensor, allowed: torch.Tensor | None = None) -> None:
        nonlocal best_scale, best_error, passes
        scale = positive(scale)
        error = block.error(scale, fmt, policy)
        better = error < best_error if allowed is None else (error < best_error) & allowed
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
        passes += 1

    for ratio in _GRID:
        attempt(unit * ratio)
    # Few levels and a far outlier: a smaller scale may be better. A group goes on down to half its root mean square,
    # and from the end of the grid until four steps gained nothing; no group's scale depends on another group.
    lowest, at_end = block.three_sigma(top) / 6, best_scale < unit * (ratio * 1.001)
    while ratio > _LOWEST and bool((allowed := at_end | (lowest <= ratio * 0.8)).any()):
        ratio *= 0.8
        attempt(unit * ratio, allowed)
        at_end = allowed & (best_scale < unit * (ratio * 0.8**-3.5))
    for ratios in _FINER:
        centre = best_scale
        for ratio in ratios:
            attempt(centre * ratio)
    best_scale = torch.where(top == 0, torch.ones_like(top), best_scale)
    _count(block, passes, start)
    return best_scale, best_error


def search_released(block: Block, fmt: Format, policy: str) -> torch.Tensor:
    """The released OliVe search (pairs): r · max(|mean ± 3 std|), r = 0.75, 0.77 … 2.49; [R, G] or [1, 1]."""
    start = time.perf_counter()
    assert isinstance(fmt.dtype, PairType)
    scale = pair_search.released(block, ovp.pair_kind(fmt.dtype.kind), policy)
    _count(block, len(pair_search.RELEASED), start)
    return scale


def round_scale(
    block: Block, scale: torch.Tensor, fmt: Format, policy: str, factor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales as stored and the groups' errors under them; coarse storages try the steps beside the nearest as well."""
    start, passes = time.perf_counter(), 0
    best = store(scale, fmt.storage, factor)
    raw = torch.uint8 if best.element_size() == 1 else best.dtype  # float8 knows few operations
    best_error = torch.empty(scale.shape, dtype=torch.float64, device=scale.device)
    for rows in [slice(0, 1)] if block.shared else block.slices():
        part = block if block.shared else Block(block.x_RGg[rows], False, block.importance_Gg)
        row_factor = factor if factor is None or len(factor) == 1 else factor[rows]
        found, best_error[rows], passes = _rounded_best(part, best[rows], fmt, policy, row_factor)
        best.view(raw)[rows] = found.view(raw)
    _count(block, passes, start)
    return best, best_error


def _rounded_best(
    block: Block, stored: torch.Tensor, fmt: Format, policy: str, factor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    best, best_error = stored, block.error(real(stored, factor), fmt, policy)
    others = neighbours(stored)
    for other in others:
        error = block.error(real(other, factor), fmt, policy)
        better = error < best_error
        # float8 has no `where`: one-byte scales are chosen as bytes.
        best = torch.where(better, other.view(torch.uint8), best.view(torch.uint8)).view(best.dtype)
        best_error = torch.where(better, error, best_error)
    return best, best_error, 1 + len(others)


def _count(block: Block, passes: int, start: float) -> None:
    cost = _cost.get()
    if cost is not None:
        cost.passes += passes
        cost.elements += passes * block.x_RGg.numel()
        cost.seconds += time.perf_counter() - start
