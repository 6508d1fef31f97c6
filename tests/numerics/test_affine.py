"""Ranges to scales and zero points, numbers to codes and back, against fractions and numpy."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.numerics.affine import from_codes, qparams, to_codes
from evenbits.numerics.format import Format

FLOAT32_MAX = float(torch.finfo(torch.float32).max)
TINY = Fraction(float(torch.finfo(torch.float32).tiny))
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def _nearest_float32(value: Fraction) -> float:
    """The float32 nearest to an exact fraction (through the two neighbours of a first guess)."""
    guess = np.float32(float(value))
    with np.errstate(over="ignore"):  # the neighbour above the largest float32
        around = (np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf)))
    return float(min((n for n in around if np.isfinite(n)), key=lambda n: abs(Fraction(float(n)) - value)))


def _qparams(lo: float, hi: float, spelling: str) -> tuple[float, int | None]:
    scale, zero = qparams(torch.tensor([lo]), torch.tensor([hi]), Format.parse(spelling))
    assert scale.dtype == torch.float32
    assert zero is None or zero.dtype == torch.int32
    return float(scale), None if zero is None else int(zero)


@pytest.mark.parametrize(
    ("spelling", "levels"),
    [
        ("int8:tensor", "127"),
        ("int8:tensor:127.5", "127.5"),
        ("int4:tensor", "7"),
        ("int4:tensor:7.5", "7.5"),
        ("int2:tensor", "1"),
        ("int2:tensor:1.5", "1.5"),
        ("uint8:tensor", "255"),
        ("uint4:tensor", "15"),
    ],
)
@given(lo=finite, hi=finite)
def test_symmetric_scale_is_the_correctly_rounded_quotient(spelling: str, levels: str, lo: float, hi: float) -> None:
    lo, hi = min(lo, hi), max(lo, hi)
    if spelling.startswith("u"):
        lo, hi = sorted((abs(lo), abs(hi)))
    scale, zero = _qparams(lo, hi, spelling)
    absmax = Fraction(max(abs(lo), abs(hi)))
    exact = absmax / Fraction(levels)
    assert zero is None
    if exact == 0:
        assert scale == 1
    elif exact < TINY:
        # A denormal quotient is lifted to the smallest normal number; one that rounds to zero counts as zero.
        assert scale in (float(TINY), 1.0)
    else:
        assert scale == _nearest_float32(exact)


@pytest.mark.parametrize(
    "spelling", ["uint8:tensor:affine", "int8:tensor:affine", "int4:tensor:affine", "uint3:tensor:affine"]
)
@given(lo=finite, hi=finite)
def test_affine_zero_is_a_code(spelling: str, lo: float, hi: float) -> None:
    lo, hi = min(lo, hi), max(lo, hi)
    fmt = Format.parse(spelling)
    scale, zero = _qparams(lo, hi, spelling)
    assert fmt.dtype.qmin <= zero <= fmt.dtype.qmax
    width = Fraction(max(hi, 0.0)) - Fraction(min(lo, 0.0))
    exact = width / (2**fmt.dtype.bits - 1)
    if exact > TINY:
        assert abs(Fraction(scale) - exact) <= exact / 2**23
    zero_code = to_codes(torch.zeros(1), torch.tensor([scale]), torch.tensor([zero]), fmt)
    assert int(zero_code) == zero
    assert float(from_codes(zero_code, torch.tensor([scale]), torch.tensor([zero]))) == 0.0


@pytest.mark.parametrize(
    "spelling",
    [
        "int8:tensor",
        "int8:tensor:127.5",
        "int5:tensor",
        "uint8:tensor:affine",
        "int8:tensor:affine",
        "uint2:tensor:affine",
    ],
)
@given(values=st.lists(finite, min_size=1, max_size=9))
def test_error_is_at_most_half_a_step(spelling: str, values: list[float]) -> None:
    fmt = Format.parse(spelling)
    x = torch.tensor(values)
    scale, zero = qparams(x.min().reshape(1), x.max().reshape(1), fmt)
    codes = to_codes(x, scale, zero, fmt)
    low, high = fmt.code_range
    assert low <= int(codes.min())
    assert int(codes.max()) <= high
    decoded = from_codes(codes, scale, zero)
    step = Fraction(float(scale))
    for value, out in zip(values, decoded.tolist(), strict=True):
        # The slack is the rounding of the float32 quotient, product and scale: 2⁻²⁴ of at most 255 steps, each.
        assert abs(Fraction(out) - Fraction(value)) <= step / 2 + step / 2**14


@given(lo=finite, width=st.floats(0, 2**20, width=32))
def test_free_range_is_spanned_end_to_end(lo: float, width: float) -> None:
    hi = float(np.float32(min(lo + width, FLOAT32_MAX)))
    fmt = Format.parse("uint8:tensor:affine:free")
    x = torch.tensor([lo, hi])
    scale, zero = qparams(x[:1], x[1:], fmt)
    decoded = from_codes(to_codes(x, scale, zero, fmt), scale, zero)
    step = Fraction(float(scale))
    for value, out in zip((lo, hi), decoded.tolist(), strict=True):
        assert abs(Fraction(out) - Fraction(value)) <= step / 2 + step / 2**14 + abs(Fraction(value)) / 2**22


@pytest.mark.parametrize("value", [1e10, -1e10, 3.0, -1e-20, 2.0**126, -(2.0**127)])
@pytest.mark.parametrize("ulps", [1, 2, 300])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int2"])
def test_free_range_of_a_few_ulps_far_from_zero(value: float, ulps: int, dtype: str) -> None:
    lo = np.float32(value)
    hi = lo
    for _ in range(ulps):
        hi = np.nextafter(hi, np.float32(np.inf))
    fmt = Format.parse(f"{dtype}:tensor:affine:free")
    x = torch.tensor([float(lo), float(hi)])
    scale, zero = qparams(x[:1], x[1:], fmt)
    decoded = from_codes(to_codes(x, scale, zero, fmt), scale, zero)
    assert ((decoded - x).abs() <= scale / 2 + x.abs() * 2**-22).all()


@pytest.mark.parametrize("spelling", ["uint8:tensor:affine:free", "int8:tensor:affine:free", "int3:tensor:affine:free"])
@given(value=finite)
def test_a_constant_is_exact_when_free(spelling: str, value: float) -> None:
    fmt = Format.parse(spelling)
    x = torch.tensor([value])
    scale, zero = qparams(x, x, fmt)
    decoded = float(from_codes(to_codes(x, scale, zero, fmt), scale, zero))
    if abs(value) >= TINY or value == 0:
        assert decoded == value
    else:
        assert abs(decoded - value) <= float(TINY) / 2


@pytest.mark.parametrize("spelling", ["int8:tensor", "uint8:tensor", "uint8:tensor:affine", "int8:tensor:affine:free"])
def test_zeros_stay_zeros(spelling: str) -> None:
    fmt = Format.parse(spelling)
    scale, zero = qparams(torch.zeros(1), torch.zeros(1), fmt)
    assert float(scale) == 1.0
    assert float(from_codes(to_codes(torch.zeros(1), scale, zero, fmt), scale, zero)) == 0.0


def test_zero_is_drawn_into_the_range_unless_free() -> None:
    assert _qparams(1.0, 2.0, "uint8:tensor:affine") == (_nearest_float32(Fraction(2, 255)), 0)
    assert _qparams(-2.0, -1.0, "uint8:tensor:affine") == (_nearest_float32(Fraction(2, 255)), 255)
    assert _qparams(1.0, 2.0, "uint8:tensor:affine:free") == (_nearest_float32(Fraction(1, 255)), -255)
    assert _qparams(-2.0, -1.0, "int8:tensor:affine:free") == (_nearest_float32(Fraction(1, 255)), 382)


def test_full_range_is_the_formula_of_compressed_tensors() -> None:
    x = torch.randn(400) * 3
    x[17] = -x.abs().max() * 1.5
    scale, zero = qparams(x.min().reshape(1), x.max().reshape(1), Format.parse("int8:tensor:127.5"))
    assert zero is None
    values = x.numpy()
    expected_scale = np.float32(np.abs(values).max()) / np.float32(127.5)
    assert float(scale) == float(expected_scale)
    expected = np.clip(np.rint(values / expected_scale), -128, 127).astype(np.int8)
    codes = to_codes(x, scale, zero, Format.parse("int8:tensor:127.5"))
    assert codes.tolist() == expected.tolist()
    exact = torch.tensor([-255.0, 255.0, 253.0])  # scale 2: −127.5 and 127.5 are ties, and 128 is not a code
    assert to_codes(exact, torch.tensor([2.0]), None, Format.parse("int8:tensor:127.5")).tolist() == [-128, 127, 126]


def test_rounding_is_to_nearest_ties_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49, 126.5, 127.4, 300.0, -300.0])
    codes = to_codes(x, torch.ones(1), None, Format.parse("int8:tensor"))
    assert codes.tolist() == [0, 2, 2, 0, -2, -2, 0, 126, 127, 127, -127]


def test_free_zero_point_beyond_float32_digits() -> None:
    # zero point −(2²⁴ + 1): the sum must be formed where 2²⁴ + 1 exists.
    scale, zero = torch.ones(1), torch.tensor([-(2**24 + 1)], dtype=torch.int32)
    fmt = Format.parse("uint8:tensor:affine:free")
    x = torch.tensor([2.0**24 + 2, 2.0**24 + 4])
    codes = to_codes(x, scale, zero, fmt)
    assert codes.tolist() == [1, 3]
    assert from_codes(codes, scale, zero).equal(x)


def test_unsigned_without_zero_point_refuses_negatives() -> None:
    with pytest.raises(EvenbitsError, match=r"uint8:tensor: .*negative values \(smallest: -0.5\); use 'int8', or"):
        _qparams(-0.5, 1.0, "uint8:tensor")
    assert _qparams(0.0, 255.0, "uint8:tensor") == (1.0, None)
    assert _qparams(-0.0, 255.0, "uint8:tensor") == (1.0, None)


@pytest.mark.parametrize(
    "spelling",
    ["int8:tensor", "int8:tensor:127.5", "uint8:tensor:affine", "int8:tensor:affine:free", "int2:tensor:1.5"],
)
@pytest.mark.parametrize("low", [-FLOAT32_MAX, -FLOAT32_MAX / 3, 0.0])
def test_the_largest_numbers_stay_finite(spelling: str, low: float) -> None:
    fmt = Format.parse(spelling)
    x = torch.tensor([low, FLOAT32_MAX])
    scale, zero = qparams(x[:1], x[1:], fmt)
    decoded = from_codes(to_codes(x, scale, zero, fmt), scale, zero)
    assert torch.isfinite(decoded).all()
    assert ((decoded.double() - x.double()).abs() <= scale.double() * (0.5 + 2**-14)).all()


def test_nan_range_gives_nan_scale_not_a_number() -> None:
    scale, _ = qparams(torch.tensor([float("nan"), -1.0]), torch.tensor([float("nan"), 1.0]), Format.parse("int8:row"))
    assert scale.isnan().tolist() == [True, False]
