"""Two models on the same items: the exact test against fractions, worked figures, and what is refused."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.evaluation.paired import Paired, paired


def _made(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[int], list[int]]:
    first = [1] * both + [1] * only_first + [0] * only_second + [0] * neither
    second = [1] * both + [0] * only_first + [1] * only_second + [0] * neither
    return first, second


def _exact(b: int, c: int) -> Fraction:
    """Probability that b + c fair coins split at least as unevenly as b : c, over all splits; in whole numbers."""
    n, distance = b + c, abs(b - c)
    row = [1]
    for _ in range(n):  # Pascal's triangle
        row = [1, *(x + y for x, y in pairwise(row)), 1]
    return Fraction(sum(ways for k, ways in enumerate(row) if abs(n - 2 * k) >= distance), 2**n)


@pytest.mark.parametrize(("b", "c"), [*product(range(8), range(8)), (30, 12), (1, 99), (60, 61)])
def test_p_is_the_exact_two_sided_one(b: int, c: int) -> None:
    assert paired(*_made(5, b, c, 3)).p == pytest.approx(float(_exact(b, c)), rel=1e-12)


def test_p_by_counting_every_outcome() -> None:
    for b, c in ((4, 0), (3, 1), (2, 2), (1, 4)):
        outcomes = list(product((0, 1), repeat=b + c))
        uneven = sum(abs(2 * sum(o) - len(o)) >= abs(b - c) for o in outcomes)
        assert paired(*_made(1, b, c, 0)).p == pytest.approx(uneven / len(outcomes))


def test_an_example_worked_by_hand() -> None:
    # 100 items; 8 only the first, 2 only the second: (2 − 8)/100; √(10 − 36/100)/100; 2·(1 + 10 + 45)/1024
    found = paired(*_made(70, 8, 2, 20))
    assert found == Paired(pytest.approx(-0.06), pytest.approx(math.sqrt(9.64) / 100), 112 / 1024, 8, 2)  # type: ignore[arg-type]


def test_equal_models() -> None:
    for items in ([1, 0, 1], [1], [0] * 50):
        assert paired(items, list(items)) == Paired(0.0, 0.0, 1.0, 0, 0)


def test_one_model_right_everywhere_and_the_other_nowhere() -> None:
    found = paired([0] * 10, [1] * 10)
    assert (found.difference, found.standard_error, found.p) == (1.0, 0.0, 2 / 1024)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60))
def test_difference_error_and_symmetry(items: list[tuple[int, int]]) -> None:
    first, second = [a for a, _ in items], [b for _, b in items]
    found, back = paired(first, second), paired(second, first)
    n, gaps = len(items), [b - a for a, b in items]
    mean = sum(gaps) / n
    assert found.difference == pytest.approx((sum(second) - sum(first)) / n)
    assert found.standard_error == pytest.approx(math.sqrt(sum((g - mean) ** 2 for g in gaps)) / n, abs=1e-12)
    assert (back.difference, back.p) == (-found.difference, found.p)
    assert (back.only_first, back.only_second) == (found.only_second, found.only_first)
    assert 0 < found.p <= 1


def test_many_items() -> None:
    found = paired(*_made(100_000, 1500, 1300, 20_000))  # 2^2800 is beyond every float
    # Two-sided normal approximation, with continuity: z = (200 − 1)/√2800
    assert found.p == pytest.approx(math.erfc(199 / math.sqrt(2800) / math.sqrt(2)), rel=0.02)


@pytest.mark.parametrize(("first", "second"), [([1], [1, 0]), ([1, 0, 1], [1]), ([], []), ([], [1])])
def test_items_that_differ_in_number_are_refused(first: list[int], second: list[int]) -> None:
    with pytest.raises(EvenbitsError, match=f"on the same items; given {len(first)} and {len(second)}"):
        paired(first, second)


def test_tuples_of_an_evaluation_are_taken() -> None:
    assert paired((1, 0, 1), (1, 1, 0)) == paired([1, 0, 1], [1, 1, 0])
