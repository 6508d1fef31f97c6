"""Scale rules: nearest-rank percentiles against exact fractions and numpy, the error search against brute force."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format
from evenbits.numerics.metrics import mse
from evenbits.numerics.ranges import find_range

PERCENTS = ["50.1", "75", "90", "99", "99.9", "99.99", "99.999", "100"]
values = st.floats(-(2.0**40), 2.0**40, width=32)


def _nearest_rank(sample: list[float], percent: str) -> float:
    """The definition, with exact fractions: the ⌈p/100·n⌉-th smallest."""
    return sorted(sample)[math.ceil(Fraction(percent) * len(sample) / 100) - 1]


@pytest.mark.parametrize("percent", PERCENTS)
@pytest.mark.parametrize("size", [1, 2, 3, 10, 37, 100, 999, 1000, 1001, 10000])
def test_percentile_is_the_nearest_rank(percent: str, size: int) -> None:
    x = torch.randperm(size).float() - size // 3
    lo, hi = find_range(x.view(1, 1, -1), Format.parse(f"int8:tensor:p{percent}"))
    assert float(hi) == _nearest_rank(x.abs().tolist(), percent)
    assert float(lo) == (-float(hi) if float(x.min()) < 0 else 0)
    lo, hi = find_range(x.view(1, 1, -1), Format.parse(f"int8:tensor:affine:p{percent}"))
    assert float(hi) == _nearest_rank(x.tolist(), percent)
    assert float(lo) == -_nearest_rank((-x).tolist(), percent)


@pytest.mark.parametrize("percent", [60.0, 90.0, 99.0])
def test_percentile_agrees_with_numpy(percent: float) -> None:
    x = torch.randn(3, 2, 211)
    lo, hi = find_range(x, Format.parse(f"int8:row:affine:p{percent:g}"))
    expected = np.percentile(x.numpy(), percent, axis=-1, method="inverted_cdf")
    assert hi.numpy().tolist() == expected.tolist()
    assert (-lo).numpy().tolist() == np.percentile(-x.numpy(), percent, axis=-1, method="inverted_cdf").tolist()


def test_percentile_cuts_a_lone_outlier_and_saturates_it() -> None:
    x = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([-1000.0])])
    encoded = encode(x, "int8:tensor:p99.9")
    assert float(encoded.scale) == pytest.approx(1 / 127, rel=1e-6)
    assert int(encoded.codes()[0, -1]) == -127
    assert float(encode(x, "int8:tensor").scale) == pytest.approx(1000 / 127, rel=1e-6)


def test_hundredth_percentile_is_minmax() -> None:
    x = torch.randn(4, 33)
    assert encode(x, "int4:row:p100").scale.equal(encode(x, "int4:row").scale)


def test_minmax_is_per_group() -> None:
    x = torch.randn(3, 4, 5)
    lo, hi = find_range(x, Format.parse("int8:row"))
    assert lo.tolist() == x.numpy().min(axis=-1).tolist()
    assert hi.tolist() == x.numpy().max(axis=-1).tolist()


@pytest.mark.parametrize(
    "fmt", ["int4:tensor", "int2:row", "int3:g4", "uint4:row:affine", "int4:g3:7.5", "uint8:row:affine:free"]
)
@given(x=arrays(np.float32, (2, 7), elements=values))
def test_mse_is_never_worse_than_minmax(fmt: str, x: np.ndarray) -> None:
    tensor = torch.from_numpy(x)
    searched, spanning = encode(tensor, f"{fmt}:mse"), encode(tensor, fmt)
    found, plain = (mse(tensor, encoded.dequantize()) for encoded in (searched, spanning))
    # Both scales are then rounded to float16 (2⁻¹¹ of a number at most each), with more or less luck.
    rounding = 0 if searched.scale.dtype == torch.float32 else 2 * 2**-11 * float(tensor.abs().max())
    assert math.sqrt(found) <= math.sqrt(plain) * (1 + 1e-6) + rounding


@pytest.mark.parametrize("factor", [1e-30, 1e-23, 1e-19, 1.0, 1e18, 1e30])
def test_mse_finds_the_same_range_at_every_magnitude(factor: float) -> None:
    x = torch.randn(64) * torch.tensor([1.0, 0.1]).repeat(32)
    one, scaled = encode(x, "int3:tensor:mse"), encode(x * factor, "int3:tensor:mse")
    assert float(one.scale) < float(x.abs().max()) / 3 * 0.95  # it does shrink
    assert float(scaled.scale) == pytest.approx(float(one.scale) * factor, rel=1e-5)


def test_mse_reaches_the_best_of_a_dense_search() -> None:
    x = torch.randn(1, 512, dtype=torch.float64)
    absmax = float(x.abs().max())
    errors = []
    for percent in range(12, 101):
        step = np.float32(absmax * percent / 100) / np.float32(7)
        codes = np.clip(np.rint(x.numpy() / step), -7, 7)
        errors.append(float(((codes * step - x.numpy()) ** 2).mean()))
    found = mse(x, encode(x, "int4:row:mse").dequantize(torch.float64))
    assert found <= min(errors) * 1.02
    assert found < errors[-1] * 0.9  # min-max itself is far from it on this data


def test_mse_decides_each_group_alone() -> None:
    x = torch.randn(5, 32)
    together = encode(x, "int3:g8:mse")
    for row in range(5):
        assert together.scale[row : row + 1].equal(encode(x[row : row + 1], "int3:g8:mse").scale)


def test_mse_leaves_the_largest_numbers_finite() -> None:
    x = torch.tensor([3.4e38, -3.4e38, 1e38, 0.0])
    assert torch.isfinite(encode(x, "int4:tensor:mse").dequantize()).all()
