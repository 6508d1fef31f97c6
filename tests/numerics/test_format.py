"""One spelling for every number format, and back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.numerics.format import Format, ScaleRule
from evenbits.numerics.granularity import Granularity
from evenbits.numerics.qdtypes import QDtype

DTYPES = [QDtype(bits, signed) for bits in range(2, 9) for signed in (True, False)]
GRANULARITIES = [Granularity("tensor"), Granularity("row"), Granularity("group", 32), Granularity("axis", -1)]
RANGES: list[dict[str, object]] = [{}, {"range": "mse"}, {"range": "percentile", "percentile": 99.9}]


def _rules(dtype: QDtype) -> list[ScaleRule]:
    shapes = [{}, {"symmetric": False}, {"symmetric": False, "zero_exact": False}]
    shapes += [{"full_range": True}] if dtype.signed else []
    return [ScaleRule(**shape, **rule) for shape, rule in itertools.product(shapes, RANGES)]  # type: ignore[arg-type]


EVERY = [Format(d, g, rule) for d in DTYPES for g in GRANULARITIES for rule in _rules(d)]


def test_spelling_and_parse_are_inverse_for_every_format() -> None:
    assert len({str(fmt) for fmt in EVERY}) == len(EVERY) == 14 * 4 * 9 + 7 * 4 * 3
    for fmt in EVERY:
        assert Format.parse(str(fmt)) == fmt


@given(st.decimals(min_value="50.0000000001", max_value="100", places=10))
def test_percentiles_keep_all_their_digits(percent: object) -> None:
    spelling = f"int8:row:p{percent}"
    fmt = Format.parse(spelling)
    assert fmt.rule.percentile == float(str(percent))
    assert Format.parse(str(fmt)) == fmt


@pytest.mark.parametrize(
    ("spelling", "stored"),
    [
        ("int8:channel", "int8:row"),
        ("int8:token", "int8:row"),
        ("int4:g32:mse:affine", "int4:g32:affine:mse"),
        ("uint8:tensor:free:affine", "uint8:tensor:affine:free"),
        ("int8:row:p99.90", "int8:row:p99.9"),
        ("int8:row:p100.0", "int8:row:p100"),
        ("int8:row:p99.99999", "int8:row:p99.99999"),
        ("int8:row:mse:127.5", "int8:row:127.5:mse"),
    ],
)
def test_one_spelling_is_stored(spelling: str, stored: str) -> None:
    assert str(Format.parse(spelling)) == stored


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("int8:row", (-127, 127)),
        ("int8:row:127.5", (-128, 127)),
        ("int8:row:affine", (-128, 127)),
        ("uint8:row", (0, 255)),
        ("uint8:row:affine", (0, 255)),
        ("int4:row", (-7, 7)),
        ("int4:row:7.5", (-8, 7)),
        ("int2:row", (-1, 1)),
        ("int2:row:1.5", (-2, 1)),
        ("uint2:row", (0, 3)),
    ],
)
def test_code_range(spelling: str, expected: tuple[int, int]) -> None:
    assert Format.parse(spelling).code_range == expected


def test_parse_leaves_a_format_alone() -> None:
    fmt = Format.parse("int4:g128")
    assert Format.parse(fmt) is fmt


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("", "TYPE:GRANULARITY, such as"),
        ("int8", "TYPE:GRANULARITY, such as"),
        (None, "None"),
        (8, "8"),
        (b"int8:row", "or mxfp4, nvfp4; given: b'int8:row'"),
        ("int9:row", "Did you mean 'int"),
        ("itn4:row", "Did you mean 'int4'"),
        (":row", "unknown data type ''"),
        ("int8:", "unknown granularity ''"),
        ("int8:rwo", "unknown granularity 'rwo'. Allowed: tensor, row"),
        ("int8:row:", "unknown option ''"),
        ("int8:row:afine", "unknown option 'afine'. Allowed: affine"),
        (
            "int4:row:127.5",
            "pN with 50 < N <= 100 (such as p99.9), 7.5 (scale = absmax / 7.5).",
        ),
        ("int8:row:7.5", "unknown option '7.5'"),
        ("int8:row:p50", "unknown option 'p50'"),
        ("int8:row:p100.1", "unknown option 'p100.1'"),
        ("int8:row:p-99", "unknown option 'p-99'"),
        ("int8:row:pnan", "unknown option 'pnan'"),
        ("int8:row:P99", "unknown option 'P99'"),
        ("uint8:row:127.5", "signed symmetric formats only"),
        ("int8:row:affine:127.5", "signed symmetric formats only"),
        ("int8:row:free", "'int8:row:free:affine'"),
        ("int8:row:mse:p99", "contradict"),
        ("int8:row:p99:p98", "contradict"),
        ("int8:row:affine:affine", "repeat"),
    ],
)
def test_bad_spellings_name_the_wrong_part(spelling: object, words: str) -> None:
    with pytest.raises(EvenbitsError) as caught:
        Format.parse(spelling)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_fitted_changes_the_granularity_only() -> None:
    fmt = Format.parse("int4:g128:affine:mse")
    assert str(fmt.fitted((3, 40))) == "int4:g40:affine:mse"
    assert fmt.fitted((3, 256)) == fmt
    assert str(Format.parse("int8:axis-1").fitted((3, 40))) == "int8:axis1"
