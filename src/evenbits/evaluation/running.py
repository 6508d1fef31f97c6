"""What the tasks share: a model in evaluation mode, where it lives, what it answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from tqdm import tqdm

from evenbits.errors import EvenbitsError


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards, on an error too, every submodule is in the mode it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.device]:
    """torch.inference_mode with the model in evaluation mode; yields the device of the model's first tensor."""
    with evaluation_mode(model), torch.inference_mode():
        first = next(chain(model.parameters(), model.buffers()), None)
        yield torch.device("cpu") if first is None else first.device


def logits_of(output: Any) -> torch.Tensor:
    """The logits a model answered: the tensor itself, `.logits` of an object, or "logits" of a mapping.

    Raises EvenbitsError for any other answer.
    """
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output.get("logits") if isinstance(output, Mapping) else output
    if not isinstance(logits, torch.Tensor):
        raise EvenbitsError(
            f"the model answered a {type(output).__name__}; it must answer a tensor of logits, an object with .logits "
            'or a mapping with "logits"'
        )
    return logits


@contextmanager
def progress_bar(what: str, total: int | None, unit: str, progress: bool) -> Iterator[Callable[[int], Any]]:
    """A bar on stderr, silent unless `progress` and stderr is a terminal; yields what moves it on by so many units."""
    with tqdm(
        total=total, desc=what, unit=unit, file=sys.stderr, leave=False, disable=None if progress else True
    ) as bar:
        yield bar.update
