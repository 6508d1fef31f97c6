"""Metrics of a classifier from counts of its predictions, and their errors by bootstrap over items.

accuracy   right / all
matthews   correlation of prediction and truth, 0 for guessing; for K classes the R_K of Gorodkin,
           (c·s - Σ p_k·t_k) / sqrt((s² - Σ p_k²)·(s² - Σ t_k²)), c right, s all, p_k predicted as k, t_k truly k
f1         2·tp / (2·tp + fp + fn) of class 1, for two classes only

Only accuracy is a mean over items, with a binomial error. For the others items are drawn again with replacement, the
same draws for both models, and the spread of the metric, and of its difference, is the standard error. Drawing n items
is drawing how often each kind of item comes (predicted by the one, by the other, true), so no item is touched twice.

Sources: J. Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, Computational
Biology and Chemistry 28 (2004); B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 8.
S: draws (1 for the data itself), K: classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from evenbits.errors import EvenbitsError
from evenbits.evaluation.intervals import Array

DRAWS = 2000


@dataclass(frozen=True)
class Counts:
    """right: right predictions [S]; predicted, true: items of each class by prediction and by label [S, K]."""

    right: Array
    predicted: Array
    true: Array

    @property
    def all(self) -> Array:
        """Items, [S]."""
        total: Array = self.true.sum(axis=1)
        return total


def accuracy(counts: Counts) -> Array:
    """Share of right predictions, [S]."""
    share: Array = counts.right / counts.all
    return share


def matthews(counts: Counts) -> Array:
    """R_K, [S]; NaN where all predictions or all labels are of one class."""
    together = counts.right * counts.all - (counts.predicted * counts.true).sum(axis=1)
    spread_predicted = counts.all**2 - (counts.predicted**2).sum(axis=1)
    spread_true = counts.all**2 - (counts.true**2).sum(axis=1)
    spread = np.sqrt(spread_predicted * spread_true)
    found: Array = np.full_like(spread, np.nan)
    np.divide(together, spread, out=found, where=spread > 0)
    return found


def f1(counts: Counts) -> Array:
    """F1 of class 1 of two, [S]; 0 where class 1 is neither predicted nor true."""
    either = counts.predicted[:, 1] + counts.true[:, 1]
    # right = tp + tn and all = tp + fp + fn + tn give tp without a table of which class was taken for which.
    twice_hits = counts.right - counts.all + either
    found: Array = np.zeros_like(either)
    np.divide(twice_hits, either, out=found, where=either > 0)
    return found


METRICS: dict[str, Callable[[Counts], Array]] = {"accuracy": accuracy, "matthews": matthews, "f1": f1}


def count(predicted: Sequence[int], true: Sequence[int], classes: int) -> Counts:
    """Counts of items in order, S = 1."""
    a, b = np.asarray(predicted), np.asarray(true)
    margins = [np.bincount(side, minlength=classes).astype(np.float64)[None] for side in (a, b)]
    return Counts(np.array([float((a == b).sum())]), *margins)


def bootstrap_errors(
    metric: str, first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]], *, seed: int = 0
) -> tuple[float, float]:
    """Standard errors of a metric of METRICS for the second model and of its difference to the first.

    first, second: (predicted, true) of each item, in one order. Draws for which the metric is not defined count as 0,
    as in an evaluation. Raises EvenbitsError if the two are not about the same items.
    """
    if len(first) != len(second) or not first or any(a[1] != b[1] for a, b in zip(first, second, strict=True)):
        raise EvenbitsError(
            f"two models are compared on the same items; given {len(first)} and {len(second)}, or other labels."
        )
    triples = [(a[0], b[0], a[1]) for a, b in zip(first, second, strict=True)]
    kinds, often = np.unique(triples, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(first), often / len(first), size=DRAWS).astype(np.float64)
    each = np.eye(max(2, int(kinds.max()) + 1))
    true = drawn @ each[kinds[:, 2]]
    scores = [
        np.nan_to_num(
            METRICS[metric](Counts(drawn @ (side == kinds[:, 2]).astype(np.float64), drawn @ each[side], true))
        )
        for side in (kinds[:, 0], kinds[:, 1])
    ]
    return float(scores[1].std(ddof=1)), float((scores[1] - scores[0]).std(ddof=1))
