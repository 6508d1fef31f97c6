"""What a running statistic was after 25, 50, 100, … samples, for several random orders of them, from one pass.

Statistics that do not depend on the order inside a set (ranges, sums) can be kept by parts: a sample that an order puts
at place p belongs to the part of the first size that is larger than p, and the statistic after n samples is that of the
parts up to n. So the samples may arrive in any order, each once, and serve every order; memory is
orders × sizes × channels, whatever the number of samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from evenbits.errors import EvenbitsError


class Mergeable(Protocol):
    """A running statistic that can take in another one."""

    def merge(self, other: Any) -> None:
        """Adds what another one saw."""


S = TypeVar("S", bound=Mergeable)


def random_orders(samples: int, orders: int, seed: int = 0) -> list[list[int]]:
    """Random orders of samples: for each order the place of every sample."""
    return [
        torch.randperm(samples, generator=torch.Generator().manual_seed(seed + order)).tolist()
        for order in range(orders)
    ]


class Snapshots(Generic[S]):
    """make: an empty statistic; sizes: ascending numbers of samples; places: for each order the place of each sample.

    Raises EvenbitsError for sizes that do not ascend from at least 1.
    """

    def __init__(self, make: Callable[[], S], sizes: Sequence[int], places: Sequence[Sequence[int]]) -> None:
        if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
            raise EvenbitsError(f"sizes must be whole numbers from 1, ascending; given {list(sizes)}.")
        self._make, self._sizes, self._places = make, list(sizes), places
        self._parts = [[make() for _ in sizes] for _ in places]

    def add(self, sample: int, statistic: S) -> None:
        """Takes in the statistic of one sample, by its number in the data."""
        for order, places in enumerate(self._places):
            part = bisect_right(self._sizes, places[sample])
            if part < len(self._sizes):
                self._parts[order][part].merge(statistic)

    def at(self, order: int, size: int) -> S:
        """The statistic after the first `size` samples of an order. Raises EvenbitsError for another size."""
        if size not in self._sizes:
            raise EvenbitsError(f"no snapshot was taken at {size} samples; they were at {self._sizes}.")
        found = self._make()
        for part in self._parts[order][: self._sizes.index(size) + 1]:
            found.merge(part)
        return found
