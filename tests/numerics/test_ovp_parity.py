"""Policy `reference` beside an independent scan: the nearest entry of a list, a later one winning ties, then victims.

The scan is written from the description of the released kernel (normal values ascending, then outliers ascending, `<=`)
and imports nothing of the library but what it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.numerics.ovp import pair_kind, snap

NORMALS = {"int": range(1, 8), "flint": (1, 2, 3, 4, 6, 8, 16)}
OUTLIERS = {"int": (12, 16, 24, 32, 48, 64, 96), "flint": (24, 32, 48, 64, 96, 128, 192)}
BEYOND = 25_600.0  # scales of `int`, 102 400 of the released unit: from there the release gives 0


def both_signs(magnitudes: Iterable[int]) -> list[float]:
    return sorted(sign * float(value) for value in magnitudes for sign in (-1, 1))


def entries(kind: str) -> list[float]:
    return [*sorted([0.0, *both_signs(NORMALS[kind])]), *both_signs(OUTLIERS[kind])]


def scanned(number: float, kind: str) -> tuple[float, bool]:
    """The list's nearest entry, and whether another one is equally near."""
    best, distance, tied = 0.0, float("inf"), False
    for entry in entries(kind):
        here = abs(number - entry)
        tied = here == distance or (tied and here > distance)
        if here <= distance:
            best, distance = entry, here
    return best, tied


def released(row: list[float], kind: str) -> tuple[list[float], list[bool]]:
    """A row as the release has it: victims are odd ones after an outlier, and even ones before one that stays."""
    found = [scanned(number, kind) for number in row]
    values, tied = [value for value, _ in found], [tie for _, tie in found]
    outlier = [abs(value) > max(NORMALS[kind]) for value in values]
    victim = [False] * len(row)
    for i in range(1, len(row), 2):
        victim[i] = outlier[i - 1]
    for i in range(0, len(row), 2):
        victim[i] = outlier[i + 1] and not victim[i + 1]
    return [0.0 if lost else value for value, lost in zip(values, victim, strict=True)], tied


@pytest.mark.parametrize("kind", ["int", "flint"])
@given(
    row=st.lists(
        st.integers(-1000, 1000).map(lambda quarter: quarter / 4) | st.floats(-BEYOND, BEYOND, width=32),
        min_size=2,
        max_size=24,
    )
)
def test_reference_is_the_scan_except_at_exact_ties(kind: str, row: list[float]) -> None:
    row = row[: len(row) // 2 * 2]
    theirs, tied = released(row, kind)
    ours = snap(torch.tensor([row]), pair_kind(kind), "reference")[0].tolist()
    different = [i for i in range(len(row)) if ours[i] != theirs[i]]
    assert all(tied[i] for i in different), [(row[i], ours[i], theirs[i]) for i in different]


@pytest.mark.parametrize("kind", ["int", "flint"])
def test_ordinary_numbers_have_no_ties_and_no_differences(kind: str) -> None:
    row = (torch.randn(600) * torch.randn(600).exp() * 4).tolist()
    theirs, tied = released(row, kind)
    assert not any(tied)
    assert snap(torch.tensor([row]), pair_kind(kind), "reference")[0].tolist() == theirs
    assert sum(abs(value) > max(NORMALS[kind]) for value in theirs) > 20


@pytest.mark.parametrize(
    ("number", "theirs", "ours"),
    [(2.5, 3, 2), (-1.5, -1, -2), (14, 16, 12), (20, 24, 16), (9.5, 12, 12), (-9.5, -12, -12), (-14, -12, -12)],
)
def test_ties_of_the_document(number: float, theirs: int, ours: int) -> None:
    assert scanned(number, "int") == (theirs, True)
    assert snap(torch.tensor([[number, 0.0]]), pair_kind("int"), "reference").tolist() == [[ours, 0]]
