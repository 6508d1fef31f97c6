"""Divergences: zero of itself, never negative, infinite where a class is ruled out, and the errors of pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.evaluation.divergence import divergences, summary


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(2, 6), st.floats(0, 30))
def test_as_the_formula_says(seed: int, n: int, classes: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, other = ((size * torch.randn(n, classes, generator=generator)).log_softmax(dim=1) for _ in range(2))
    found = divergences(first, other)
    p, q = first.double().exp(), other.double().exp()
    expected = [
        sum(float(p[i, c]) * (float(first[i, c]) - float(other[i, c])) for c in range(classes)) for i in range(n)
    ]
    assert found.tolist() == pytest.approx([max(0.0, value) for value in expected], rel=1e-9, abs=1e-12)
    assert q.shape == p.shape and (found >= 0).all()
    assert (divergences(first, first) == 0).all()


def test_worked_by_hand() -> None:
    half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert float(divergences(half, quarter)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)


def test_a_class_ruled_out() -> None:
    """By the reference: it costs nothing. By the other: infinitely much."""
    sure, unsure = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.5, 0.5]]).log()
    assert float(divergences(sure, unsure)) == pytest.approx(math.log(2), rel=1e-6)
    assert float(divergences(unsure, sure)) == math.inf


def test_summary_pairs_items() -> None:
    values, beside = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2.0, 4.0, 6.5])
    alone, both = summary(values), summary(values, beside)
    assert (alone.mean, alone.error, alone.difference, alone.paired_error) == (
        3.0,
        pytest.approx(2 / 3**0.5),
        None,
        None,
    )
    assert (both.mean, both.error) == (alone.mean, alone.error)
    assert both.difference == pytest.approx(-3.5 / 3)
    assert both.paired_error == pytest.approx(torch.tensor([-1.0, -1.0, -1.5]).std().item() / 3**0.5)
    assert math.isnan(summary(values[:1]).error)


@pytest.mark.parametrize("other", [torch.zeros(3, 2), torch.zeros(2, 3), torch.zeros(2)])
def test_shapes_that_do_not_fit(other: torch.Tensor) -> None:
    with pytest.raises(EvenbitsError, match="same items and classes"):
        divergences(torch.zeros(2, 2), other)
