"""Packed codes against Python's big integers, which are bit strings of any length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.numerics.packing import pack, packed_width, unpack

WIDTHS = [(bits, signed) for bits in range(2, 9) for signed in (True, False)]


def _row_bytes(codes: list[int], bits: int) -> list[int]:
    """A little-endian bit stream of one row, by Python integers alone."""
    stream = 0
    for position, code in enumerate(codes):
        stream |= (code % 2**bits) << (position * bits)
    return list(stream.to_bytes((len(codes) * bits + 7) // 8, "little"))


@st.composite
def _matrices(draw: st.DrawFn) -> tuple[int, bool, list[list[int]]]:
    bits, signed = draw(st.sampled_from(WIDTHS))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 19))
    row = st.lists(st.integers(low, high), min_size=columns, max_size=columns)
    return bits, signed, draw(st.lists(row, min_size=rows, max_size=rows))


@given(_matrices())
def test_matches_a_bit_string_and_comes_back(case: tuple[int, bool, list[list[int]]]) -> None:
    bits, signed, codes = case
    storage = torch.int8 if signed else torch.uint8
    packed = pack(torch.tensor(codes, dtype=storage), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [_row_bytes(row, bits) for row in codes]
    restored = unpack(packed, bits, len(codes[0]), signed=signed)
    assert restored.dtype == storage
    assert restored.tolist() == codes


@pytest.mark.parametrize(("bits", "signed"), WIDTHS)
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 9, 16, 17, 31])
def test_every_code_in_every_lane(bits: int, signed: bool, columns: int) -> None:
    low = -(2 ** (bits - 1)) if signed else 0
    codes = (torch.arange(2**bits).view(-1, 1) + 5 * torch.arange(columns).view(1, -1)) % 2**bits + low
    codes = codes.to(torch.int8 if signed else torch.uint8)
    packed = pack(codes, bits)
    assert packed.tolist() == [_row_bytes(row, bits) for row in codes.tolist()]
    assert packed.shape[1] == packed_width(columns, bits) == len(_row_bytes([0] * columns, bits))
    assert unpack(packed, bits, columns, signed=signed).equal(codes)


def test_the_even_code_of_four_bits_is_the_low_nibble() -> None:
    assert pack(torch.tensor([[0x3, 0xA, 0x5]], dtype=torch.uint8), 4).tolist() == [[0xA3, 0x05]]
    assert pack(torch.tensor([[-1, 1]], dtype=torch.int8), 4).tolist() == [[0x1F]]


def test_two_and_three_bits_run_from_low_to_high() -> None:
    assert pack(torch.tensor([[1, 2, 3, 0, 1]], dtype=torch.uint8), 2).tolist() == [[0b00111001, 0b01]]
    assert pack(torch.tensor([[0b101, 0b010, 0b111]], dtype=torch.uint8), 3).tolist() == [[0b11010101, 0b1]]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_wide_integers_pack_like_narrow_ones(dtype: torch.dtype, bits: int) -> None:
    codes = [[-(2 ** (bits - 1)), -1, 0, 2 ** (bits - 1) - 1]]
    assert pack(torch.tensor(codes, dtype=dtype), bits).tolist() == [_row_bytes(codes[0], bits)]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_transposed_matrix_packs_row_by_row_into_contiguous_memory(bits: int) -> None:
    codes = torch.arange(6, dtype=torch.int8).view(2, 3).t()
    packed = pack(codes, bits)
    assert packed.is_contiguous()
    assert packed.tolist() == [_row_bytes(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(EvenbitsError, match=f"2 to 8 bits can be packed; given: {bits} bits"):
        pack(torch.zeros(1, 1, dtype=torch.int8), bits)
    with pytest.raises(EvenbitsError, match=f"given: {bits} bits"):
        unpack(torch.zeros(1, 1, dtype=torch.uint8), bits, 1, signed=True)


@pytest.mark.parametrize(
    ("packed", "columns"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), 4),
        (torch.zeros(2, 3, dtype=torch.uint8), 7),
        (torch.zeros(2, 3, dtype=torch.int8), 6),
    ],
)
def test_bytes_that_do_not_fit_are_refused(packed: torch.Tensor, columns: int) -> None:
    with pytest.raises(EvenbitsError, match=r"packed codes must be uint8 \[rows,"):
        unpack(packed, 4, columns, signed=False)
    if packed.dtype == torch.uint8:
        assert unpack(packed, 4, 6, signed=False).shape == (2, 6)
