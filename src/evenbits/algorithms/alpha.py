"""The search for SmoothQuant's α, written without knowing a model: it yields candidates and is sent their losses.

    grid      every α of the grid at once, and leaving the region alone
    refine    golden section between the grid neighbours of the best α (criterion `loss`)
    choice    the α of least loss of all that were tried, so never worse than the grid; ties go to the one nearest 0.5

| criterion           | the α of a region whose layers have losses L₁(α), L₂(α), …  |
|---------------------|-------------------------------------------------------------|
| `loss` (default)    | argmin of L₁ + L₂ + …                                       |
| `min`, `max`, `mean`| smallest, largest or mean of each layer's own argmin        |

The loss is supplied by whoever drives the search: relative squared error of the layers' outputs under the quantizer
that will be deployed, over all calibration batches. The published implementation of the other criteria (Intel Neural
Compressor 2.x) measured with another quantizer and kept the last batch only, which draws α to 1 on convolutions.

Source: criteria: Intel Neural Compressor, documentation of SmoothQuant auto-tuning. Golden section: J. Kiefer,
"Sequential minimax search for a maximum", Proc. AMS 1953.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from evenbits.algorithms.base import Rebalance
from evenbits.errors import EvenbitsError, unknown_name

CRITERIA = ("loss", "min", "max", "mean")
ALPHA_FORMS = (
    "alpha is a number from 0 to 1, 'auto' or 'auto:LOW:HIGH:STEP', such as 0.5 or 'auto:0.3:0.7:0.05'; given {}."
)
Losses: TypeAlias = Sequence[Sequence[float]]
Search: TypeAlias = Generator[Sequence[Rebalance], Losses, Rebalance]

_GOLDEN = (math.sqrt(5) - 1) / 2
_REFINEMENTS = 5
_FINEST = 0.001  # every step is one more quantized copy of every layer
_SAME = 1e-9  # relative difference of losses below which two α are as good


@dataclass(frozen=True)
class AlphaGrid:
    """`auto`, or `auto:0.3:0.7:0.05` for another grid than 0.05 … 0.95 in steps of 0.05."""

    low: float = 0.05
    high: float = 0.95
    step: float = 0.05

    @staticmethod
    def parse(text: str) -> AlphaGrid:
        """Raises EvenbitsError for another word, numbers outside 0..1 or a step below 0.001."""
        word, *numbers = text.split(":")
        try:
            values = [float(number) for number in numbers]
        except ValueError:
            values = [math.nan]
        if word != "auto" or len(values) not in (0, 3):
            raise EvenbitsError(ALPHA_FORMS.format(f"the string {text!r}"))
        return AlphaGrid(*values).checked()

    def checked(self) -> AlphaGrid:
        """Itself. Raises EvenbitsError unless 0 ≤ low ≤ high ≤ 1 and 0.001 ≤ step ≤ 1."""
        if not (0.0 <= self.low <= self.high <= 1.0 and _FINEST <= self.step <= 1.0):
            raise EvenbitsError(
                f"a grid of alpha runs from LOW to HIGH inside 0..1 in steps of at least {_FINEST}; given "
                f"{self.low}:{self.high}:{self.step}."
            )
        return self

    @property
    def values(self) -> tuple[float, ...]:
        """The α of the grid, both ends included where the step reaches them."""
        count = round((self.high - self.low) / self.step + 1e-6)
        steps = [round(self.low + i * self.step, 10) for i in range(count + 1)]
        return tuple(alpha for alpha in steps if alpha <= self.high + 1e-9)


def search_alpha(make: Callable[[float], Rebalance], grid: AlphaGrid, criterion: str = "loss") -> Search:
    """A generator: yields candidates, takes one loss per candidate and layer, returns the chosen one with its curve.

    make: α → the candidate. Raises EvenbitsError for an unknown criterion.
    """
    if criterion not in CRITERIA:
        raise unknown_name("criterion", criterion, CRITERIA)
    alphas = list(grid.values)
    candidates = [make(alpha) for alpha in alphas]
    untouched = Rebalance(None, {})
    *losses, left_alone = yield [*candidates, untouched]
    curve: list[tuple[float, float]] = [(a, sum(row)) for a, row in zip(alphas, losses, strict=True)]
    if criterion != "loss":
        alpha = _by_layer(alphas, losses, criterion)
        return _finished(make(alpha), alpha, tuple(curve))
    best = _best(curve)
    low, high = max(grid.low, best - grid.step), min(grid.high, best + grid.step)
    refined = yield from _golden(make, low, high)
    curve += refined.items()
    best = _best(curve)
    curve.sort()
    least = dict(curve)[best]
    if sum(left_alone) < least * (1 - _SAME):
        return Rebalance(None, {"untouched": sum(left_alone)}, curve=tuple(curve))
    return _finished(make(best), best, tuple(curve))


def _finished(chosen: Rebalance, alpha: float, curve: tuple[tuple[float, float], ...]) -> Rebalance:
    return Rebalance(chosen.scale_I, {**chosen.choice, "alpha": alpha}, chosen.perm_I, curve)


def _by_layer(alphas: Sequence[float], losses: Losses, criterion: str) -> float:
    layers = len(losses[0])
    own = [_best([(a, row[layer]) for a, row in zip(alphas, losses, strict=True)]) for layer in range(layers)]
    return {"min": min(own), "max": max(own), "mean": sum(own) / layers}[criterion]


def _best(curve: Sequence[tuple[float, float]]) -> float:
    """The α of least loss; of those as good as that, the nearest to 0.5. A loss that is NaN or infinite never wins.

    Raises EvenbitsError if none is finite.
    """
    losses = {alpha: math.inf if math.isnan(loss) else loss for alpha, loss in curve}
    least = min(losses.values())
    if least == math.inf:
        raise EvenbitsError(
            "no alpha of the search gave finite outputs of the quantized layers, so none can be chosen; keep them in "
            "float (ignore), or give alpha as a number."
        )
    good = [alpha for alpha, loss in losses.items() if loss <= least * (1 + _SAME)]
    return min(good, key=lambda alpha: abs(alpha - 0.5))


def _golden(
    make: Callable[[float], Rebalance], low: float, high: float
) -> Generator[Sequence[Rebalance], Losses, dict[float, float]]:
    """Golden-section steps inside [low, high]; returns the losses of what was tried. Two at first, then one a step."""
    found: dict[float, float] = {}
    if high - low < 1e-6:
        return found
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    first, second = yield [make(left), make(right)]
    found |= {left: sum(first), right: sum(second)}
    for _ in range(_REFINEMENTS - 2):
        if found[left] <= found[right]:
            high, right = right, left
            left = high - _GOLDEN * (high - low)
            new = left
        else:
            low, left = left, right
            right = low + _GOLDEN * (high - low)
            new = right
        (loss,) = yield [make(new)]
        found[new] = sum(loss)
    return found
