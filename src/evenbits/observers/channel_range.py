"""Running minimum and maximum of every channel of a tensor.

The result does not depend on how the data is cut into batches or in which order they come; memory is two numbers a
channel. The channel dimension is the last one of a linear layer's input, and dimension 1 of a convolution's (0 if it is
unbatched).
"""

from __future__ import annotations

import torch

from evenbits.errors import EvenbitsError


class ChannelRange:
    """Running per-channel range; `lo`, `hi` and `absmax` are float32 [C]."""

    def __init__(self) -> None:
        self._lo: torch.Tensor | None = None
        self._hi: torch.Tensor | None = None

    @property
    def seen(self) -> bool:
        return self._hi is not None

    @property
    def lo(self) -> torch.Tensor:
        return self._require(self._lo)

    @property
    def hi(self) -> torch.Tensor:
        return self._require(self._hi)

    @property
    def absmax(self) -> torch.Tensor:
        """max |x| of every channel: of both signs, so that a lone negative outlier counts."""
        return torch.maximum(self.lo.abs(), self.hi.abs())

    def update(self, x: torch.Tensor, channel_dim: int = -1) -> None:
        """Adds a tensor (any float dtype). Raises EvenbitsError for NaN, Inf or another number of channels."""
        if x.numel() == 0:
            return
        x = x.detach().movedim(channel_dim, -1)
        other = tuple(range(x.ndim - 1))
        lo, hi = (x.amin(dim=other), x.amax(dim=other)) if other else (x.clone(), x.clone())
        lo, hi = lo.float(), hi.float()  # never a view of x: what follows the layer may write into it
        if not bool(torch.isfinite(lo).all() and torch.isfinite(hi).all()):
            raise EvenbitsError("NaN or infinite values in the input")
        if self._hi is not None and self._hi.shape != hi.shape:
            raise EvenbitsError(f"{hi.numel()} channels after {self._hi.numel()} in an earlier batch")
        self._lo = lo if self._lo is None else torch.minimum(self._lo, lo)
        self._hi = hi if self._hi is None else torch.maximum(self._hi, hi)

    def merge(self, other: ChannelRange) -> None:
        """Adds what another one saw. Raises EvenbitsError for another number of channels."""
        if other._hi is not None and other._lo is not None:
            self.update(torch.stack([other._lo, other._hi]))

    @staticmethod
    def _require(value: torch.Tensor | None) -> torch.Tensor:
        if value is None:
            raise EvenbitsError("no calibration data reached this layer.")
        return value
