"""Two language models on the same documents: how large is the difference in perplexity, and is it more than luck?

Documents differ far more from each other than two versions of a model do on one of them, so the comparison goes
document by document. a, b: nats of a document under the first and the second model, t: its predicted tokens, over n
documents.

    difference       exp(Σb / Σt) − exp(Σa / Σt)
    standard error   √(n / (n − 1) · Σe²) / Σt,  e what one document adds to the linearised difference
    p                two-sided sign-flip test: how often Σ ±(b − a) over random signs is as large as |Σ(b − a)|

The flips are those of a fixed seed, so that equal inputs give equal p.

Source: W. G. Cochran, Sampling Techniques (1977), chapter 6 (ratio estimators); R. A. Fisher, The Design of Experiments
(1935), section 21 (the test).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evenbits.errors import EvenbitsError

_FLIPS = 9999
_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class PairedDocuments:
    """The second model's perplexity minus the first's. The error and p are None for one document."""

    difference: float
    standard_error: float | None
    p: float | None


def paired_documents(
    first: Sequence[tuple[float, int]], second: Sequence[tuple[float, int]], *, seed: int = 0
) -> PairedDocuments:
    """Compares two models document by document; items as `perplexity` gives them, (nats, predicted tokens).

    Raises EvenbitsError if the documents differ in number or in their tokens.
    """
    if len(first) != len(second) or not first or any(a[1] != b[1] for a, b in zip(first, second, strict=True)):
        raise EvenbitsError(
            f"two models are compared on the same documents; given {len(first)} and {len(second)}, or others."
        )
    a, b = (np.asarray([item[0] for item in items], dtype=np.float64) for items in (first, second))
    t = np.asarray([item[1] for item in first], dtype=np.float64)
    losses = a.sum() / t.sum(), b.sum() / t.sum()
    if max(losses) > 700:
        return PairedDocuments(math.inf if losses[1] > losses[0] else -math.inf, None, None)
    before, after = math.exp(losses[0]), math.exp(losses[1])
    if len(t) == 1:
        return PairedDocuments(after - before, None, None)
    added = after * (b - losses[1] * t) - before * (a - losses[0] * t)
    error = math.sqrt(len(t) / (len(t) - 1) * float((added**2).sum())) / float(t.sum())
    return PairedDocuments(after - before, error, _sign_flips(b - a, seed))


def _sign_flips(change: np.ndarray, seed: int) -> float:
    rng, observed, as_large, done = np.random.default_rng(seed), abs(change.sum()), 0, 0
    at_once = max(1, _AT_ONCE // change.size)
    while done < _FLIPS:
        count = min(at_once, _FLIPS - done)
        signs = 2.0 * rng.integers(2, size=(count, change.size)) - 1
        as_large += int((np.abs(signs @ change) >= observed * (1 - 1e-12)).sum())
        done += count
    return (as_large + 1) / (_FLIPS + 1)
