"""SmoothQuant's factors by hand, at the ends of alpha, and where the formula has no value."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evenbits.algorithms.smoothquant import smoothquant
from evenbits.errors import EvenbitsError
from evenbits.numerics.encode import encode
from evenbits.numerics.metrics import sqnr_db

ACT = torch.tensor([16.0, 1.0, 0.25])
WEIGHT = torch.tensor([[1.0, -4.0, 0.5], [-0.25, 2.0, 1.0]])  # absmax of the columns: 1, 4, 1


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(0.5, [4.0, 0.5, 0.5]), (1.0, [16.0, 1.0, 0.25]), (0.0, [1.0, 0.25, 1.0]), (0.75, [8.0, 4**-0.25, 0.25**0.75])],
)
def test_by_hand(alpha: float, expected: list[float]) -> None:
    result = smoothquant(ACT, [WEIGHT], alpha=alpha)
    assert result.scale_I.tolist() == pytest.approx(expected, rel=1e-6)
    assert result.scale_I.dtype == torch.float32
    assert result.choice == {"alpha": alpha}


def test_half_is_the_default() -> None:
    assert smoothquant(ACT, [WEIGHT]).scale_I.equal(smoothquant(ACT, [WEIGHT], alpha=0.5).scale_I)


@given(
    channels=st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=1, max_size=8),
    alpha=st.floats(0, 1),
)
def test_formula(channels: list[tuple[float, float]], alpha: float) -> None:
    act = torch.tensor([a for a, _ in channels], dtype=torch.float64)
    weight = torch.tensor([[-w for _, w in channels]], dtype=torch.float64)
    expected = [min(max(a**alpha / w ** (1 - alpha), 1e-4), 1e4) for a, w in channels]
    assert smoothquant(act, [weight], alpha=alpha).scale_I.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_region_sees_the_largest_weight_of_all_its_layers() -> None:
    q, k, v = WEIGHT, torch.tensor([[-64.0, 0.1, 0.1]]), torch.tensor([[0.0, 0.0, -9.0], [0.1, 0.1, 0.1]])
    shared = smoothquant(ACT, [q, k, v]).scale_I
    assert shared.tolist() == pytest.approx([math.sqrt(16 / 64), math.sqrt(1 / 4), math.sqrt(0.25 / 9)], rel=1e-6)
    assert shared.equal(smoothquant(ACT, [v, q, k]).scale_I)
    assert shared.equal(smoothquant(ACT, [torch.cat([q, k, v])]).scale_I)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_dead_channels_are_exactly_one(alpha: float) -> None:
    act = torch.tensor([0.0, 5.0, 0.0, 4.0, 1e-7])
    weight = torch.tensor([[2.0, 0.0, 0.0, 1.0, 3.0], [1.0, 0.0, 0.0, 1.0, 1.0]])
    scale = smoothquant(act, [weight], alpha=alpha).scale_I
    assert scale[[0, 1, 2, 4]].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert float(scale[3]) == pytest.approx(4.0**alpha, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    result = smoothquant(ACT.to(dtype), [WEIGHT.to(dtype)])
    assert result.scale_I.dtype == torch.float32
    assert result.scale_I.tolist() == [4.0, 0.5, 0.5]


def test_clamps() -> None:
    act = torch.tensor([1e20, 1e-4, 1.0, 1.0])
    weight = torch.tensor([[1.0, 1e9, 1e-30, 1e-5]])
    scale = smoothquant(act, [weight], alpha=0.5).scale_I
    assert scale.tolist() == pytest.approx([1e4, 1e-4, 10**2.5, 10**2.5], rel=1e-6)  # max|W| is taken as 1e-5 at least
    assert torch.isfinite(smoothquant(torch.full((1,), 3e38), [torch.full((1, 1), 1e-30)], alpha=1.0).scale_I).all()


@pytest.mark.parametrize("alpha", [-0.01, 1.01, -math.inf, math.inf, math.nan])
def test_alpha_outside_its_range(alpha: float) -> None:
    with pytest.raises(EvenbitsError, match=f"alpha must be between 0 and 1; given {alpha}"):
        smoothquant(ACT, [WEIGHT], alpha=alpha)


@pytest.mark.parametrize(
    ("alpha", "given"),
    [([0.3, 0.7], r"\[0\.3, 0\.7\]"), (None, "None"), (True, "True"), ("0.5", "the string '0.5'"), (1j, "1j")],
)
def test_alpha_of_another_kind(alpha: Any, given: str) -> None:
    with pytest.raises(EvenbitsError, match=rf"a number from 0 to 1, 'auto' or .*; given {given}\.$"):
        smoothquant(ACT, [WEIGHT], alpha=alpha)


def test_alpha_may_be_a_whole_number_or_numpys() -> None:
    for alpha in (1, np.float32(1.0)):
        assert smoothquant(ACT, [WEIGHT], alpha=alpha).choice == {"alpha": 1.0}


@given(alpha=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_real_numbers_do_not_change(alpha: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(9, 6, generator=generator, dtype=torch.float64) * torch.logspace(-3, 3, 6)
    w_OI = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    s_I = smoothquant(x_TI.abs().amax(0), [w_OI], alpha=alpha).scale_I.double()
    exact, smoothed = x_TI @ w_OI.t(), (x_TI / s_I) @ (w_OI * s_I).t()
    assert ((smoothed - exact).abs() <= 1e-12 * (x_TI.abs() @ w_OI.abs().t())).all()


def test_alpha_moves_the_range() -> None:
    x_TI = torch.randn(50, 8) * torch.logspace(-2, 2, 8)
    w_OI, act_I = torch.randn(5, 8), x_TI.abs().amax(0)
    all_in_x = smoothquant(act_I, [w_OI], alpha=0.0).scale_I
    all_in_w = smoothquant(act_I, [w_OI], alpha=1.0).scale_I
    assert (w_OI * all_in_x).abs().amax(0).tolist() == pytest.approx([1] * 8, rel=1e-5)
    assert (x_TI / all_in_w).abs().amax(0).tolist() == pytest.approx([1] * 8, rel=1e-5)
    half = smoothquant(act_I, [w_OI], alpha=0.5).scale_I
    assert (x_TI / half).abs().amax(0).tolist() == pytest.approx((w_OI * half).abs().amax(0).tolist(), rel=1e-5)


def test_outliers_are_what_it_is_for() -> None:
    x_TI, w_OI = torch.randn(256, 64), torch.randn(32, 64) * 0.05
    x_TI[:, [3, 40]] *= 100
    scale_I = smoothquant(x_TI.abs().amax(0), [w_OI]).scale_I
    exact = x_TI @ w_OI.t()

    def quality(x: torch.Tensor, w: torch.Tensor) -> float:
        quiet = encode(x, "int8:tensor").dequantize() @ encode(w, "int8:row").dequantize().t()
        return sqnr_db(exact, quiet)

    assert quality(x_TI / scale_I, w_OI * scale_I) > quality(x_TI, w_OI) + 5


def test_parameters_are_read_not_recorded() -> None:
    weight = nn.Parameter(WEIGHT.clone())
    result = smoothquant(ACT, [weight])
    assert not result.scale_I.requires_grad
    assert weight.detach().equal(WEIGHT)
