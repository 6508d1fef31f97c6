"""Every table against values typed in from the papers and specifications, and encoding against a plain scan."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.numerics.codebook import Codebook

NAMES = ["flint3", "uflint3", "flint4", "uflint4", "flint5", "flint6", "flint8", "uflint8", "pot3", "pot4", "upot4"]
NAMES += ["fp4", "fp4_e3m0", "fp4_e1m2", "ufp4_e3m1", "fp6_e3m2", "fp6_e2m3", "fp8", "fp8_e5m2", "nf3", "nf4", "nf5"]
NAMES += ["abfloat4_b2", "abfloat4_b3", "abfloat8_b4", "fp3_e1m1", "fp5_e2m2", "fp7_e4m2"]

# Non-negative values, from the published tables.
POSITIVE = {
    "flint3": [0, 1, 2, 4],
    "flint4": [0, 1, 2, 3, 4, 6, 8, 16],
    "uflint3": [0, 1, 2, 3, 4, 6, 8, 16],
    "uflint4": [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24, 32, 64],
    "flint5": [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24, 32, 64],
    "uflint5": [*range(17), 18, 20, 22, 24, 26, 28, 30, 32, 40, 48, 56, 64, 96, 128, 256],
    "pot3": [0, 1, 2, 4],
    "pot4": [0, 1, 2, 4, 8, 16, 32, 64],
    "upot4": [0, *(2**i for i in range(15))],
    "fp4": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "fp4_e3m0": [0, 1, 2, 4, 8, 16, 32, 64],
    "fp4_e1m2": [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],
    "ufp4_e3m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96],
    "abfloat4_b0": [3, 4, 6, 8, 12, 16, 24],
    "abfloat4_b2": [12, 16, 24, 32, 48, 64, 96],
    "abfloat4_b3": [24, 32, 48, 64, 96, 128, 192],
}
FLINT_CODES = {  # magnitude code → value
    3: [0, 1, 2, 3, 16, 8, 4, 6],
    4: [0, 1, 2, 3, 4, 5, 6, 7, 64, 32, 16, 24, 8, 10, 12, 14],
}
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def used(book: Codebook) -> list[float]:
    return sorted(value for value in book.values if not math.isnan(value))


@pytest.mark.parametrize("name", POSITIVE)
def test_values_are_the_published_ones(name: str) -> None:
    book = Codebook.parse(name)
    assert [value for value in used(book) if value >= 0] == POSITIVE[name]
    if book.signed:
        assert used(book) == sorted(-value for value in used(book))
    else:
        assert used(book)[0] >= 0


@pytest.mark.parametrize("width", FLINT_CODES)
def test_flint_codes_are_the_published_ones(width: int) -> None:
    assert list(Codebook.parse(f"uflint{width}").values) == FLINT_CODES[width]
    assert list(Codebook.parse(f"flint{width + 1}").values[: 1 << width]) == FLINT_CODES[width]


@pytest.mark.parametrize(
    ("name", "largest", "count"), [("flint8", 4096, 255), ("uflint8", 16384, 256), ("flint6", 256, 63)]
)
def test_wide_flints(name: str, largest: float, count: int) -> None:
    book = Codebook.parse(name)
    assert (book.largest, len(set(used(book)))) == (largest, count)


def test_nf4_is_the_published_table() -> None:
    # The published table was rounded through float32 quantiles; the rule in float64 agrees to seven digits.
    assert used(Codebook.parse("nf4")) == pytest.approx(NF4, abs=2e-7)


@pytest.mark.parametrize(("name", "dtype"), [("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_fp8_is_torchs_fp8_code_by_code(name: str, dtype: torch.dtype) -> None:
    book = Codebook.parse(name)
    theirs = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype).float()
    ours = torch.tensor(book.values)
    finite = theirs.isfinite() & (theirs != 0) | (torch.arange(256) == 0)
    assert torch.equal(ours[finite], theirs[finite])
    assert bool(ours[~finite].isnan().all())  # NaN, infinities and minus zero are never written
    x = torch.cat([torch.randn(10_000) * 10.0**k for k in (-3, 0, 2)])
    clamped = x.clamp(-book.largest, book.largest)
    assert torch.equal(book.decode(book.quantize(x)), clamped.to(dtype).float() + 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_every_used_code_decodes_and_encodes_to_itself(name: str) -> None:
    book = Codebook.parse(name)
    codes = torch.tensor([c for c, v in enumerate(book.values) if not math.isnan(v)], dtype=torch.uint8)
    values = book.decode(codes)
    again = book.quantize(values)
    assert torch.equal(book.decode(again), values)
    # pot and flint may hold no value twice: then the code itself survives.
    if len(set(values.tolist())) == len(values):
        assert torch.equal(again, codes)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_quantize_is_the_nearest_value(name: str, data: st.DataObject) -> None:
    book = Codebook.parse(name)
    top = book.largest * 1.5
    number = data.draw(st.floats(-top, top, width=32))
    x = torch.tensor([number])
    chosen = float(book.decode(book.quantize(x)))
    best = min(abs(value - number) for value in used(book))
    assert abs(chosen - number) <= best * (1 + 1e-6) + 1e-7 * book.largest
    fast = float(book.nearest(x))
    assert abs(fast - number) <= best * (1 + 1e-6) + 1e-7 * book.largest


def test_ties_go_to_the_even_code() -> None:
    fp4 = Codebook.parse("fp4")
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert fp4.decode(fp4.quantize(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert fp4.decode(fp4.quantize(-ties)).tolist() == [0, -1, -1, -2, -2, -4, -4]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["flint4", "fp8", "nf4", "uflint4"])
def test_views_are_searched_like_copies(name: str) -> None:
    book, u = Codebook.parse(name), torch.rand(5, 7) * 3
    assert torch.equal(book.quantize(u.t()), book.quantize(u).t())
    assert torch.equal(book.nearest(u.t()), book.nearest(u).t())


def test_values_beyond_the_table_saturate() -> None:
    for name in NAMES:
        book = Codebook.parse(name)
        top = book.decode(book.quantize(torch.tensor([3.0e38, -3.0e38, math.inf])))
        assert float(top[0]) == book.largest
        assert float(top[2]) == book.largest
        assert float(top[1]) == used(book)[0]


def test_minus_zero_is_zero() -> None:
    for name in ("flint4", "fp4", "pot4", "fp8"):
        book = Codebook.parse(name)
        assert int(book.quantize(torch.tensor([-0.0]))) == 0
        assert int(book.quantize(torch.tensor([-1e-30]))) == 0


@pytest.mark.parametrize(
    "name", ["flint1", "flint9", "fp5", "ufp4", "fp4_e2m2", "nf2", "unf4", "flint4_e1m2", "fp8_b3", "upot8", "x"]
)
def test_what_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(EvenbitsError, match=r"'"):
        Codebook.parse(name)
