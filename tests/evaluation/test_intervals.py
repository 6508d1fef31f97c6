"""Confidence intervals against published values and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.evaluation.intervals import bootstrap_ratio, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # R. G. Newcombe, Two-sided confidence intervals for the single proportion (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # by hand, z = 1.96: (0.8 + 0.19208) / 1.38416 = 0.71674, 1.96 * sqrt(0.016 + 0.009604) / 1.38416 = 0.22658
        (8, 10, 0.4902, 0.9433),
    ],
)
def test_wilson_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_confidence() -> None:
    # z = 2.5758 for 99 %: (0.5 + 0.033174) / 1.066349, 2.5758 * sqrt(0.0025 + 0.00016587) / 1.066349
    assert wilson(50, 100, confidence=0.99) == pytest.approx((0.37528, 0.62472), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_is_symmetric(trial: tuple[int, int]) -> None:
    successes, n = trial
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("successes", "n", "confidence"), [(0, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 2, 1.0)])
def test_wilson_refuses(successes: int, n: int, confidence: float) -> None:
    with pytest.raises(EvenbitsError, match="give"):
        wilson(successes, n, confidence)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(200):
        tokens = rng.integers(20, 200, size=60)
        nats = tokens * rng.normal(1.5, 0.3, size=60)
        interval = bootstrap_ratio(nats.tolist(), tokens.tolist(), transform=np.exp, samples=300, seed=trial)
        assert interval is not None
        hits += interval[0] <= np.exp(1.5) <= interval[1]
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_is_repeatable_and_narrows_with_documents() -> None:
    rng = np.random.default_rng(1)
    nats, ones = rng.normal(2.0, 0.5, size=1600), np.ones(1600)
    few = bootstrap_ratio(nats[:100], ones[:100], transform=np.exp)
    many = bootstrap_ratio(nats, ones, transform=np.exp)
    assert few == bootstrap_ratio(nats[:100], ones[:100], transform=np.exp)
    assert few != bootstrap_ratio(nats[:100], ones[:100], transform=np.exp, seed=1)
    assert few is not None
    assert many is not None
    assert (few[1] - few[0]) / (many[1] - many[0]) == pytest.approx(4, rel=0.3)


def test_bootstrap_of_equal_documents_has_no_width() -> None:
    assert bootstrap_ratio([2.0, 4.0], [1, 2], transform=lambda ratio: ratio) == (2.0, 2.0)


def test_bootstrap_in_chunks_agrees_with_theory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenbits.evaluation.intervals.DRAWS_AT_ONCE", 3000)
    values = np.random.default_rng(2).normal(0.0, 1.0, size=1000)
    interval = bootstrap_ratio(values, np.ones(1000), transform=lambda ratio: ratio)
    half = 1.96 * values.std() / np.sqrt(1000)
    assert interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.012)


def test_bootstrap_of_one_document_is_unknown() -> None:
    assert bootstrap_ratio([3.0], [2], transform=np.exp) is None


def test_bootstrap_does_not_warn_when_a_broken_model_overflows() -> None:
    assert bootstrap_ratio([5000.0, 6000.0], [1, 1], transform=np.exp) == (np.inf, np.inf)


def test_bootstrap_refuses() -> None:
    with pytest.raises(EvenbitsError, match="one number per document"):
        bootstrap_ratio([1.0], [1, 2], transform=np.exp)
    with pytest.raises(EvenbitsError, match="one number per document"):
        bootstrap_ratio([], [], transform=np.exp)
    with pytest.raises(EvenbitsError, match="not above 0"):
        bootstrap_ratio([1.0, 1.0], [1, 0], transform=np.exp)
    with pytest.raises(EvenbitsError, match="samples=0"):
        bootstrap_ratio([1.0, 1.0], [1, 1], transform=np.exp, samples=0)
    with pytest.raises(EvenbitsError, match="confidence=95"):
        bootstrap_ratio([1.0, 1.0], [1, 1], transform=np.exp, confidence=95)
