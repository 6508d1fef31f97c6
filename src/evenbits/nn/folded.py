"""`FoldedNorm`: what stands where a BatchNorm was, once it is part of the layer before it."""

from __future__ import annotations

from torch import nn


class FoldedNorm(nn.Identity):
    """Hands its input on. A checkpoint records it, so that a fresh model's BatchNorm is taken out again."""
