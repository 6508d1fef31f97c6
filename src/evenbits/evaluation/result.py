"""The value every evaluation task returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

Items = tuple[int, ...] | tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class Evaluation:
    """What a model scored on one task.

    task: the name in the table of tasks.
    metrics: name -> value; the first is the one that `interval` is about.
    n: how many items (documents, inputs) were scored.
    interval: (low, high), 95 % confidence, in the unit of the first metric; None where it cannot be estimated.
    items: one result per item, in the order of the data, so that two models can be compared item by item: 1 or 0 for
        a class that is right or wrong, (negative log-likelihood in nats, predicted tokens) for a document.
    notes: sentences about how the data was treated: what was truncated, cut or left out.
    outcomes: of a classification, (predicted class, true class) per item: what other figures than accuracy are made of.
    log_probabilities: of a classification that was asked to keep them, float32 [n, classes]; not compared, not shown.
    """

    task: str
    metrics: dict[str, float]
    n: int
    interval: tuple[float, float] | None
    items: Items
    notes: tuple[str, ...] = ()
    outcomes: tuple[tuple[int, int], ...] = ()
    log_probabilities: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the items and outcomes, as plain JSON values; a number that is not finite becomes None."""
        return {
            "task": self.task,
            "metrics": finite(self.metrics),
            "n": self.n,
            "interval": finite(self.interval),
            "notes": list(self.notes),
        }


def finite(value: Any) -> Any:
    """Plain data with infinite and NaN figures as None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value
