"""Bias correction: what rounding adds to every output of a layer on average is taken off its bias.

    b ← b − E[ŷ − y]     per output channel, over the calibration data; ŷ of the quantized layer, y of the float one

Rounding errors of weights do not average out where inputs have means: they shift an output by the same amount for
every token, and later layers cannot tell that from a signal (docs/olive-sst2.md). Costs nothing at run time, and one
more walk over the calibration data. Each layer is corrected by itself, on the float model's inputs. Layers without a
bias stay as they are, and their rows of the result say so.

Source: M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section
4.2 (there from BatchNorm's statistics; here measured, with the activations' rounding included).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from evenbits.errors import EvenbitsError
from evenbits.nn.base import QuantizedLayer
from evenbits.observers.calibrate import watching
from evenbits.pipeline.balanced import Balanced
from evenbits.pipeline.plan import LayerPlan
from evenbits.pipeline.watch import Watched


class _Shift:
    """Running mean of an output's error, float64 [O]."""

    def __init__(self) -> None:
        self.total_O: torch.Tensor | None = None
        self.count = 0

    def add(self, error: torch.Tensor, spatial: int) -> None:
        """error: [..., O] followed by `spatial` dimensions."""
        rows = error.movedim(-1 - spatial, -1).flatten(0, -2).double()
        total_O = rows.sum(dim=0)
        self.total_O = total_O if self.total_O is None else self.total_O + total_O
        self.count += len(rows)


def correct_biases(
    model: nn.Module,
    plans: list[LayerPlan],
    layers: Mapping[str, QuantizedLayer],
    balanced: Balanced,
    watched: Watched,
) -> None:
    """Corrects the biases of quantized layers that are not in the model yet. Nothing of an activation is kept. Raises
    EvenbitsError if there is no bias to correct."""
    if all(layer.bias is None for layer in layers.values()):
        raise EvenbitsError("no quantized layer has a bias, so there is none to correct; leave bias_correction out.")
    spatial = {plan.name: plan.channels.spatial for plan in plans}
    shifts: dict[str, _Shift] = {}

    def see(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        if x.numel() and layers[name].bias is not None:
            error = layers[name](balanced.delivered(name, x)).double() - balanced.returned(name, y).double()
            shifts.setdefault(name, _Shift()).add(error, spatial[name])

    with watching(model, layers, see):
        for run in watched.source.runs():
            run()
    for name, shift in shifts.items():
        bias = layers[name].bias
        assert bias is not None and shift.total_O is not None
        bias.copy_(bias.double() - shift.total_O / shift.count)
