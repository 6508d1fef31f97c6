"""Snapshots of running statistics: equal to a run on that many samples of that order, for every size and order."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.observers.channel_range import ChannelRange
from evenbits.observers.second_moment import SecondMoment
from evenbits.observers.snapshots import Snapshots, random_orders


def range_of(x: torch.Tensor) -> ChannelRange:
    ranges = ChannelRange()
    ranges.update(x)
    return ranges


@given(
    sizes=st.lists(st.integers(1, 14), min_size=1, max_size=4, unique=True).map(sorted),
    orders=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_snapshot_is_a_run_on_that_many_samples(sizes: list[int], orders: int, seed: int) -> None:
    x = torch.randn(14, 5, 3, generator=torch.Generator().manual_seed(seed))
    places = random_orders(14, orders, seed)
    ranges, moments = Snapshots(ChannelRange, sizes, places), Snapshots(SecondMoment, sizes, places)
    arrival = list(range(14))
    random.Random(seed).shuffle(arrival)  # samples may come in any order
    for sample in arrival:
        moment = SecondMoment()
        moment.update(x[sample])
        ranges.add(sample, range_of(x[sample]))
        moments.add(sample, moment)
    for order in range(orders):
        assert sorted(places[order]) == list(range(14))
        for size in sizes:
            chosen = x[[sample for sample in range(14) if places[order][sample] < size]]
            found = ranges.at(order, size)
            assert torch.equal(found.lo, chosen.amin((0, 1))) and torch.equal(found.hi, chosen.amax((0, 1)))
            torch.testing.assert_close(moments.at(order, size).mean, chosen.square().mean((0, 1)))


def test_a_sample_beyond_the_largest_size_is_left_out() -> None:
    snapshots = Snapshots(ChannelRange, [2], [[0, 1, 2]])
    for sample in range(3):
        snapshots.add(sample, range_of(torch.full((1, 1), float(sample))))
    assert snapshots.at(0, 2).hi.tolist() == [1.0]


def test_merging_does_not_share_memory_and_takes_nothing_from_the_unseen() -> None:
    first, second = ChannelRange(), range_of(torch.tensor([[1.0, -2.0]]))
    first.merge(second)
    first.merge(ChannelRange())
    first.update(torch.tensor([[5.0, 5.0]]))
    assert second.hi.tolist() == [1.0, -2.0] and first.hi.tolist() == [5.0, 5.0]
    moment, other = SecondMoment(), SecondMoment()
    other.update(torch.tensor([[2.0]]))
    moment.merge(other)
    moment.merge(SecondMoment())
    moment.update(torch.tensor([[4.0]]))
    assert moment.mean.tolist() == [10.0] and other.mean.tolist() == [4.0]


def test_merging_other_widths_is_refused() -> None:
    with pytest.raises(EvenbitsError, match="3 channels after 2"):
        range_of(torch.ones(1, 2)).merge(range_of(torch.ones(1, 3)))


@pytest.mark.parametrize("sizes", [[], [0, 1], [2, 1], [1, 1]])
def test_sizes_must_ascend(sizes: list[int]) -> None:
    with pytest.raises(EvenbitsError, match="ascending"):
        Snapshots(ChannelRange, sizes, [[0]])


def test_another_size_has_no_snapshot() -> None:
    with pytest.raises(EvenbitsError, match="no snapshot was taken at 3"):
        Snapshots(ChannelRange, [1, 2], [[0, 1]]).at(0, 3)


def test_orders_differ_and_are_repeatable() -> None:
    orders = random_orders(50, 3, seed=4)
    assert orders == random_orders(50, 3, seed=4)
    assert orders[0] != orders[1] != orders[2]
    assert orders[1] == random_orders(50, 1, seed=5)[0]
