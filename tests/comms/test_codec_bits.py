"""Packing against Python's big integers and against the packing of stored tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.comms.codecs.bits import bytes_of, pack, packed_bytes, unpack, words_of
from evenbits.numerics.packing import pack as pack_rows


def _stream(codes: list[int], bits: int) -> list[int]:
    """A little-endian bit stream, by Python integers alone."""
    whole = sum(code << (place * bits) for place, code in enumerate(codes))
    return list(whole.to_bytes((len(codes) * bits + 7) // 8, "little"))


@st.composite
def _codes(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(1, 32))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))


@given(_codes())
def test_every_width_comes_back_in_the_stated_bytes(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.int64), bits)
    assert packed.dtype == torch.uint8 and packed.numel() == packed_bytes(len(codes), bits)
    planes, rest = divmod(bits, 8)
    expected = [(code >> (8 * plane)) & 255 for plane in range(planes) for code in codes]
    assert packed.tolist() == expected + (_stream([code >> (8 * planes) for code in codes], rest) if rest else [])
    assert unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000, 1001])
def test_the_stream_is_that_of_stored_tensors(bits: int, count: int) -> None:
    codes = (torch.arange(count) * 37 % 2**bits).to(torch.uint8)
    assert pack(codes, bits).equal(pack_rows(codes[None], bits)[0])


@pytest.mark.parametrize("bits", range(1, 8))
def test_every_code_in_every_lane(bits: int) -> None:
    codes = ((torch.arange(2**bits).view(-1, 1) + torch.arange(9)) % 2**bits).flatten().to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.tolist() == _stream(codes.tolist(), bits)
    assert unpack(packed, bits, len(codes)).equal(codes)


def test_words_are_read_at_odd_places() -> None:
    message = torch.cat([torch.zeros(3, dtype=torch.uint8), bytes_of(torch.tensor([1.5, -2.0]))])
    assert words_of(message[3:], torch.float32).tolist() == [1.5, -2.0]
    aligned = bytes_of(torch.tensor([1.5, -2.0]))
    assert words_of(aligned, torch.float32).data_ptr() == aligned.data_ptr()
