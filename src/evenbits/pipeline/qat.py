"""`prepare_qat` and `convert_qat`: a float model to one that trains with its roundings, and that one to integer layers.

    prepare_qat(model, "W4A4_OVP")     layers become twins (nn/qat.py) that start as plain rounding would leave them
    …                                  any training loop; parameters: weights, biases and the scales' logarithms
    convert_qat(model)                 twins become QLinear and QConv2d with packed codes; evenbits.save writes them

Both change the model in place, all of it or nothing. Parameters of nn.Linear and nn.Conv2d are taken over, so that an
optimizer made before still holds the weights; one made after `prepare_qat` holds the scales too. Activation scales
start at the first batch that reaches a layer, in training or evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.errors import EvenbitsError
from evenbits.nn.base import QuantizedLayer
from evenbits.nn.conv import QConv
from evenbits.nn.qat import QATConv2d, QATLayer, QATLinear
from evenbits.nn.replace import replace_modules
from evenbits.pipeline.plan import LayerPlan, plan_layers, weight_OI
from evenbits.schemes.scheme import LayerFormats, Scheme, resolve

_TRAINED = ("Linear", "Conv1D", "Conv2d")


def prepare_qat(model: nn.Module, scheme: str | Path | Mapping[str, Any] | Scheme) -> list[str]:
    """Replaces every layer that the scheme quantizes by its fake-quantized twin, in place. Returns their names.

    scheme: as for `quantize`; symmetric formats only. Static activations (`dynamic: false`) get a learnable scale each,
    dynamic ones are rounded by each input's own scale. Pair kinds and ANT types are chosen now (of activations: at the
    first batch) and stay.
    Raises EvenbitsError, with the model unchanged, for formats that cannot be trained, parameters that are not finite,
    a model that is prepared or quantized already, and if no layer would be replaced.
    """
    if not isinstance(model, nn.Module):
        raise EvenbitsError(f"prepare_qat takes a torch.nn.Module; given {type(model).__name__}.")
    scheme = resolve(scheme)
    for name, module in model.named_modules():
        if isinstance(module, (QATLayer, QuantizedLayer)):
            raise EvenbitsError(f"layer {name} is a {type(module).__name__} already; prepare_qat takes a float model.")
    plans = [_without_fused(model, plan) for plan in plan_layers(model, scheme)]
    chosen = [plan for plan in plans if not plan.reason]
    if not chosen:
        reasons = "; ".join(f"{plan.name or 'the model'}: {plan.reason}" for plan in plans[:5])
        raise EvenbitsError(f"no layer would be trained with quantization. {reasons or 'It has no Linear or Conv2d.'}")
    twins = {}
    for plan in chosen:
        try:
            twins[plan.name] = _twin(model.get_submodule(plan.name), scheme.of(plan.name))
        except EvenbitsError as error:
            raise EvenbitsError(f"layer {plan.name}: {error}") from error
    replace_modules(model, twins)
    return list(twins)


def convert_qat(model: nn.Module) -> None:
    """Replaces every twin by the integer layer whose output it has, in place; other modules keep their mode.

    Raises EvenbitsError, with the model unchanged, if there is no twin, a weight is not finite or a static activation
    never saw a batch.
    """
    twins = {name: module for name, module in model.named_modules() if isinstance(module, QATLayer)}
    if not twins:
        raise EvenbitsError("the model has no fake-quantized layer; call prepare_qat before convert_qat.")
    if "" in twins:
        raise EvenbitsError("the model is this single layer; use its to_quantized().")
    layers = {}
    for name, twin in twins.items():
        try:
            layers[name] = twin.to_quantized()
        except EvenbitsError as error:
            raise EvenbitsError(f"layer {name}: {error}") from error
    replace_modules(model, layers)


def _without_fused(model: nn.Module, plan: LayerPlan) -> LayerPlan:
    parent = model.get_submodule(plan.name.rpartition(".")[0])
    if not plan.reason and plan.kind not in _TRAINED:
        return replace(plan, reason=f"training quantizes {', '.join(_TRAINED)} only")
    if plan.reason or not isinstance(parent, nn.TransformerEncoderLayer):
        return plan
    return replace(plan, reason="nn.TransformerEncoderLayer reads its weight directly in evaluation")


def _twin(module: nn.Module, formats: LayerFormats) -> QATLayer:
    activation = None if formats.input_activations is None else ActivationQuantizer(formats.input_activations)
    weight = module.get_parameter("weight")
    if type(module).__name__ == "Conv1D":  # Hugging Face's, stored as [I, O]
        weight = nn.Parameter(weight_OI(module).contiguous().clone(), requires_grad=weight.requires_grad)
    bias: Any = getattr(module, "bias", None)
    twin: QATLayer
    if isinstance(module, nn.Conv2d):
        geometry = QConv.geometry_of(module)
        twin = QATConv2d(weight, bias, formats.weights, activation, dynamic=formats.dynamic, geometry=geometry)
    else:
        twin = QATLinear(weight, bias, formats.weights, activation, dynamic=formats.dynamic)
    return twin.train(module.training)
