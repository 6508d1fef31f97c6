"""The scales of pairs: a search over everything, and the released code's.

The largest normal value of the kind is mapped to r · 3σ. Where a few outliers have most of the energy the error has
many valleys: an outlier falls on one of seven values per sign, and every step of the scale shifts which. The search:

    1. coarse   26 values of r 12.6 % apart, 0.1 … 1.9 (int) or 0.16 … 3.1 (flint, 8 bits), and what spans absmax
    2. fine     0.94 … 1.06 in steps of 2 % around each of the two best of these
    3. finest   0.985 … 1.015 in steps of 0.5 % around the best of all (scales not stored as E4M3)

45 passes (E4M3: 39). The released code tries 88 values of r from 0.75 in steps of 0.02, under its own policy; how the
two compare is measured in docs/formats.md. Everything is done for a slice of rows before the next one. C: candidates,
R: rows, G: groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch

from evenbits.numerics.blocks import Block, or_one, positive
from evenbits.numerics.ovp import PairKind
from evenbits.numerics.pair_loss import PairLoss

RELEASED = tuple(percent / 100 for percent in range(75, 250, 2))
_COARSE = {  # flint and 8-bit pairs have more room below the top of their normal values, int less
    "int": tuple(0.1 * 1.126**i for i in range(26)),
    "flint": tuple(0.1 * 1.126**i for i in range(4, 30)),
    "int8": tuple(0.1 * 1.126**i for i in range(4, 30)),
}
_FINE = (0.94, 0.96, 0.98, 1.02, 1.04, 1.06)
_FINEST = (0.985, 0.99, 0.995, 1.005, 1.01, 1.015)

# Scales [R, G] (shared: [1, 1]) of candidates → their squared errors [C, R, G], both relative to absmax.
_Losses: TypeAlias = "Callable[[Sequence[torch.Tensor]], torch.Tensor]"


def searched(
    block: Block, kind: PairKind, policy: str, *, finest: bool = True
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The best unrounded scale of every group and its squared error, [R, G] each (shared: [1, 1]), and passes taken.

    finest: whether the third stage is worth it, which it is not where scales are stored in steps of several per cent.
    Groups of zeros get scale 1.
    """
    top = block.absmax()
    unit, base = or_one(top), block.three_sigma(top) / kind.normal_max
    scales, errors = [], []
    for rows, losses in _parts(block, unit, kind, policy):
        scale, error = _stages(losses, base[rows], kind, finest)
        scales.append(positive(scale * unit[rows]))
        errors.append(error.double() * unit[rows].double().square())
    scale = torch.where(top == 0, torch.ones_like(top), torch.cat(scales).to(top.dtype))
    passes = len(_COARSE["int"]) + 1 + 2 * len(_FINE) + (len(_FINEST) if finest else 0)
    return scale, torch.cat(errors), passes


def _stages(losses: _Losses, base: torch.Tensor, kind: PairKind, finest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    smallest = torch.finfo(torch.float32).tiny
    ratios = _COARSE.get(kind.name, _COARSE["flint"])  # flint_i8 is as flint
    spanning = torch.full_like(base, 1 / kind.normal_max)  # absmax is the unit
    coarse = [spanning, *((base * ratio).clamp(min=smallest) for ratio in ratios)]
    tried, stacked = losses(coarse), torch.stack(coarse)
    first, best = tried.min(dim=0, keepdim=True)
    second = tried.scatter_(0, best, torch.inf).argmin(dim=0, keepdim=True)
    centres = stacked.gather(0, torch.cat([best, second]))
    best, first = _better(losses, centres[0], first[0], [centre * ratio for centre in centres for ratio in _FINE])
    return _better(losses, best, first, [best * ratio for ratio in _FINEST]) if finest else (best, first)


def _better(
    losses: _Losses, scale: torch.Tensor, error: torch.Tensor, others: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of a scale, whose error is known, and others, for every group."""
    errors, index = torch.cat([error.unsqueeze(0), losses(others)]).min(dim=0, keepdim=True)
    return torch.stack([scale, *others]).gather(0, index)[0], errors[0]


def released(block: Block, kind: PairKind, policy: str) -> torch.Tensor:
    """Of r · max(|mean ± 3 std|), r = 0.75, 0.77 … 2.49, the best for every group: [R, G] or [1, 1]. Zeros: scale 1."""
    top = block.absmax()
    unit = or_one(top)
    base = _published_anchor(block, unit) / kind.normal_max
    base = torch.where(top == 0, torch.ones_like(base), base)
    scales = []
    for rows, losses in _parts(block, unit, kind, policy):
        index = losses([base[rows] * ratio for ratio in RELEASED]).argmin(dim=0)
        ratios = torch.tensor(RELEASED, dtype=base.dtype, device=base.device)
        scales.append(positive(base[rows] * ratios[index] * unit[rows]))
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


def _parts(block: Block, unit: torch.Tensor, kind: PairKind, policy: str) -> Iterator[tuple[slice, _Losses]]:
    """Slices of rows and the errors of their groups; one slice and the sums of all, if a scale is shared."""
    if block.shared:
        yield slice(0, 1), lambda scales: _shared(block, unit, kind, policy, scales)
        return
    for rows in block.slices():
        loss = PairLoss(block.x_RGg[rows], unit[rows], block.importance_Gg)
        yield rows, lambda scales, loss=loss: torch.stack([loss(scale, kind, policy) for scale in scales])


def _shared(
    block: Block, unit: torch.Tensor, kind: PairKind, policy: str, scales: Sequence[torch.Tensor]
) -> torch.Tensor:
    total = torch.zeros(len(scales), 1, 1, dtype=torch.float64, device=unit.device)
    for rows in block.slices():
        loss = PairLoss(block.x_RGg[rows], unit, block.importance_Gg)
        parts = [loss(scale, kind, policy).double().sum() for scale in scales]
        total += torch.stack(parts).reshape(-1, 1, 1)
    return total
