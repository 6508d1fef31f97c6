"""Stored scales: round trips, never zero, where the E4M3 factor comes from, and the power-of-two rule of OCP."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.numerics import elements
from evenbits.numerics.elements import PairType
from evenbits.numerics.encode import encode
from evenbits.numerics.metrics import sqnr_db
from evenbits.numerics.scales import Storage, factor_for, neighbours, real, store

STORAGES: list[Storage] = ["float32", "float16", "e4m3", "e8m0"]
DTYPES = [torch.float32, torch.float16, torch.float8_e4m3fn, torch.uint8]
TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
positive = st.floats(TINY, HUGE, width=32)


def _codes(stored: torch.Tensor) -> list[int]:
    return stored.view(torch.uint8).flatten().tolist()


@pytest.mark.parametrize(("storage", "dtype"), list(zip(STORAGES, DTYPES, strict=True)))
@given(values=st.lists(positive, min_size=1, max_size=6))
def test_stored_scales_are_positive_and_stay_as_they_are(
    storage: Storage, dtype: torch.dtype, values: list[float]
) -> None:
    scale = torch.tensor(values)
    factor = factor_for(scale, storage)
    stored = store(scale, storage, factor)
    assert stored.dtype == dtype
    decoded = real(stored, factor)
    assert decoded.dtype == torch.float32
    assert bool((decoded > 0).all())
    assert bool(decoded.isfinite().all())
    assert _codes(store(decoded, storage, factor)) == _codes(stored)


@given(
    largest=st.floats(2.0**-100, 2.0**100, width=32), ratios=st.lists(st.floats(2.0**-24, 1.0, width=32), max_size=6)
)
def test_float16_keeps_eleven_bits_over_24_powers_of_two(largest: float, ratios: list[float]) -> None:
    scale = torch.tensor([largest, *(largest * ratio for ratio in ratios)])
    factor = factor_for(scale, "float16")
    if factor is not None:
        assert math.frexp(float(factor))[0] == 0.5  # a power of two: nothing is rounded twice
        assert factor.dtype == torch.float32
        assert factor.shape == (1,)
    decoded = real(store(scale, "float16", factor), factor)
    assert bool(((decoded - scale).abs() <= scale * 2**-11).all())


@pytest.mark.parametrize("scale", [2.0**-13, 1e-3, 1.0, 2.0**15])
def test_float16_needs_no_factor_in_its_good_range(scale: float) -> None:
    assert factor_for(torch.tensor([scale, 1.0]), "float16") is None


@pytest.mark.parametrize("scale", [2.0**-13 * 0.999, 1e-30, TINY, 2.0**15 * 1.001, 1e30, HUGE])
def test_float16_outside_of_it_gets_one(scale: float) -> None:
    one = torch.tensor([scale])
    factor = factor_for(one, "float16")
    assert factor is not None
    assert 2**10 <= float(store(one, "float16", factor)) <= 2**11
    assert float(real(store(one, "float16", factor), factor)) == pytest.approx(scale, rel=2**-11)


def test_what_float16_cannot_reach_is_rounded_up_to_its_smallest() -> None:
    scale = torch.tensor([1.0, 1e-30])
    factor = factor_for(scale, "float16")
    assert real(store(scale, "float16", factor), factor).tolist() == [1.0, 2.0**-34]


def test_the_e4m3_factor_maps_the_largest_scale_to_448() -> None:
    scale = torch.rand(40) + 0.01
    factor = factor_for(scale, "e4m3")
    assert float(factor) == float(scale.max() / 448)
    stored = store(scale, "e4m3", factor).float()
    assert float(stored.max()) == 448
    assert bool(((stored - scale / factor).abs() <= scale / factor / 16).all())
    extremes = torch.tensor([1.0, 1e-9])
    assert store(extremes, "e4m3", factor_for(extremes, "e4m3")).float().tolist() == [448, 2.0**-9]


@pytest.mark.parametrize("storage", ["float16", "e4m3"])
def test_unused_scales_do_not_count(storage: Storage) -> None:
    scale, used = torch.tensor([[1e-9, 2e-9, 1.0]]), torch.tensor([[True, True, False]])
    factor = factor_for(scale, storage, used)
    assert float(factor) == float(factor_for(scale[:, :2], storage))
    decoded = real(store(scale, storage, factor), factor)
    assert decoded[0, :2].tolist() == pytest.approx([1e-9, 2e-9], rel=1 / 16)
    assert float(decoded[0, 2]) > 0
    nothing = factor_for(scale, storage, torch.zeros_like(used))
    assert nothing is None or float(nothing) > 0


@pytest.mark.parametrize("outlier", [1.0, 60.0])
def test_a_factor_from_absmax_over_96_saturates(outlier: float) -> None:
    """The counter-example: as if the largest number of the tensor had to be the largest outlier of its group."""
    x = torch.randn(64, 1024)
    x[0, 0] *= outlier
    encoded = encode(x, "ovp4-int:g32")
    ours = sqnr_db(x, encoded.dequantize())
    wrong = (x.abs().max() / 96 / 448).reshape(1)
    stored = store(encoded.scales(), "e4m3", wrong)
    spread = encoded.format.granularity.spread(real(stored, wrong), 1024)
    theirs = sqnr_db(x, elements.snap(x / spread, PairType(4, "int")) * spread)
    assert ours > 20
    if outlier == 1:
        assert float((stored.float() == 448).float().mean()) > 0.99
        assert theirs < 15
        assert ours - theirs > 5
    else:
        assert ours >= theirs - 0.1


@given(top=st.floats(2.0**-120, 2.0**120, width=32))
def test_e8m0_is_the_ocp_rule(top: float) -> None:
    """shared exponent = ⌊log₂ absmax⌋ − 2 (that of FP4's largest number, 6 = 1.5 · 2²), stored with bias 127."""
    encoded = encode(torch.tensor([top, 0.0, -top / 3]), "mxfp4")
    exponent = math.floor(math.log2(top)) - 2
    if not math.log2(top).is_integer() and math.log2(top) % 1 > 1 - 1e-12:
        return  # log2 itself rounds
    assert int(encoded.scale) == exponent + 127
    assert float(encoded.scales()) == 2.0**exponent


def test_e8m0_by_hand() -> None:
    scale = torch.tensor([1.0, 0.999, 1.999, 2.0, 3.9, 4.0, 2.0**-126, HUGE])
    assert store(scale, "e8m0", None).tolist() == [127, 126, 127, 128, 128, 129, 1, 254]
    assert real(torch.tensor([127, 0, 254], dtype=torch.uint8), None).tolist() == [1.0, 2.0**-127, 2.0**127]


def test_neighbours_are_steps_away_and_stay_numbers() -> None:
    every = torch.arange(1, 127, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn)
    _, below, above, _ = (other.float() for other in neighbours(every))
    assert below[0] == every.float()[0]
    assert above[-1] == 448 == every.float()[-1]
    assert torch.equal(below[1:], every.float()[:-1])
    assert torch.equal(above[:-1], every.float()[1:])
    lower, upper = neighbours(torch.tensor([0, 100, 254], dtype=torch.uint8))
    assert (lower.tolist(), upper.tolist()) == ([0, 99, 253], [1, 101, 254])
    assert neighbours(torch.ones(2).half()) == neighbours(torch.ones(2)) == []


def test_zeros_have_scale_one() -> None:
    x = torch.zeros(2, 32)
    for spelling in (
        "int4:row",
        "int8:row",
        "flint4:row",
        "ovp4-int:row",
        "ovp4-int:g32",
        "nvfp4",
        "mxfp4",
        "int4:tensor",
    ):
        assert encode(x, spelling).scales().flatten().tolist() == pytest.approx(
            [1.0] * encode(x, spelling).scale.numel()
        )
