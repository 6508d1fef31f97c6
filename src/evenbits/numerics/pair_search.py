"""The scales of pairs: a search over everything, and the released code's.

The largest normal value of the kind is mapped to r · 3σ. Where a few outliers have most of the energy the error has
many valleys: an outlier falls on one of seven values per sign, and every step of the scale shifts which. The search:

    1. coarse   26 values of r 12.6 % apart, 0.1 … 1.9 (int) or 0.16 … 3.1 (flint, 8 bits), and what spans absmax
    2. fine     0.94 … 1.06 in steps of 2 % around each of the two best of these
    3. finest   0.985 … 1.015 in steps of 0.5 % around the best of all (scales not stored as E4M3)

45 passes (E4M3: 39). The released code tries 88 values of r from 0.75 in steps of 0.02, under its own policy; with one
scale for a whole tensor those are tried as well (133 passes), so that ours is never behind; with many, the stages are
ahead of it in the sum over rows (docs/formats.md). Everything is done for a slice of rows before the next one.
R: rows, G: groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch

from evenbits.numerics.blocks import Block, or_one, positive
from evenbits.numerics.ovp import PairKind
from evenbits.numerics.pair_loss import PairLoss
from evenbits.numerics.threads import one_thread

RELEASED = tuple(percent / 100 for percent in range(75, 250, 2))
_COARSE = {  # flint and 8-bit pairs have more room below the top of their normal values, int less
    "int": tuple(0.1 * 1.126**i for i in range(26)),
    "flint": tuple(0.1 * 1.126**i for i in range(4, 30)),
    "int8": tuple(0.1 * 1.126**i for i in range(4, 30)),
}
_FINE = (0.94, 0.96, 0.98, 1.02, 1.04, 1.06)
_FINEST = (0.985, 0.99, 0.995, 1.005, 1.01, 1.015)

# Scales [R, G] (shared: [1, 1]) → squared errors of the groups, both relative to absmax.
_Loss: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"


@one_thread()
def searched(
    block: Block, kind: PairKind, policy: str, *, finest: bool = True
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The best unrounded scale of every group and its squared error, [R, G] each (shared: [1, 1]), and passes taken.

    finest: whether the third stage is worth it, which it is not where scales are stored in steps of several per cent.
    Groups of zeros get scale 1.
    """
    top = block.absmax()
    unit, base = or_one(top), block.three_sigma(top) / kind.normal_max
    scale, error = torch.empty_like(base), torch.empty(base.shape, dtype=torch.float64, device=base.device)
    for rows, loss in _parts(block, unit, kind, policy):
        relative, lost = _stages(loss, base[rows], kind, finest)
        if block.shared:  # one scale has no average over rows to rely on: the released candidates as well
            anchor = _published_anchor(block, unit) / kind.normal_max
            relative, lost = _best_of(loss, relative, lost, anchor, RELEASED)
        scale[rows] = positive(relative * unit[rows])
        error[rows] = lost.double() * unit[rows].double().square()
        del loss  # and its buffers, before the next one's
    passes = len(_COARSE["int"]) + 1 + 2 * len(_FINE) + (len(_FINEST) if finest else 0)
    passes += len(RELEASED) if block.shared else 0
    return scale.masked_fill_(top == 0, 1.0), error, passes


def _stages(loss: _Loss, base: torch.Tensor, kind: PairKind, finest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    smallest = torch.finfo(torch.float32).tiny
    best = second = torch.full_like(base, 1 / kind.normal_max)  # absmax is the unit
    error = loss(best)
    runner_up = torch.full_like(error, torch.inf)
    for ratio in _COARSE.get(kind.name, _COARSE["flint"]):  # flint_i8 is as flint
        scale = (base * ratio).clamp(min=smallest)
        found = loss(scale)
        better, close = found < error, found < runner_up
        second = torch.where(better, best, torch.where(close, scale, second))
        runner_up = torch.where(better, error, torch.where(close, found, runner_up))
        best, error = torch.where(better, scale, best), torch.where(better, found, error)
    for centre in (best, second):
        best, error = _best_of(loss, best, error, centre, _FINE)
    return _best_of(loss, best, error, best, _FINEST) if finest else (best, error)


def _best_of(
    loss: _Loss, best: torch.Tensor, error: torch.Tensor, centre: torch.Tensor, ratios: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of a scale, whose error is known, and multiples of another, for every group."""
    for ratio in ratios:
        scale = centre * ratio
        found = loss(scale)
        better = found < error
        best, error = torch.where(better, scale, best), torch.where(better, found, error)
    return best, error


@one_thread()
def released(block: Block, kind: PairKind, policy: str) -> torch.Tensor:
    """Of r · max(|mean ± 3 std|), r = 0.75, 0.77 … 2.49, the best for every group: [R, G] or [1, 1]. Zeros: scale 1."""
    top = block.absmax()
    unit = or_one(top)
    base = _published_anchor(block, unit) / kind.normal_max
    base = torch.where(top == 0, torch.ones_like(base), base)
    scales = []
    for rows, loss in _parts(block, unit, kind, policy):
        first = base[rows] * RELEASED[0]
        scale, _ = _best_of(loss, first, loss(first), base[rows], RELEASED[1:])
        scales.append(positive(scale * unit[rows]))
        del loss
    return torch.cat(scales)


def _published_anchor(block: Block, unit: torch.Tensor) -> torch.Tensor:
    """max(|mean ± 3 std|) of every group over `unit`."""
    moments = []  # divided first: squares of what is below 1e-23 are zero in float32
    for rows in block.slices():
        x = (block.x_RGg[rows] / (unit if block.shared else unit[rows]).unsqueeze(-1)).double()
        moments.append(torch.stack([x.sum(dim=-1), x.square().sum(dim=-1)]))
    total_RG, squares_RG = torch.cat(moments, dim=1)
    count = block.x_RGg.shape[2]
    if block.shared:
        count = block.x_RGg.numel()
        total_RG, squares_RG = total_RG.sum().reshape(1, 1), squares_RG.sum().reshape(1, 1)
    mean = total_RG / count
    deviation = ((squares_RG - count * mean.square()).clamp(min=0) / (count - 1)).sqrt()
    return torch.maximum((mean + 3 * deviation).abs(), (mean - 3 * deviation).abs()).to(unit.dtype)


def _parts(block: Block, unit: torch.Tensor, kind: PairKind, policy: str) -> Iterator[tuple[slice, _Loss]]:
    """Slices of rows and the errors of their groups; one slice and the sums of all, if a scale is shared."""
    if block.shared:
        yield slice(0, 1), lambda scale: _shared(block, unit, kind, policy, scale)
        return
    for rows in block.slices():
        yield rows, _loss(PairLoss(block.x_RGg[rows], unit[rows], block.importance_Gg), kind, policy)


def _loss(loss: PairLoss, kind: PairKind, policy: str) -> _Loss:
    return lambda scale: loss(scale, kind, policy)


def _shared(block: Block, unit: torch.Tensor, kind: PairKind, policy: str, scale: torch.Tensor) -> torch.Tensor:
    slices = (PairLoss(block.x_RGg[rows], unit, block.importance_Gg) for rows in block.slices())
    return torch.stack([loss(scale, kind, policy).double().sum() for loss in slices]).sum().reshape(1, 1)
