"""How far an approximation is from its reference. All sums run in float64; shapes must be equal.

`RunningError` adds up batches in O(1) memory, so that errors over a whole calibration set need no stored tensors.
"""

from __future__ import annotations

import math

import torch

from evenbits.errors import EvenbitsError

_SLICE = 1 << 20  # elements added up at once


class RunningError:
    """Running sums of one reference/approximation pair; every metric is a property."""

    def __init__(self) -> None:
        self.count = 0
        self.signal = self.noise = self.dot = self.approx_power = self.abs_signal = self.abs_noise = 0.0
        self.max_error = 0.0

    def add(self, reference: torch.Tensor, approximation: torch.Tensor) -> None:
        """Adds one batch (any equal shapes, any real dtype). Raises EvenbitsError if the shapes differ."""
        if reference.shape != approximation.shape:
            raise EvenbitsError(
                f"metrics compare equal shapes; given {list(reference.shape)} and {list(approximation.shape)}."
            )
        # In slices: float64 copies of a whole layer would be six times the layer.
        slices = (tensor.detach().flatten().split(_SLICE) for tensor in (reference, approximation))
        for ref, approx in zip(*slices, strict=True):
            self._add(ref.double(), approx.double())

    def _add(self, ref: torch.Tensor, approx: torch.Tensor) -> None:
        error = approx - ref
        self.count += ref.numel()
        self.signal += float(ref.dot(ref))
        self.noise += float(error.dot(error))
        self.dot += float(ref.dot(approx))
        self.approx_power += float(approx.dot(approx))
        self.abs_signal += float(ref.abs().sum())
        self.abs_noise += float(error.abs().sum())
        if ref.numel():
            largest = float(error.abs().max())
            self.max_error = largest if math.isnan(largest) else max(self.max_error, largest)

    @property
    def mse(self) -> float:
        """Mean squared error."""
        return self.noise / self.count if self.count else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio, 10·log10(Σ ref² / Σ err²); inf if there is no error."""
        if self.noise == 0:
            return math.inf
        ratio = self.signal / self.noise
        return -math.inf if ratio == 0 else 10 * math.log10(ratio)

    @property
    def cosine(self) -> float:
        """Cosine similarity; 1 if both are zero."""
        power = math.sqrt(self.signal) * math.sqrt(self.approx_power)
        return self.dot / power if power else float(self.signal == self.approx_power)

    @property
    def relative_l1(self) -> float:
        """Σ |err| / Σ |ref|; 0 if there is no error, inf if only the reference is zero."""
        if self.abs_noise == 0:
            return 0.0
        return self.abs_noise / self.abs_signal if self.abs_signal else math.inf


def compare(reference: torch.Tensor, approximation: torch.Tensor) -> RunningError:
    """All metrics of one pair of tensors of equal shape."""
    error = RunningError()
    error.add(reference, approximation)
    return error


def mse(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Mean squared error."""
    return compare(reference, approximation).mse


def sqnr_db(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB; inf if equal."""
    return compare(reference, approximation).sqnr_db


def cosine(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Cosine similarity."""
    return compare(reference, approximation).cosine


def relative_l1(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Sum of absolute errors over the sum of absolute reference values."""
    return compare(reference, approximation).relative_l1


def max_error(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Largest absolute error."""
    return compare(reference, approximation).max_error
