"""How far a model's answers are from another's: finer than which of them are right.

Two models that name the same class of every item have the same accuracy, however sure they are. The Kullback-Leibler
divergence

    D = Σ_c p(c) (log p(c) − log q(c))        nats, for one item

of a quantized model's class probabilities q from the float model's p sees every change, so that two quantized models
can be told apart on far fewer items. It says how much of the float model is kept, not whether the answers are right.

Source: S. Kullback, R. A. Leibler, "On information and sufficiency", Annals of Mathematical Statistics 1951.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, sqrt

import torch

from evenbits.errors import EvenbitsError


@dataclass(frozen=True)
class Divergence:
    """Nats. mean, error: over the items, and its standard error; difference, paired_error: the mean minus that of the
    row that is compared with, on the same items, and the standard error of that; None where there is no such row."""

    mean: float
    error: float
    difference: float | None = None
    paired_error: float | None = None


def divergences(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """D of each item in nats, float64 [N], from log-probabilities [N, classes] of the reference model and another.

    Raises EvenbitsError if the shapes differ, or if there is nothing.
    """
    if reference.shape != other.shape or reference.ndim != 2 or not reference.numel():
        raise EvenbitsError(
            f"two models are compared on the same items and classes; given log-probabilities of shape "
            f"{tuple(reference.shape)} and {tuple(other.shape)}, needed are two of [N, classes]."
        )
    first, second = reference.double(), other.double()
    lost = torch.where(first == -torch.inf, 0.0, first.exp() * (first - second))  # 0 · log 0 is 0
    return lost.sum(dim=1).clamp(min=0)


def summary(values: torch.Tensor, beside: torch.Tensor | None = None) -> Divergence:
    """The figures of one model's divergences [N], beside another's on the same items."""
    if beside is None:
        return Divergence(*_mean(values))
    return Divergence(*_mean(values), *_mean(values - beside))


def _mean(values: torch.Tensor) -> tuple[float, float]:
    """The mean and its standard error, NaN for a single value."""
    n = len(values)
    return float(values.mean()), float(values.std()) / sqrt(n) if n > 1 else nan
