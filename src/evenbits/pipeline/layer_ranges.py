"""What each layer's input quantizer has to span, before and after smoothing: O(channels) figures of the calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.pipeline.activations import activation_quantizers
from evenbits.pipeline.balanced import Balanced
from evenbits.pipeline.prepare import Prepared
from evenbits.pipeline.watch import Watched


@dataclass(frozen=True)
class RangeRow:
    """One layer's input. absmax: largest |x|; unevenness: largest channel's absmax over the median channel's (1: all
    alike; None if the median is 0); scale: calibrated step of the quantizer (None: taken from each input, or float);
    smoothing: what became of the layer's region; s_min, s_max: its smoothing factors."""

    name: str
    kind: str
    input_format: str
    absmax_before: float
    absmax_after: float
    unevenness_before: float | None
    unevenness_after: float | None
    scale_before: float | None
    scale_after: float | None
    smoothing: str
    s_min: float | None
    s_max: float | None


def layer_ranges(model: nn.Module, prepared: Prepared, watched: Watched) -> tuple[RangeRow, ...]:
    """A row for every quantized layer that ran, in the plan's order. Searched scales take two more passes over the kept
    batches."""
    seen = [plan for plan in prepared.chosen if watched.ranges[plan.name].seen]
    plain = Balanced(layouts=prepared.balanced.layouts)
    before = activation_quantizers(model, seen, prepared.scheme, plain, watched)
    status = {name: row.status for row in prepared.balanced.rows for name in row.layers}
    return tuple(
        _row(plan.name, plan.kind, prepared, watched, before[plan.name], status.get(plan.name, "none")) for plan in seen
    )


def _row(
    name: str, kind: str, prepared: Prepared, watched: Watched, plain: ActivationQuantizer | None, status: str
) -> RangeRow:
    absmax_I = watched.ranges[name].absmax
    scale_I = prepared.balanced.scales.get(name)
    after_I = absmax_I if scale_I is None else absmax_I / scale_I.to(absmax_I.device)
    module = prepared.modules[name]
    return RangeRow(
        name=name,
        kind=kind,
        input_format="float" if module.input_format is None else str(module.input_format),
        absmax_before=float(absmax_I.max()),
        absmax_after=float(after_I.max()),
        unevenness_before=unevenness(absmax_I),
        unevenness_after=unevenness(after_I),
        scale_before=None if plain is None or plain.scale is None else float(plain.scale),
        scale_after=None if module.input_scale is None else float(module.input_scale),
        smoothing=status,
        s_min=None if scale_I is None else float(scale_I.min()),
        s_max=None if scale_I is None else float(scale_I.max()),
    )


def unevenness(absmax_I: torch.Tensor) -> float | None:
    """The largest channel over the median channel; None if half of the channels are zero."""
    median = float(absmax_I.median())
    return float(absmax_I.max()) / median if median > 0 else None
