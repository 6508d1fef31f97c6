"""Metrics from counts against counting one by one; bootstrap errors against closed forms and against drawing items."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.evaluation.class_metrics import METRICS, bootstrap_errors, count
from evenbits.evaluation.paired import paired


def _metric(name: str, predicted: list[int], true: list[int], classes: int = 2) -> float:
    return float(METRICS[name](count(predicted, true, classes))[0])


def _models(n: int = 500, seed: int = 1) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Two models that are right about 85 and 80 times in 100, mostly on the same items; a third of the labels is 1."""
    rng = np.random.default_rng(seed)
    true = (rng.random(n) < 0.33).astype(int)
    first = np.where(rng.random(n) < 0.85, true, 1 - true)
    second = np.where(rng.random(n) < 0.1, 1 - first, first)
    return [*zip(first.tolist(), true.tolist(), strict=True)], [*zip(second.tolist(), true.tolist(), strict=True)]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60))
def test_two_classes_are_counted(outcomes: list[tuple[int, int]]) -> None:
    predicted, true = [a for a, _ in outcomes], [b for _, b in outcomes]
    tp, fp, fn, tn = (sum(pair == kind for pair in outcomes) for kind in ((1, 1), (1, 0), (0, 1), (0, 0)))
    assert _metric("accuracy", predicted, true) == (tp + tn) / len(outcomes)
    assert _metric("f1", predicted, true) == pytest.approx(2 * tp / max(1, 2 * tp + fp + fn))
    spread = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    correlation = _metric("matthews", predicted, true)
    assert math.isnan(correlation) if not spread else correlation == pytest.approx((tp * tn - fp * fn) / spread)


def test_matthews_ends_of_the_scale() -> None:
    assert _metric("matthews", [0, 1, 2, 1], [0, 1, 2, 1], 3) == 1
    assert _metric("matthews", [1, 0], [0, 1]) == -1
    assert math.isnan(_metric("matthews", [1, 1], [0, 1]))


def test_for_accuracy_the_bootstrap_gives_what_the_closed_forms_give() -> None:
    first, second = _models()
    error, difference = bootstrap_errors("accuracy", first, second)
    share = _metric("accuracy", [a for a, _ in second], [b for _, b in second])
    assert error == pytest.approx(math.sqrt(share * (1 - share) / len(second)), rel=0.06)
    found = paired([int(a == b) for a, b in first], [int(a == b) for a, b in second])
    assert difference == pytest.approx(found.standard_error, rel=0.06)


@pytest.mark.parametrize("metric", ["matthews", "f1"])
def test_drawing_kinds_is_drawing_items(metric: str) -> None:
    first, second = _models(200)
    rng, scores = np.random.default_rng(7), []
    for _ in range(1500):
        drawn = rng.integers(len(first), size=len(first))
        scores.append(
            [_metric(metric, [model[i][0] for i in drawn], [model[i][1] for i in drawn]) for model in (first, second)]
        )
    one, two = np.array(scores).T
    error, difference = bootstrap_errors(metric, first, second)
    assert error == pytest.approx(two.std(), rel=0.08)
    assert difference == pytest.approx((two - one).std(), rel=0.08)
    assert difference < 0.8 * math.hypot(one.std(), two.std())  # pairing is worth something


def test_three_classes_and_a_model_against_itself() -> None:
    rng = np.random.default_rng(3)
    outcomes = [(int(a), int(b)) for a, b in rng.integers(3, size=(90, 2))]
    error, difference = bootstrap_errors("matthews", outcomes, outcomes)
    assert error > 0 and difference == 0
    assert bootstrap_errors("matthews", outcomes, outcomes) == (error, difference)


def test_other_items_are_refused() -> None:
    for second in ([], [(1, 1)], [(1, 1), (1, 1)]):
        with pytest.raises(EvenbitsError, match="same items"):
            bootstrap_errors("f1", [(1, 1), (0, 0)], second)
