"""Element types: their names, values, bytes, and which of them an integer engine can multiply."""

from __future__ import annotations

import pytest
import torch

from evenbits.errors import EvenbitsError
from evenbits.numerics import elements
from evenbits.numerics.codebook import Codebook
from evenbits.numerics.elements import PairType, TypeChoice, fits_int8, parse_element
from evenbits.numerics.ovp import POLICIES
from evenbits.numerics.qdtypes import QDtype

NAMES = [*(f"{u}int{b}" for u in ("", "u") for b in range(2, 9)), "flint3", "flint4", "uflint4", "flint8", "pot4"]
NAMES += ["fp4", "fp6_e3m2", "fp8", "fp8_e5m2", "nf3", "nf4", "fp4_e3m0"]
NAMES += ["ovp4-int", "ovp4-flint", "ovp4-flint_i8", "ovp8"]
CHOICES = ["ovp4", "ovp4-mix", "ovp4-i8", "ant3", "ant4", "ant8"]


@pytest.mark.parametrize("name", [*NAMES, *CHOICES])
def test_names_are_kept(name: str) -> None:
    element = parse_element(name)
    assert element.name == name
    assert element.bits == int(next(c for c in name if c.isdigit()))
    assert element.signed == (not name.startswith("u"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int4", QDtype(4, True)),
        ("flint4", Codebook.parse("flint4")),
        ("ovp4", PairType(4, "auto")),
        ("ovp4-flint_i8", PairType(4, "flint_i8")),
        ("ovp8", PairType(8, "int8")),
        ("ant4", TypeChoice(4)),
    ],
)
def test_parsed(name: str, expected: object) -> None:
    assert parse_element(name) == expected


@pytest.mark.parametrize(
    "name", ["", "int9", "ovp3", "ovp4-flint8", "ovp8-int", "ant2", "ant9", "flint", "nf9", "fp8_e9m9", "Int4"]
)
def test_unknown_names(name: str) -> None:
    with pytest.raises(EvenbitsError):
        parse_element(name)


def test_members_of_choices() -> None:
    assert [member.name for member in TypeChoice(4).choices] == ["int4", "pot4", "flint4"]
    assert PairType(4, "auto").choices == PairType(4, "mix").choices == ("int", "flint")
    assert PairType(4, "i8").choices == ("int", "flint_i8")
    assert PairType(4, "int").choices == ("int",)
    assert [PairType(4, kind).is_choice for kind in ("auto", "i8", "mix", "int")] == [True, True, False, False]


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        *[
            ("int4", 7),
            ("uint4", 15),
            ("int8", 127),
            ("flint4", 16),
            ("pot4", 64),
            ("fp4", 6),
            ("fp8", 448),
            ("nf4", 1),
        ],
        *[("ovp4-int", 7), ("ovp4-flint", 16), ("ovp4-flint_i8", 16), ("ovp8", 127)],
    ],
)
def test_largest(name: str, largest: float) -> None:
    assert elements.largest(parse_element(name)) == largest


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [2, 6, 34])
def test_values_survive_packing(name: str, columns: int) -> None:
    element = parse_element(name)
    u = torch.randn(5, columns) * elements.largest(element) * 0.7
    u = u if element.signed else u.abs()
    for policy in POLICIES:
        values = elements.snap(u, element, policy)
        packed = elements.pack_values(values, element)
        assert packed.dtype == torch.uint8
        assert packed.shape == (5, elements.row_bytes(element, columns))
        assert torch.equal(elements.unpack_values(packed, element, columns), values)
        again = elements.snap(values, element, policy)
        assert torch.equal(again, values)


@pytest.mark.parametrize("name", NAMES)
def test_nearest_has_the_error_of_snap(name: str) -> None:
    element = parse_element(name)
    u = torch.randn(64, 64) * elements.largest(element)
    u = torch.cat([u, u.round(), (u * 4).round() / 4])  # ties
    for policy in POLICIES:
        snapped, near = elements.snap(u, element, policy), elements.nearest(u, element, policy)
        assert torch.allclose((snapped - u).abs(), (near - u).abs(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_zero_is_zero_and_far_numbers_saturate(name: str) -> None:
    element = parse_element(name)
    assert not elements.snap(torch.zeros(2, 4), element).any()
    far = elements.snap(torch.tensor([[3e38, 0.0, 1e30, 0.0]]), element)
    assert float(far[0, 0]) == float(far[0, 2]) >= elements.largest(element)
    assert not far[0, 1::2].any()


def test_integers_of_the_full_range() -> None:
    u = torch.tensor([[-9.0, -7.5, -7.51, 7.5, 9.0]])
    assert elements.snap(u, QDtype(4, True)).tolist() == [[-7, -7, -7, 7, 7]]
    assert elements.snap(u, QDtype(4, True), full_range=True).tolist() == [[-8, -8, -8, 7, 7]]
    assert elements.snap(u, QDtype(4, False)).tolist() == [[0, 0, 0, 8, 9]]


@pytest.mark.parametrize("name", NAMES)
def test_what_fits_int8_is_found_by_looking(name: str) -> None:
    element = parse_element(name)
    if isinstance(element, PairType):
        dense = torch.arange(-70000, 70000, 1.0) if element.bits == 8 else torch.arange(-400, 400, 0.5)
        pairs = torch.stack([dense, torch.zeros_like(dense)], dim=1)
        values = elements.snap(pairs.reshape(1, -1), element)
    elif isinstance(element, Codebook):
        values = torch.tensor([value for value in element.values if value == value])
    else:
        values = torch.tensor([float(element.qmin), float(element.qmax)])
    expected = bool((values == values.to(torch.int8).float()).all())
    assert fits_int8(element) == expected


def test_choices_fit_nowhere_until_they_are_made() -> None:
    assert not any(fits_int8(parse_element(name)) for name in CHOICES)


@pytest.mark.parametrize(
    ("name", "columns", "width"),
    [("ovp4", 7, 4), ("ovp4", 8, 4), ("ovp8", 7, 8), ("ovp8", 1, 2), ("int3", 5, 2), ("flint5", 8, 5), ("fp8", 7, 7)],
)
def test_row_bytes(name: str, columns: int, width: int) -> None:
    assert elements.row_bytes(parse_element(name), columns) == width
