"""Which numbers share a scale: matrix views, blocks and scale shapes against plain index arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch

from evenbits.errors import EvenbitsError
from evenbits.numerics.granularity import Granularity

SHAPES = [(), (1,), (7,), (3, 5), (1, 8), (5, 1), (2, 3, 4), (2, 1, 3, 4)]


def _owner(text: str, index: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Which scale the element at `index` belongs to, by definition."""
    row, column = index[:-1], (index[-1] if index else 0)
    if text == "tensor":
        return ()
    if text == "row":
        return row
    if text.startswith("axis"):
        return (index[int(text[4:])],)
    return (*row, column // int(text[1:]))


def _spellings(shape: tuple[int, ...]) -> list[str]:
    axes = [f"axis{axis}" for axis in range(-len(shape), len(shape))]
    return ["tensor", "row", "g1", "g2", "g3", "g128", *axes]


@pytest.mark.parametrize(("shape", "text"), [(s, t) for s in SHAPES for t in _spellings(s)])
def test_elements_that_share_a_scale(shape: tuple[int, ...], text: str) -> None:
    x = torch.arange(max(1, torch.Size(shape).numel())).reshape(shape).float()
    granularity = Granularity.parse(text).fitted(shape)
    x_RK = granularity.matrix(x)
    assert tuple(x_RK.shape) == granularity.matrix_shape(shape)
    assert granularity.unmatrix(x_RK, shape).equal(x)

    groups = [group for block in granularity.blocks(x_RK) for group in block.reshape(-1, block.shape[-1]).tolist()]
    expected: dict[tuple[int, ...], set[float]] = {}
    for index in itertools.product(*map(range, shape)):
        expected.setdefault(_owner(text, index, shape), set()).add(float(x[index]))
    assert sorted(map(sorted, groups)) == sorted(map(sorted, expected.values()))
    assert torch.Size(granularity.scale_shape(shape)).numel() == len(expected)


@pytest.mark.parametrize(("shape", "text"), [(s, t) for s in SHAPES for t in _spellings(s)])
def test_spread_gives_every_element_its_own_scale(shape: tuple[int, ...], text: str) -> None:
    granularity = Granularity.parse(text).fitted(shape)
    x = torch.arange(max(1, torch.Size(shape).numel())).reshape(shape).float()
    parts = [block.amax(dim=-1) for block in granularity.blocks(granularity.matrix(x))]
    scale = torch.cat(parts, dim=1).reshape(granularity.scale_shape(shape))
    columns = granularity.matrix_shape(shape)[1]
    spread = granularity.spread(scale, columns).expand(granularity.matrix_shape(shape))
    found = granularity.unmatrix(spread.contiguous(), shape)
    largest: dict[tuple[int, ...], float] = {}
    for index in itertools.product(*map(range, shape)):
        owner = _owner(text, index, shape)
        largest[owner] = max(largest.get(owner, 0.0), float(x[index]))
    for index in itertools.product(*map(range, shape)):
        assert float(found[index]) == largest[_owner(text, index, shape)]


@pytest.mark.parametrize(("columns", "size", "count"), [(8, 4, 2), (9, 4, 3), (3, 4, 1), (1, 1, 1), (129, 128, 2)])
def test_last_group_may_be_shorter(columns: int, size: int, count: int) -> None:
    fitted = Granularity("group", size).fitted((2, columns))
    assert fitted.scale_shape((2, columns)) == (2, count)
    widths = [block.shape[-1] for block in fitted.blocks(torch.zeros(2, columns)) for _ in range(block.shape[1])]
    assert sum(widths) == columns
    assert len(widths) == count
    assert max(widths) == min(size, columns)


def test_group_wider_than_a_row_is_recorded_as_the_row() -> None:
    assert str(Granularity("group", 128).fitted((2, 48))) == "g48"
    assert str(Granularity("group", 48).fitted((2, 48))) == "g48"
    assert str(Granularity("group", 47).fitted((2, 48))) == "g47"


@pytest.mark.parametrize(("axis", "stored"), [(0, 0), (2, 2), (-1, 2), (-3, 0)])
def test_axis_is_stored_counted_from_the_front(axis: int, stored: int) -> None:
    assert Granularity("axis", axis).fitted((2, 3, 4)) == Granularity("axis", stored)


@pytest.mark.parametrize(
    ("text", "shape"), [("axis3", (2, 3, 4)), ("axis-4", (2, 3, 4)), ("axis0", ()), ("axis1", (5,))]
)
def test_axis_that_does_not_exist(text: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(EvenbitsError, match=rf"{text} does not exist in a tensor of shape"):
        Granularity.parse(text).fitted(shape)


@pytest.mark.parametrize(
    ("text", "stored"), [("row", "row"), ("channel", "row"), ("token", "row"), ("tensor", "tensor"), ("g7", "g7")]
)
def test_synonyms_are_stored_as_one_word(text: str, stored: str) -> None:
    assert str(Granularity.parse(text)) == stored
    assert Granularity.parse(stored) == Granularity.parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "rwo", "Row", "g", "g0", "g-1", "g01", "g1.5", "g1２", "axis", "axis1.0", "128", "g" + "9" * 5000, "row "],
)
def test_bad_spellings(text: str) -> None:
    with pytest.raises(EvenbitsError, match="Allowed: tensor, row"):
        Granularity.parse(text)
