"""Running mean square of every channel of a tensor: how much an error in a weight's column costs at the output.

For y = W x, an error e_j in column j adds e_j² · E[x_j²] to the output's squared error (other columns aside).
O(channels) memory; independent of how the data is cut into batches.
"""

from __future__ import annotations

import torch

from evenbits.errors import EvenbitsError


class SecondMoment:
    """Running sum of squares per channel; `mean` is float32 [C]."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._count = 0

    @property
    def seen(self) -> bool:
        return self._sum is not None

    @property
    def mean(self) -> torch.Tensor:
        """Mean x² of each channel. Raises EvenbitsError if nothing was seen."""
        if self._sum is None:
            raise EvenbitsError("no calibration data reached this layer.")
        return (self._sum / self._count).clamp(max=torch.finfo(torch.float32).max).float()

    def update(self, x: torch.Tensor, channel_dim: int = -1) -> None:
        """Adds a tensor (any float dtype)."""
        if x.numel() == 0:
            return
        x_MC = x.detach().movedim(channel_dim, -1).reshape(-1, x.shape[channel_dim])
        squares = x_MC.double().square().sum(dim=0)
        self._sum = squares if self._sum is None else self._sum + squares
        self._count += len(x_MC)

    def merge(self, other: SecondMoment) -> None:
        """Adds what another one saw."""
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum + other._sum
            self._count += other._count
