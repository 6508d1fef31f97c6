"""Paired perplexity: against a bootstrap over documents, and a sign-flip test that can be counted by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.evaluation.paired_documents import paired_documents

ITEMS = st.lists(st.tuples(st.floats(1, 80), st.floats(1, 80), st.integers(20, 60)), min_size=2, max_size=12)


@given(ITEMS)
def test_the_difference_is_that_of_the_perplexities_and_turns_its_sign(items: list[tuple[float, float, int]]) -> None:
    first, second = [(a, t) for a, _, t in items], [(b, t) for _, b, t in items]
    tokens = sum(t for *_, t in items)
    one, two = (math.exp(sum(nats for nats, _ in x) / tokens) for x in (first, second))
    forth, back = paired_documents(first, second), paired_documents(second, first)
    assert forth.difference == pytest.approx(two - one, abs=1e-9)
    assert back.difference == pytest.approx(-forth.difference, abs=1e-9)
    assert back.standard_error == pytest.approx(forth.standard_error, abs=1e-9) and back.p == forth.p


def test_equal_models_do_not_differ() -> None:
    items = [(3.0, 5), (9.0, 7), (4.0, 2)]
    found = paired_documents(items, items)
    assert (found.difference, found.standard_error, found.p) == (0.0, 0.0, 1.0)


def test_the_error_is_that_of_a_paired_bootstrap() -> None:
    rng = np.random.default_rng(1)
    t = rng.integers(40, 200, 120)
    a = t * rng.normal(3.0, 0.4, 120)
    b = a + t * rng.normal(0.02, 0.05, 120)
    found = paired_documents(list(zip(a, t.tolist(), strict=True)), list(zip(b, t.tolist(), strict=True)))
    drawn = rng.integers(120, size=(4000, 120))
    ratios = [np.exp(x[drawn].sum(1) / t[drawn].sum(1)) for x in (a, b)]
    assert found.standard_error == pytest.approx(float((ratios[1] - ratios[0]).std()), rel=0.1)
    # Unpaired, the documents' own spread would hide the difference.
    assert found.standard_error < 0.25 * float(ratios[0].std())


def test_p_is_the_share_of_sign_flips_as_large() -> None:
    changes = [0.5, 1.0, -0.25, 2.0, 1.5, 0.75]
    sums = [
        abs(sum(s * c for s, c in zip(signs, changes, strict=True))) for signs in itertools.product((1, -1), repeat=6)
    ]
    exact = sum(total >= abs(sum(changes)) - 1e-12 for total in sums) / len(sums)
    found = paired_documents([(10.0, 8)] * 6, [(10.0 + c, 8) for c in changes])
    assert found.p == pytest.approx(exact, abs=0.01)


def test_one_document_has_no_error_and_an_overflow_no_figure() -> None:
    found = paired_documents([(3.0, 2)], [(4.0, 2)])
    assert found.standard_error is None and found.p is None and found.difference > 0
    assert paired_documents([(3.0, 2)] * 2, [(9000.0, 2)] * 2).difference == math.inf


@pytest.mark.parametrize("second", [[], [(3.0, 2)], [(3.0, 2), (3.0, 3)]])
def test_other_documents_are_refused(second: list[tuple[float, int]]) -> None:
    with pytest.raises(EvenbitsError, match="same documents"):
        paired_documents([(3.0, 2), (3.0, 2)], second)
