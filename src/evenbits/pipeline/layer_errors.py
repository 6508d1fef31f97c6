"""How far every layer's output is from the float one: alone, and with all layers before it quantized, too.

    isolated     the quantized layer on the float model's input of it
    cumulative   the layer's output in the fully quantized model, on the same batch

Both are in the float model's units: factors and orders that a smoothing folded into a layer's rows are taken out again,
so that methods can be compared. Each batch runs twice, float and quantized; sums are running, and what is held at any
time is the outputs of the quantized layers for one batch (`held_bytes` says how much that was at most).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from evenbits.graph.folding import float_outputs
from evenbits.numerics.metrics import RunningError
from evenbits.observers.calibrate import watching
from evenbits.pipeline.balanced import Balanced
from evenbits.pipeline.prepare import Prepared
from evenbits.pipeline.watch import without_cache


@dataclass(frozen=True)
class ErrorRow:
    """One layer. l1: Σ|error| / Σ|float output|; sqnr_db: 10·log10 of signal over noise; None where `note` says why."""

    name: str
    kind: str
    isolated_l1: float | None
    isolated_sqnr_db: float | None
    cumulative_l1: float | None
    cumulative_sqnr_db: float | None
    note: str = ""


@dataclass(frozen=True)
class LayerErrors:
    """rows in the order of the forward, output_*: of what the model returns, held_bytes: outputs kept at most."""

    rows: tuple[ErrorRow, ...]
    output_l1: float | None
    output_sqnr_db: float | None
    batches: int
    held_bytes: int

    @property
    def worst_first(self) -> list[ErrorRow]:
        """The rows by isolated L1 loss, largest first; layers that did not run at the end."""
        return sorted(self.rows, key=lambda row: -1.0 if row.isolated_l1 is None else row.isolated_l1, reverse=True)


class _Sums:
    """Running errors of one run, and the float outputs of the batch at hand."""

    def __init__(self, prepared: Prepared) -> None:
        self.balanced, self.layers = prepared.balanced, prepared.modules
        self.isolated: dict[str, RunningError] = {}
        self.cumulative = {name: RunningError() for name in self.layers}
        self.output = RunningError()
        self.apart: dict[str, str] = {}
        self.output_apart = False
        self.held: dict[str, list[torch.Tensor]] = {}
        self.held_bytes = self.batches = 0

    def see_float(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        alone = original(self.balanced, name, self.layers[name](self.balanced.delivered(name, x)))
        self.isolated.setdefault(name, RunningError()).add(y, alone)
        self.held.setdefault(name, []).append(y.detach().clone())  # what follows may write into it

    def see_quantized(self, name: str, _: torch.Tensor, y: torch.Tensor) -> None:
        waiting = self.held.get(name)
        expected = waiting.pop(0) if waiting else None
        if expected is None or expected.shape != y.shape:
            self.apart[name] = "other inputs reach it in the quantized model (routing): no cumulative error"
        else:
            self.cumulative[name].add(expected, original(self.balanced, name, y))

    def end_batch(self, expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
        for name, waiting in self.held.items():
            if waiting:
                self.apart[name] = "it ran less often in the quantized model (routing): no cumulative error"
        self.held.clear()
        self.batches += 1
        if [y.shape for y in expected] != [y.shape for y in found]:
            self.output_apart = True
            return
        for before, after in zip(expected, found, strict=True):
            self.output.add(before, after)


def original(balanced: Balanced, name: str, y: torch.Tensor) -> torch.Tensor:
    """A balanced layer's output in the units and the order of the float model: the inverse of Balanced.returned."""
    if name in balanced.outputs:
        y = y[..., balanced.outputs[name].argsort().to(y.device)]
    if name in balanced.row_factors:
        factor_O = balanced.row_factors[name].to(y.device)
        y = y / balanced.layouts[name].on_activation(factor_O, y.ndim).to(torch.promote_types(y.dtype, torch.float32))
    return y


def layer_errors(
    model: nn.Module, prepared: Prepared, runs: Iterable[Callable[[], Any]], *, total: int | None, progress: bool
) -> LayerErrors:
    """Errors of every quantized layer over the batches. The model is in evaluation mode, and unchanged afterwards.

    runs: forwards of the model, each on one batch; total: how many, for the progress bar.
    """
    sums = _Sums(prepared)
    bar = tqdm(runs, desc="measuring errors", total=total, unit="batch", disable=not progress or None)
    with torch.no_grad(), without_cache(model):
        for run in bar:
            with watching(model, sums.layers, sums.see_float):
                expected = float_outputs(run())
            held = sum(y.nbytes for waiting in sums.held.values() for y in waiting)
            sums.held_bytes = max(sums.held_bytes, held)
            with prepared.deployed(model), watching(model, sums.layers, sums.see_quantized):
                found = float_outputs(run())
            sums.end_batch(expected, found)
    kinds = {plan.name: plan.kind for plan in prepared.chosen}
    rows = [_row(name, kinds[name], sums) for name in (*sums.isolated, *(n for n in kinds if n not in sums.isolated))]
    output = None if sums.output_apart or not sums.output.count else sums.output
    return LayerErrors(
        tuple(rows),
        None if output is None else output.relative_l1,
        None if output is None else output.sqnr_db,
        sums.batches,
        sums.held_bytes,
    )


def _row(name: str, kind: str, sums: _Sums) -> ErrorRow:
    if name not in sums.isolated:
        return ErrorRow(name, kind, None, None, None, None, "did not run on the calibration data")
    alone, note = sums.isolated[name], sums.apart.get(name, "")
    together = None if note else sums.cumulative[name]
    return ErrorRow(
        name,
        kind,
        alone.relative_l1,
        alone.sqnr_db,
        None if together is None else together.relative_l1,
        None if together is None else together.sqnr_db,
        note,
    )
