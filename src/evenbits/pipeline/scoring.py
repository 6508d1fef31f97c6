"""The end metric of a model, and the difference of two models on the same items: is it more than luck?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from torch import nn

from evenbits.evaluation.intervals import bootstrap_ratio
from evenbits.evaluation.paired import paired
from evenbits.evaluation.result import Evaluation
from evenbits.pipeline.balanced import Balanced
from evenbits.pipeline.prepare import Prepared
from evenbits.pipeline.solve import solve

Score: TypeAlias = Callable[[nn.Module], Evaluation]


@dataclass(frozen=True)
class Difference:
    """The second model minus the first, item by item. For right-or-wrong items: of the shares, with the exact McNemar
    p. For documents: of the nats per token, with a 95 % bootstrap interval over documents."""

    value: float
    standard_error: float | None
    p: float | None
    interval: tuple[float, float] | None

    @property
    def beyond_luck(self) -> bool:
        """p below 5 %, or an interval without 0."""
        if self.p is not None:
            return self.p < 0.05
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Scored:
    """One model. metric: the task's first figure; against_float: None for the float model itself."""

    name: str
    metric: float
    interval: tuple[float, float] | None
    against_float: Difference | None


@dataclass(frozen=True)
class Accuracy:
    """Float, quantized without smoothing and quantized with it; smoothing: the last against the one before it."""

    task: str
    metric: str
    n: int
    rows: tuple[Scored, ...]
    smoothing: Difference | None


def difference(first: Evaluation, second: Evaluation) -> Difference:
    """Compares two evaluations of the same data. Raises EvenbitsError if the items differ in number."""
    if not isinstance(first.items[0], tuple):
        found = paired(first.items, second.items)
        return Difference(found.difference, found.standard_error, found.p, None)
    losses = [(a[0], b[0], a[1]) for a, b in zip(first.items, second.items, strict=True) if isinstance(a, tuple)]  # type: ignore[index]
    gained, tokens = [b - a for a, b, _ in losses], [count for _, _, count in losses]
    interval = bootstrap_ratio(gained, tokens, transform=np.asarray)
    return Difference(sum(gained) / sum(tokens), None, None, interval)


def accuracy(model: nn.Module, prepared: Prepared, score: Score) -> Accuracy:
    """Scores the float model, the quantized one without the balance method, and the quantized one as it is.

    Without a balance method the second and third are one. The model is unchanged afterwards.
    """
    baseline = score(model)
    found = {"float": baseline}
    layouts, methods = prepared.balanced.layouts, prepared.methods
    without, final = "", "quantized"
    if methods.balance is not None:
        without, final = ("not re-paired", "re-paired") if methods.balance.permutes else ("unsmoothed", "smoothed")
        plain = Balanced(layouts=layouts)
        solved = solve(model, prepared.chosen, prepared.scheme, methods, plain, prepared.watched, progress=False)
        found[without] = deployed_score(model, replace(prepared, balanced=plain, solved=solved), score)
    found[final] = deployed_score(model, prepared, score)
    metric = next(iter(baseline.metrics))
    rows = tuple(
        Scored(
            name,
            evaluation.metrics[metric],
            evaluation.interval,
            None if name == "float" else difference(baseline, evaluation),
        )
        for name, evaluation in found.items()
    )
    gain = difference(found[without], found[final]) if without else None
    return Accuracy(baseline.task, metric, baseline.n, rows, gain)


def deployed_score(model: nn.Module, prepared: Prepared, score: Score) -> Evaluation:
    """The score of the model while the prepared layers are in it."""
    with prepared.deployed(model):
        return score(model)
