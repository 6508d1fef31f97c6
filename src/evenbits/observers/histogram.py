"""Running counts of numbers between fixed edges.

The edges are known before the first tensor comes (the range, or the cells of a quantizer), so that one pass gives exact
counts in O(edges) memory, however the data is cut. Bins are half open, [a, b), and the last one holds its right edge.
E: edges.
"""

from __future__ import annotations

import math

import torch

from evenbits.errors import EvenbitsError

_SLICE = 1 << 20  # numbers sorted into bins at once


class Histogram:
    """counts: int64 [E − 1]; below, above: numbers outside the edges."""

    def __init__(self, edges_E: torch.Tensor) -> None:
        """edges_E: at least two finite numbers, ascending. Raises EvenbitsError for anything else."""
        edges_E = edges_E.detach().double().cpu()
        ascending = edges_E.ndim == 1 and len(edges_E) >= 2 and bool((edges_E.diff() > 0).all())
        if not ascending or not bool(edges_E.isfinite().all()):
            raise EvenbitsError("a histogram needs at least two finite edges in ascending order.")
        self.edges = edges_E
        self.counts = torch.zeros(len(edges_E) - 1, dtype=torch.int64)
        self.below = self.above = 0

    def update(self, x: torch.Tensor) -> None:
        """Adds a tensor of any shape and float type. Raises EvenbitsError for NaN."""
        bins = len(self.counts)
        for part in x.detach().flatten().split(_SLICE):
            part = part.cpu().double()
            if bool(part.isnan().any()):
                raise EvenbitsError("NaN values cannot be counted.")
            place = torch.bucketize(part, self.edges, right=True) - 1  # −1: below; bins: above or at the last edge
            place = torch.where(part == self.edges[-1], bins - 1, place)
            found = torch.bincount(place + 1, minlength=bins + 2)
            self.below += int(found[0])
            self.above += int(found[-1])
            self.counts += found[1:-1]

    @property
    def total(self) -> int:
        """How many numbers were added, those outside the edges included."""
        return int(self.counts.sum()) + self.below + self.above

    @property
    def entropy(self) -> float:
        """Bits that name a number's bin on average, Σ −p·log2 p; what is outside counts for the bins at the ends."""
        counts = self.counts.double()
        counts[0] += self.below
        counts[-1] += self.above
        shares = counts[counts > 0] / max(1, self.total)
        return max(0.0, -float((shares * shares.log()).sum()) / math.log(2))
