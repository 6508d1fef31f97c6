"""Error metrics against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evenbits.errors import EvenbitsError
from evenbits.numerics import metrics
from evenbits.numerics.metrics import RunningError, compare

REF = torch.tensor([[3.0, -4.0], [0.0, 12.0]])
APPROX = torch.tensor([[3.0, -3.0], [2.0, 12.0]])


def test_by_hand() -> None:
    assert metrics.mse(REF, APPROX) == 5 / 4
    assert metrics.sqnr_db(REF, APPROX) == pytest.approx(10 * math.log10(169 / 5), rel=1e-15)
    assert metrics.cosine(REF, APPROX) == pytest.approx((9 + 12 + 144) / (13 * math.sqrt(166)), rel=1e-15)
    assert metrics.relative_l1(REF, APPROX) == 3 / 19
    assert metrics.max_error(REF, APPROX) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_against_numpy(dtype: torch.dtype) -> None:
    ref = (torch.randn(5, 7) * 100).to(dtype)
    approx = (ref.float() + torch.randn(5, 7)).to(dtype)
    a, b = ref.double().numpy(), approx.double().numpy()
    error = compare(ref, approx)
    assert error.mse == pytest.approx(np.mean((a - b) ** 2), rel=1e-12)
    assert error.sqnr_db == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), rel=1e-12)
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    assert error.cosine == pytest.approx(cosine, rel=1e-12)
    assert error.relative_l1 == pytest.approx(np.abs(a - b).sum() / np.abs(a).sum(), rel=1e-12)
    assert error.max_error == np.abs(a - b).max()


def test_sums_are_float64_where_float32_would_lose_them() -> None:
    # 2²⁶ + 1 and 2²⁴ + 1 have more digits than a float32 significand.
    error = compare(torch.tensor([2.0**13, 1.0]), torch.zeros(2))
    assert error.noise == error.signal == 2**26 + 1
    assert compare(torch.tensor([2.0**24, 1.0]), torch.zeros(2)).abs_noise == 2**24 + 1


def test_batches_add_up_to_the_whole() -> None:
    ref, approx = torch.randn(64, 3), torch.randn(64, 3)
    running = RunningError()
    for part in range(0, 64, 7):
        running.add(ref[part : part + 7], approx[part : part + 7])
    whole = compare(ref, approx)
    for name in ("mse", "sqnr_db", "cosine", "relative_l1"):
        assert getattr(running, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert running.max_error == whole.max_error
    assert running.count == 192


def test_equal_tensors() -> None:
    error = compare(REF, REF.clone())
    assert (error.mse, error.sqnr_db, error.relative_l1, error.max_error) == (0, math.inf, 0, 0)
    assert error.cosine == pytest.approx(1, rel=1e-15)


def test_zero_reference() -> None:
    error = compare(torch.zeros(3), torch.ones(3))
    assert (error.mse, error.sqnr_db, error.relative_l1, error.cosine) == (1, -math.inf, math.inf, 0)
    both = compare(torch.zeros(3), torch.zeros(3))
    assert (both.mse, both.sqnr_db, both.relative_l1, both.cosine) == (0, math.inf, 0, 1)
    assert compare(torch.ones(3), torch.zeros(3)).cosine == 0


def test_opposite_vectors() -> None:
    assert compare(REF, -REF).cosine == pytest.approx(-1, rel=1e-15)


def test_nan_and_infinity_are_seen_not_lost() -> None:
    error = RunningError()
    error.add(torch.ones(2), torch.tensor([1.0, math.nan]))
    error.add(torch.ones(2), torch.tensor([1.0, 5.0]))
    assert all(math.isnan(value) for value in (error.mse, error.sqnr_db, error.cosine, error.max_error))
    infinite = compare(torch.ones(2), torch.tensor([1.0, math.inf]))
    assert (infinite.mse, infinite.sqnr_db, infinite.max_error) == (math.inf, -math.inf, math.inf)


def test_nothing_compared() -> None:
    error = compare(torch.zeros(0, 3), torch.zeros(0, 3))
    assert (error.count, error.mse, error.max_error) == (0, 0, 0)


def test_shapes_must_be_equal() -> None:
    with pytest.raises(EvenbitsError, match=r"given \[2, 2\] and \[1, 2\]"):
        compare(REF, APPROX[:1])


def test_gradients_are_not_kept() -> None:
    reference = torch.ones(3, requires_grad=True)
    assert compare(reference * 2, torch.ones(3)).mse == 1
