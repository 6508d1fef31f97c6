"""Weights to codes and activations to quantizers, one layer at a time, beside the model.

Each layer's isolated output error is measured on the kept batches: the float layer's own input and output, the
quantized layer on the same input, running sums only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.errors import EvenbitsError
from evenbits.nn.base import QuantizedLayer
from evenbits.nn.conv import QConv2d
from evenbits.nn.linear import QLinear
from evenbits.numerics.affine import qparams
from evenbits.numerics.metrics import RunningError, compare
from evenbits.observers.calibrate import watching
from evenbits.observers.channel_range import ChannelRange
from evenbits.pipeline.balance import Balanced
from evenbits.pipeline.methods import Methods
from evenbits.pipeline.plan import LayerPlan, weight_OI
from evenbits.pipeline.watch import Watched
from evenbits.schemes.scheme import Scheme


@dataclass(frozen=True)
class Solved:
    """A quantized layer ready to be swapped in, and its errors against the float one."""

    module: QuantizedLayer
    weight_error: RunningError
    output_error: RunningError | None
    note: str


def solve(
    model: nn.Module,
    plans: list[LayerPlan],
    scheme: Scheme,
    methods: Methods,
    balanced: Balanced,
    watched: Watched | None,
    *,
    progress: bool,
) -> dict[str, Solved]:
    """Quantizes the planned layers. Raises EvenbitsError naming the layer that cannot be."""
    built: dict[str, tuple[QuantizedLayer, RunningError]] = {}
    for plan in tqdm(plans, desc="quantizing", unit="layer", disable=not progress or None):
        try:
            ranges = None if watched is None else watched.ranges[plan.name]
            built[plan.name] = _layer(model.get_submodule(plan.name), plan, scheme, methods, balanced, ranges)
        except EvenbitsError as error:
            raise EvenbitsError(f"layer {plan.name}: {error}") from error
    outputs = {} if watched is None else _output_errors(model, built, balanced, watched)
    unseen = {plan.name for plan in plans if watched is not None and not watched.ranges[plan.name].seen}
    note = "did not run on the calibration data: rounded without statistics"
    return {
        name: Solved(module, error, outputs.get(name), note if name in unseen else "")
        for name, (module, error) in built.items()
    }


def _layer(
    module: nn.Module,
    plan: LayerPlan,
    scheme: Scheme,
    methods: Methods,
    balanced: Balanced,
    ranges: ChannelRange | None,
) -> tuple[QuantizedLayer, RunningError]:
    weight = weight_OI(module)
    scale_I = balanced.scales.get(plan.name)
    weight = weight.float() if scale_I is None else weight.float() * scale_I.to(weight.device)
    quantized = methods.weight(weight, scheme.weights, None, **methods.weight_options)
    activation = _activation(scheme, ranges, scale_I)
    multiplier = None if scale_I is None or plan.name not in balanced.multiplied else scale_I.reciprocal()
    bias = getattr(module, "bias", None)
    kwargs = {"geometry": QConv2d.geometry_of(module)} if isinstance(module, nn.Conv2d) else {}
    make: type[QuantizedLayer] = QConv2d if isinstance(module, nn.Conv2d) else QLinear
    layer = make(quantized, plan.shape, bias, activation, multiplier, **kwargs).to(weight.device)
    return layer, compare(weight, quantized.dequantize())


def _activation(
    scheme: Scheme, ranges: ChannelRange | None, scale_I: torch.Tensor | None
) -> ActivationQuantizer | None:
    fmt = scheme.input_activations
    if fmt is None or scheme.dynamic or ranges is None:
        return None if fmt is None else ActivationQuantizer(fmt)
    # No second pass is needed after smoothing: the range of x/s is the range of x, channel by channel, over s.
    divisor = torch.ones(()) if scale_I is None else scale_I.to(ranges.hi.device)
    lo, hi = (ranges.lo / divisor).amin(), (ranges.hi / divisor).amax()
    scale, zero_point = qparams(lo.reshape(1), hi.reshape(1), fmt)
    return ActivationQuantizer(fmt, scale, zero_point)


def _output_errors(
    model: nn.Module, built: Mapping[str, tuple[QuantizedLayer, RunningError]], balanced: Balanced, watched: Watched
) -> dict[str, RunningError]:
    errors: dict[str, RunningError] = {}

    def see(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        scale_I = balanced.scales.get(name)
        if scale_I is not None and name not in balanced.multiplied:
            x = x / scale_I.to(x.device, x.dtype)  # what the folded producer will deliver
        errors.setdefault(name, RunningError()).add(y, built[name][0](x))

    with watching(model, built, see):
        for run in watched.source.runs():
            run()
    return errors
