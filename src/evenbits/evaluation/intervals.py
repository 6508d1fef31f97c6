"""Confidence intervals: how far a score may lie from what more data would give.

wilson            a share of n independent trials (accuracy)
bootstrap_ratio   a function of a ratio of two sums over documents (perplexity)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenbits.errors import EvenbitsError

Array = NDArray[np.float64]
DRAWS_AT_ONCE = 4_000_000


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a share successes/n, as (low, high) within [0, 1].

    centre = (p + z²/2n) / (1 + z²/n), half = z·sqrt(p(1-p)/n + z²/4n²) / (1 + z²/n), z the normal quantile. Unlike
    p ± z·sqrt(p(1-p)/n) it stays inside [0, 1] and keeps its coverage near 0 and 1.

    Raises EvenbitsError for n below 1, successes outside 0..n and a confidence outside (0, 1).
    Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927).
    """
    _check_confidence(confidence)
    if n < 1 or not 0 <= successes <= n:
        raise EvenbitsError(f"{successes} successes in {n} trials; give n from 1 and successes from 0 to n")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, shrink = successes / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / shrink
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    transform: Callable[[Array], Any],
    samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of transform(sum(numerators) / sum(denominators)) over documents.

    numerators, denominators: one number per document, [N] each, denominators above 0 (for perplexity: summed negative
    log-likelihood in nats, number of tokens). Documents are drawn with replacement, never tokens, because the tokens
    of a document are not independent.
    transform: numpy function of the ratios [samples], for example numpy.exp.

    Returns (low, high), or None for one document: nothing about other documents can be learned from it.
    Raises EvenbitsError for sequences of different length or none, a denominator not above 0, samples below 1 and a
    confidence outside (0, 1).
    Source: B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    _check_confidence(confidence)
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if above.shape != below.shape or above.ndim != 1 or above.size == 0:
        raise EvenbitsError(f"shapes {above.shape} and {below.shape}; give one number per document in both")
    if not (below > 0).all():
        raise EvenbitsError("a document has a denominator that is not above 0; leave documents without tokens out")
    if samples < 1:
        raise EvenbitsError(f"samples={samples}; give a whole number from 1")
    if above.size == 1:
        return None
    with np.errstate(over="ignore"):
        statistics = np.sort(transform(_resampled_ratios(above, below, samples, seed)))
    outside = int(samples * (1 - confidence) / 2)
    return float(statistics[outside]), float(statistics[samples - 1 - outside])


def _resampled_ratios(above: Array, below: Array, samples: int, seed: int) -> Array:
    """sum(above) / sum(below) over `samples` draws of N documents with replacement, [samples]; bounded memory."""
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWS_AT_ONCE // above.size)
    ratios = []
    for start in range(0, samples, at_once):
        drawn = rng.integers(above.size, size=(min(at_once, samples - start), above.size))
        ratios.append(above[drawn].sum(axis=1) / below[drawn].sum(axis=1))
    return np.concatenate(ratios)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise EvenbitsError(f"confidence={confidence}; give a share between 0 and 1, for example 0.95")
