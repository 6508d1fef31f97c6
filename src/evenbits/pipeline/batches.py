"""Calibration data: any iterable of batches, run once through a model.

A batch is a tensor (the model's one argument), a tuple or list (its positional arguments) or a mapping (its keyword
arguments). An iterable is walked once, so a generator will do; the first few batches are kept (inputs only, no
activations) for tracing, for proofs and for measuring each layer's error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm.auto import tqdm

from evenbits.errors import EvenbitsError

KEPT = 4
# What a model raises for a batch that it cannot take.
REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)


class Batches:
    """Calibration batches bound to a model. `kept`: the first KEPT of them; `count`: how many were run."""

    def __init__(self, model: nn.Module, data: Iterable[Any], *, progress: bool) -> None:
        if isinstance(data, (str, bytes, Mapping, torch.Tensor)) or not isinstance(data, Iterable):
            kind = type(data).__name__
            raise EvenbitsError(
                f"data must be an iterable of batches (tensors, tuples of arguments or mappings of keyword arguments); "
                f"given one {kind}. For a single batch pass [batch]."
            )
        self._model, self._progress = model, progress
        self._iterator: Iterator[Any] = iter(data)
        self._total = len(data) if isinstance(data, Sized) else None
        # What gives a new iterator each time can be walked again; a generator cannot.
        self._again = None if self._iterator is data else data
        self.kept: list[Any] = []
        self.count = 0
        for batch in self._iterator:
            self.kept.append(batch)
            if len(self.kept) == KEPT:
                break
        tensors = [[t for t in tree_leaves(_plain(b)) if isinstance(t, torch.Tensor)] for b in self.kept]
        for index, found in enumerate(tensors):
            if not found:
                kind = type(self.kept[index]).__name__
                raise EvenbitsError(f"calibration batch {index} holds no tensor (it is a {kind}).")
        if not any(tensor.numel() for found in tensors for tensor in found):
            raise EvenbitsError("the calibration data is empty; pass at least one batch with at least one element.")

    def run(self, batch: Any) -> Any:
        """One forward on one batch, without gradients, on the model's device."""
        first = next(chain(self._model.parameters(), self._model.buffers()), None)
        device = torch.device("cpu") if first is None else first.device
        # Copied: a model may write into its input, and the kept batches are run several times.
        copied = lambda leaf: leaf.to(device, copy=True) if isinstance(leaf, torch.Tensor) else leaf  # noqa: E731
        batch = tree_map(copied, _plain(batch))
        with torch.no_grad():
            if isinstance(batch, dict):
                return self._model(**batch)
            return self._model(*batch) if isinstance(batch, (tuple, list)) else self._model(batch)

    def runs(self) -> list[Callable[[], Any]]:
        """The kept batches as forwards."""
        return [lambda batch=batch: self.run(batch) for batch in self.kept]  # type: ignore[misc]

    @property
    def repeatable(self) -> bool:
        """Whether all batches can be walked again; else only the kept ones are."""
        return self._again is not None or self.count <= len(self.kept)

    def every(self) -> Iterator[Callable[[], Any]]:
        """All batches as forwards once more (the kept ones, if the data cannot be walked again)."""
        for batch in self.kept if self._again is None else self._again:
            yield lambda batch=batch: self.run(batch)  # type: ignore[misc]

    def run_all(self) -> None:
        """Runs every batch once (call it once). Raises EvenbitsError naming the batch that the model cannot take."""
        everything = (batch for part in (self.kept, self._iterator) for batch in part)
        bar = tqdm(everything, total=self._total, desc="calibrating", unit="batch", disable=not self._progress or None)
        for index, batch in enumerate(bar):
            try:
                self.run(batch)
            except EvenbitsError as error:
                raise EvenbitsError(f"calibration batch {index}: {error}") from error
            except REFUSALS as error:
                raise EvenbitsError(
                    f"the model could not run calibration batch {index} ({type(batch).__name__}): {error}. A tensor is "
                    "passed as the one argument, a tuple or list as positional and a mapping as keyword arguments."
                ) from error
            self.count += 1

    def check_quantized(self) -> None:
        """Runs the first batch once more. Raises EvenbitsError if the model, its layers replaced, no longer runs."""
        try:
            self.run(self.kept[0])
        except (*REFUSALS, EvenbitsError) as error:
            raise EvenbitsError(
                f"the model does not run with quantized layers ({type(error).__name__}: {error}); it is left as it "
                "was. Keep the layer in question in float: add its name to 'ignore'."
            ) from error


def _plain(batch: Any) -> Any:
    """A mapping of any kind (such as a tokenizer's encoding) as a dict."""
    return dict(batch) if isinstance(batch, Mapping) else batch
