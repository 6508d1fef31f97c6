"""`Block`: groups of numbers of one size, and what they lose under given scales.

Everything runs over slices of rows that fit the cache, so that what is needed beside the tensor stays small and does
not grow with it. R: rows, G: groups, g: group size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from evenbits.numerics import elements, ovp
from evenbits.numerics.elements import PairType
from evenbits.numerics.format import Format
from evenbits.numerics.ovp import PairKind
from evenbits.numerics.pair_loss import PairLoss
from evenbits.numerics.threads import one_thread

SLICE = 1 << 15  # elements
PAIR_SLICE = 1 << 16  # of pairs; of small tensors half of that
_WIDE = 2.0**48


@dataclass(frozen=True)
class Block:
    """Groups of one size. x_RGg: float32; shared: one scale for all rows (per tensor); importance_Gg: weights."""

    x_RGg: torch.Tensor
    shared: bool = False
    importance_Gg: torch.Tensor | None = None

    @one_thread()
    def error(self, scale_RG: torch.Tensor, fmt: Format, policy: str) -> torch.Tensor:
        """Squared error, float64 [R, G] (shared: [1, 1]), of the groups under their scales."""
        rows, groups, size = self.x_RGg.shape
        if isinstance(fmt.dtype, PairType):
            return self._pair_error(scale_RG, ovp.pair_kind(fmt.dtype.kind), policy)
        level = elements.largest(fmt.dtype)
        level = level if level > _WIDE else 1.0  # wide powers of two: their squares overflow float32
        step = max(1, SLICE // (groups * size))
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

    def _pair_error(self, scale_RG: torch.Tensor, kind: PairKind, policy: str) -> torch.Tensor:
        parts = []
        for rows in self.slices():
            scale = scale_RG if self.shared else scale_RG[rows]
            part = PairLoss(self.x_RGg[rows], scale, self.importance_Gg)(1.0, kind, policy)
            parts.append(part.double() * scale.double().square())
        error = torch.cat(parts)
        return error.sum(dim=(0, 1), keepdim=True) if self.shared else error

    def slices(self) -> Iterator[slice]:
        """Rows that fit the cache together, one slice after the other."""
        rows, groups, size = self.x_RGg.shape
        step = max(1, min(PAIR_SLICE, max(SLICE, self.x_RGg.numel() // 20)) // (groups * size))
        return (slice(start, start + step) for start in range(0, rows, step))

    def absmax(self) -> torch.Tensor:
        """The largest magnitude of each group: [R, G], or [1, 1] if shared."""
        dims = (0, 1, 2) if self.shared else (2,)
        value = torch.maximum(self.x_RGg.amax(dim=dims), -self.x_RGg.amin(dim=dims))  # no copy of x
        return value.reshape(1, 1) if self.shared else value

    def three_sigma(self, top: torch.Tensor) -> torch.Tensor:
        """Three standard deviations (around zero) over `top`, the absmax: [R, G], or [1, 1] if shared."""
        # Divided first: squares of what is below 1e-23 are zero in float32.
        divisor = or_one(top).unsqueeze(-1)
        means = [
            (self.x_RGg[rows] / (divisor if self.shared else divisor[rows])).square_().mean(dim=2)
            for rows in self.slices()
        ]
        mean = torch.cat(means)
        return 3 * (mean.mean(dim=(0, 1), keepdim=True) if self.shared else mean).sqrt()


def or_one(top: torch.Tensor) -> torch.Tensor:
    """Absmax, but 1 for groups of zeros."""
    return torch.where(top == 0, torch.ones_like(top), top)


def positive(scale: torch.Tensor) -> torch.Tensor:
    """Scales within what float32 has."""
    return scale.clamp(torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)
