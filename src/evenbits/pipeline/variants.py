"""What `bench` times: a quantized model, who computes each of its layers, and the float model in float32 and bfloat16.

Other libraries are in peers.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from evenbits.checkpoints.sources import DTYPES
from evenbits.errors import EvenbitsError
from evenbits.evaluation.memory import model_bytes
from evenbits.kernels import dispatch, pair_fp8, weight_only
from evenbits.kernels.conv_u8 import report_conv
from evenbits.nn.base import QuantizedLayer
from evenbits.nn.conv import QConv, QConv2d
from evenbits.nn.linear import QLinear
from evenbits.nn.replace import replace_modules


@dataclass(frozen=True)
class Variant:
    """One competitor. run: takes a batch's arguments; weight_bytes: None if it cannot be counted; dtype: of inputs."""

    name: str
    run: Callable[..., Any]
    weight_bytes: int | None
    dtype: str = "float32"
    any_shape: bool = True


def decoded(model: nn.Module) -> nn.Module:
    """A float copy of a quantized model: plain layers with the decoded weights, of the shapes of the float model.

    For its speed: a reordering or a smoothing at a layer's input is left out, so its output is not the model's.
    """
    made = copy.deepcopy(model)
    layers = {name: layer for name, layer in made.named_modules() if isinstance(layer, QuantizedLayer)}
    replace_modules(made, {name: _plain(layer) for name, layer in layers.items()})
    return made.eval()


def _plain(layer: QuantizedLayer) -> nn.Module:
    weight = layer.qweight().dequantize(torch.float32).view(layer.weight_shape)
    made: nn.Module
    if not isinstance(layer, QConv):
        made = nn.Linear(layer.weight_shape[1], layer.weight_shape[0], layer.bias is not None)
    elif layer.replaces.__name__.startswith("ConvTranspose"):
        raise EvenbitsError("a transposed convolution is not decoded here; give the float model (--against).")
    else:
        pads = layer.padding[::2][::-1]
        if layer.padding[::2] != layer.padding[1::2]:
            raise EvenbitsError("uneven padding is not decoded here; give the float model (--against).")
        places = (layer.weight_shape[1] * layer.groups, layer.weight_shape[0], layer.weight_shape[2:])
        made = layer.replaces(
            *places, layer.stride, pads, layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode
        )
    state = {"weight": weight} if layer.bias is None else {"weight": weight, "bias": layer.bias.float()}
    made.load_state_dict(state)
    return made


def float_variants(model: nn.Module) -> list[Variant]:
    """float32 and bfloat16 of a float model."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    return [
        Variant("float32", model, model_bytes(model)),
        Variant("bfloat16", half, model_bytes(half), "bfloat16"),
    ]


def served(model: nn.Module) -> dict[str, str]:
    """Who computes each quantized layer of a model (name → backend and operation)."""
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        device = layer.weight.device.type
        if isinstance(layer, QLinear) and layer.is_fp8 and pair_fp8.is_served(device):
            found[name] = f"linear_pair_fp8 by {pair_fp8.served_by(device)}"
        elif isinstance(layer, QLinear) and layer.is_streamed:
            found[name] = f"linear_pair_float by {weight_only.served_by(device)}"
        elif not layer.is_integer:
            found[name] = "float product of decoded weights"
        elif isinstance(layer, QConv2d) and layer.takes_bytes:
            found[name] = f"conv2d_u8 by {report_conv(device)[0]}"
        elif isinstance(layer, QConv):
            found[name] = f"exact sums by windows ({dispatch.choice(device).backend}) or float32"
        else:
            packed = isinstance(layer, QLinear) and layer.is_packed
            found[name] = f"{'linear_pair' if packed else 'linear_w8a8'} by {dispatch.choice(device).backend}"
    return found


def on_device(batch: Any, device: str) -> Any:
    """A batch on a device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, batch)


def to_type(batch: Any, dtype: str) -> Any:
    """A batch whose float tensors have a type."""
    wanted = DTYPES[dtype]

    def typed(leaf: Any) -> Any:
        return leaf.to(wanted) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return tree_map(typed, batch)
