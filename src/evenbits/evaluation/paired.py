"""Two models on the same items: how large is the difference, and is it more than luck?

The items that both get right or both get wrong say nothing; what counts are those only one of them gets right. With b
items only the first gets right and c only the second, of n:

    difference       (c − b) / n
    standard error   √(b + c − (c − b)² / n) / n
    p                exact McNemar test: two-sided probability of a split at least this uneven of b + c fair coins

Source: Q. McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 1947.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from typing import Any

from evenbits.errors import EvenbitsError


@dataclass(frozen=True)
class Paired:
    """The second model minus the first. only_first, only_second: items only one of them gets right."""

    difference: float
    standard_error: float
    p: float
    only_first: int
    only_second: int


def paired(first: Sequence[Any], second: Sequence[Any]) -> Paired:
    """Compares two models item by item (1 right, 0 wrong). Raises EvenbitsError if the items differ in number."""
    if len(first) != len(second) or not first:
        raise EvenbitsError(f"two models are compared on the same items; given {len(first)} and {len(second)}.")
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(b > a for a, b in zip(first, second, strict=True))
    n, changed, gain = len(first), only_first + only_second, only_second - only_first
    tail = sum(comb(changed, k) for k in range(min(only_first, only_second) + 1)) / 2**changed
    error = sqrt(max(0.0, changed - gain**2 / n)) / n
    return Paired(gain / n, error, min(1.0, 2 * tail), only_first, only_second)
