"""Weights to codes and activations to quantizers, one layer at a time, beside the model.

Each layer's isolated output error is measured on the kept batches: the float layer's own input and output, the
quantized layer on the same input, running sums only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
from torch import nn
from tqdm.auto import tqdm

from evenbits.algorithms.base import ActivationQuantizer, LayerStats
from evenbits.errors import EvenbitsError
from evenbits.nn.base import QuantizedLayer, index_type
from evenbits.nn.conv import QConv
from evenbits.nn.replace import quantized_class
from evenbits.numerics.format import Format
from evenbits.numerics.metrics import RunningError, compare
from evenbits.numerics.pair_statistics import PairStatistics, pair_statistics
from evenbits.numerics.qtensor import QTensor
from evenbits.observers.calibrate import watching
from evenbits.pipeline.activations import activation_quantizers
from evenbits.pipeline.balanced import Balanced
from evenbits.pipeline.bias_correction import correct_biases
from evenbits.pipeline.methods import Methods
from evenbits.pipeline.plan import LayerPlan
from evenbits.pipeline.watch import Watched
from evenbits.schemes.scheme import Scheme

_Built: TypeAlias = tuple[QuantizedLayer, RunningError, PairStatistics | None]


@dataclass(frozen=True)
class Solved:
    """A quantized layer ready to be swapped in, and its errors against the float one."""

    module: QuantizedLayer
    weight_error: RunningError
    output_error: RunningError | None
    note: str
    pairs: PairStatistics | None


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
    built: dict[str, _Built] = {}
    activations = activation_quantizers(model, plans, scheme, balanced, watched)
    for plan in tqdm(plans, desc="quantizing", unit="layer", disable=not progress or None):
        try:
            stats = layer_stats(plan, balanced, watched)
            module, activation = model.get_submodule(plan.name), activations[plan.name]
            layer, weight_OK, quantized = build_layer(module, plan, scheme, methods, balanced, stats, activation)
            error = compare(weight_OK, quantized.dequantize())
            built[plan.name] = layer, error, pair_statistics(weight_OK, quantized)
        except EvenbitsError as error:
            raise EvenbitsError(f"layer {plan.name}: {error}") from error
    if methods.bias_correction:
        if watched is None:
            raise EvenbitsError("bias correction measures on calibration data; give data (--calibration).")
        correct_biases(model, plans, {name: layer for name, (layer, _, _) in built.items()}, balanced, watched)
    outputs = {} if watched is None else _output_errors(model, built, balanced, watched)
    unseen = {plan.name for plan in plans if watched is not None and not watched.ranges[plan.name].seen}
    notes = dict.fromkeys(unseen, "did not run on the calibration data: rounded without statistics")
    if methods.bias_correction:
        notes |= {name: "no bias to correct" for name in built.keys() - unseen if built[name][0].bias is None}
    return {
        name: Solved(module, error, outputs.get(name), notes.get(name, ""), pairs)
        for name, (module, error, pairs) in built.items()
    }


def build_layer(
    module: nn.Module,
    plan: LayerPlan,
    scheme: Scheme,
    methods: Methods,
    balanced: Balanced,
    stats: LayerStats,
    activation: ActivationQuantizer | None,
) -> tuple[QuantizedLayer, torch.Tensor, QTensor]:
    """The integer layer of one plan, with the balanced weight [O, K] it encodes and its codes."""
    scale_I, perm_I = balanced.scales.get(plan.name), balanced.perms.get(plan.name)
    rows_O = balanced.outputs.get(plan.name, slice(None))
    weight, bias = _balanced_weight(module, plan, balanced)
    weight = weight[rows_O]
    weight = weight if perm_I is None else weight[:, perm_I.to(weight.device)]
    quantized = methods.weight(weight, scheme.of(plan.name).weights, stats, **methods.weight_options)
    multiplier = None if scale_I is None or plan.name not in balanced.multiplied else scale_I.reciprocal()
    bias = None if bias is None else bias[rows_O]
    make = quantized_class(plan.kind)
    kwargs = {"geometry": QConv.geometry_of(module)} if plan.channels.spatial else {}
    layer = make(quantized, plan.shape, bias, activation, multiplier, **kwargs).to(weight.device)
    if perm_I is not None and plan.name in balanced.indexed:
        layer.input_permutation = perm_I.to(weight.device, index_type(len(perm_I)))
    return layer, weight, quantized


def _balanced_weight(
    module: nn.Module, plan: LayerPlan, balanced: Balanced
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The layer's weight as float32 [O, K], columns multiplied by s and rows by what was folded into them; the bias."""
    weight, bias = module.get_parameter("weight").detach().float(), getattr(module, "bias", None)
    if plan.name in balanced.scales:
        weight = weight * plan.channels.mount_inputs(balanced.scales[plan.name].to(weight.device), weight.ndim)
    factor_O = balanced.row_factors.get(plan.name)
    if factor_O is not None:
        factor_O = factor_O.to(weight.device)
        weight = weight * plan.channels.mount_outputs(factor_O.float(), weight.ndim)
        bias = None if bias is None else (bias.detach().double() * factor_O).to(bias.dtype)  # rounded once
    return plan.channels.matrix(weight), bias


def layer_stats(plan: LayerPlan, balanced: Balanced, watched: Watched | None) -> LayerStats:
    """Statistics of a layer's input as its weight's columns meet it: balanced, and repeated over a kernel's window."""
    moment = None if watched is None else watched.moments.get(plan.name)
    if moment is None or not moment.seen:
        return LayerStats()
    mean_I = moment.mean
    scale_I = balanced.scales.get(plan.name)
    if scale_I is not None:
        mean_I = mean_I / scale_I.to(mean_I.device).square()
    if plan.name in balanced.perms:
        mean_I = mean_I[balanced.perms[plan.name].to(mean_I.device)]
    if plan.channels.spatial:
        # A grouped convolution's row meets the channels of its own group; the mean over groups stands for all rows.
        mean_I = plan.channels.along_columns(mean_I, prod(plan.shape[2:])).mean(dim=0)
    return LayerStats(mean_I)


def _output_errors(
    model: nn.Module, built: Mapping[str, _Built], balanced: Balanced, watched: Watched
) -> dict[str, RunningError]:
    errors: dict[str, RunningError] = {}

    def see(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        if not x.numel():  # nothing was routed to it: no error is not an error of zero
            return
        expected = balanced.returned(name, y)
        errors.setdefault(name, RunningError()).add(expected, built[name][0](balanced.delivered(name, x)))

    with watching(model, built, see):
        for run in watched.source.runs():
            run()
    return errors


def single_layer(
    module: nn.Module, plan: LayerPlan, fmt: Format, stats: LayerStats, activation: ActivationQuantizer | None
) -> _Built:
    """One layer by itself, by the method of its format, nothing balanced: the layer, its weight's error, and what
    became of pairs if it has them."""
    by_format = Methods.parse("by_format", {})
    layer, weight_OK, quantized = build_layer(module, plan, Scheme(fmt), by_format, Balanced(), stats, activation)
    return layer, compare(weight_OK, quantized.dequantize()), pair_statistics(weight_OK, quantized)


def single_stats(plan: LayerPlan, watched: Watched) -> LayerStats:
    """Statistics of a layer's input as its weight's columns meet it, nothing balanced."""
    return layer_stats(plan, Balanced(), watched)
