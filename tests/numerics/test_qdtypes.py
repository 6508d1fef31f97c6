"""Ranges and names of the integer types."""

from __future__ import annotations

import pytest
import torch

from evenbits.errors import EvenbitsError
from evenbits.numerics.qdtypes import QDtype

ALL = [(bits, signed) for bits in range(2, 9) for signed in (True, False)]


@pytest.mark.parametrize(("bits", "signed"), ALL)
def test_range_is_two_complement(bits: int, signed: bool) -> None:
    dtype = QDtype(bits, signed)
    codes = sorted(int.from_bytes([byte], "big") for byte in range(2**bits))
    if signed:
        codes = sorted(code - 2**bits if code >= 2 ** (bits - 1) else code for code in codes)
    assert (dtype.qmin, dtype.qmax) == (codes[0], codes[-1])
    info = torch.iinfo(dtype.storage)
    assert info.min <= dtype.qmin < dtype.qmax <= info.max
    assert dtype.storage.is_signed is signed


@pytest.mark.parametrize(("bits", "signed"), ALL)
def test_name_and_parse_are_inverse(bits: int, signed: bool) -> None:
    dtype = QDtype(bits, signed)
    assert dtype.name == ("" if signed else "u") + "int" + str(bits)
    assert QDtype.parse(dtype.name) == dtype


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("itn4", "int4"),
        ("int", "int"),
        ("INT8", "int8"),
        ("uint9", "uint"),
        ("int16", "int"),
        ("int1", "int"),
        ("fp8", None),
        ("", None),
        ("int8\n", "int8"),
        (" int8", "int8"),
        ("int４", "int"),
    ],
)
def test_other_words_are_refused_with_the_nearest(name: str, near: str | None) -> None:
    with pytest.raises(EvenbitsError) as caught:
        QDtype.parse(name)
    message = str(caught.value)
    assert repr(name) in message
    assert "Allowed: int2, int3, int4, int5, int6, int7, int8, uint2" in message
    assert ("Did you mean" in message) is (near is not None)
    if near:
        assert f"Did you mean '{near}" in message


def test_is_a_value() -> None:
    assert QDtype(4, True) == QDtype.parse("int4")
    assert QDtype(4, True) != QDtype(4, False)
    assert len({QDtype(4, True), QDtype.parse("int4"), QDtype.parse("uint4")}) == 2
