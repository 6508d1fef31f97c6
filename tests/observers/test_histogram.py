"""Histograms between fixed edges: numpy's counts, however the data is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evenbits.errors import EvenbitsError
from evenbits.observers.histogram import Histogram

FLOATS = st.floats(-4, 4, width=32)


@given(
    x=arrays(np.float32, st.integers(0, 40), elements=FLOATS),
    edges=st.lists(FLOATS, min_size=2, max_size=9, unique=True).map(sorted),
    cut=st.integers(0, 40),
)
def test_counts_are_those_of_numpy(x: np.ndarray, edges: list[float], cut: int) -> None:
    histogram = Histogram(torch.tensor(edges, dtype=torch.float64))
    for part in (x[:cut], x[cut:]):
        histogram.update(torch.from_numpy(part))
    expected, _ = np.histogram(x.astype(np.float64), bins=edges)
    assert histogram.counts.tolist() == expected.tolist()
    assert histogram.below == int((x < edges[0]).sum()) and histogram.above == int((x > edges[-1]).sum())
    assert histogram.total == x.size


def test_more_numbers_than_are_counted_at_once() -> None:
    x = torch.arange((1 << 20) + 7) % 4
    histogram = Histogram(torch.arange(5) - 0.5)
    histogram.update(x.float())
    assert histogram.counts.tolist() == torch.bincount(x).tolist()


def test_entropy() -> None:
    histogram = Histogram(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert histogram.entropy == 0.0
    histogram.update(torch.tensor([0.5, 0.5, 1.5, 7.0]))  # what is above counts for the last bin
    assert histogram.entropy == pytest.approx(1.5)
    even = Histogram(torch.arange(9).double())
    even.update(torch.arange(8) + 0.5)
    assert even.entropy == pytest.approx(math.log2(8))


@pytest.mark.parametrize("edges", [[1.0], [1.0, 1.0], [2.0, 1.0], [0.0, math.inf], [0.0, math.nan], []])
def test_edges_must_ascend(edges: list[float]) -> None:
    with pytest.raises(EvenbitsError, match="ascending"):
        Histogram(torch.tensor(edges))


def test_nan_is_refused() -> None:
    with pytest.raises(EvenbitsError, match="NaN"):
        Histogram(torch.tensor([0.0, 1.0])).update(torch.tensor([math.nan]))
