"""What a quantized model is timed against: the float model, bfloat16, and the int8 of other libraries.

A peer is taken if it is installed, and named if it is not: an absent figure must not look like a won one.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from evenbits.checkpoints.sources import DTYPES
from evenbits.errors import EvenbitsError
from evenbits.evaluation.memory import model_bytes
from evenbits.kernels import dispatch, weight_only
from evenbits.kernels.conv_u8 import report_conv
from evenbits.nn.base import QuantizedLayer
from evenbits.nn.conv import QConv, QConv2d
from evenbits.nn.linear import QLinear
from evenbits.nn.replace import replace_modules

PEERS = ("torch dynamic int8", "onnxruntime dynamic int8", "openvino float")
_PACKAGES = {"onnxruntime dynamic int8": ("onnxruntime", "onnx", "onnxscript"), "openvino float": ("openvino",)}


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


def peers(model: nn.Module, batch: Any) -> tuple[list[Variant], list[str]]:
    """Other libraries' versions of a float model, and a sentence for each that is missing, with the reason."""
    found, notes = [], []
    for name in PEERS:
        absent = [package for package in _PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]
        if absent:
            notes.append(f"{name}: not measured ({', '.join(absent)} not installed).")
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations of the peers' own
                found.append(_BUILDERS[name](model, batch))
        except Exception as error:  # whatever a peer raises for a model it cannot take
            reason = " ".join(str(error).split())[:160]
            notes.append(f"{name}: not measured ({type(error).__name__}: {reason}).")
            if isinstance(error, MemoryError):
                raise
    return found, notes


def _torch_dynamic(model: nn.Module, _: Any) -> Variant:
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise EvenbitsError("it quantizes linear layers only, and the model has none")
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return Variant("torch dynamic int8", quantized, None)


def _exported(model: nn.Module, batch: Any, path: Path) -> list[str]:
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    args = () if kwargs else tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    config = getattr(model, "config", None)
    caching = getattr(config, "use_cache", None)
    if config is not None:
        config.use_cache = False
    try:
        torch.onnx.export(model, args, str(path), kwargs=kwargs or None, dynamo=True, verbose=False)
    finally:
        if config is not None:
            config.use_cache = caching
    return list(kwargs)


def _onnxruntime(model: nn.Module, batch: Any) -> Variant:
    runtime = importlib.import_module("onnxruntime")
    quantization = importlib.import_module("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        _exported(model, batch, plain)
        quantization.quantize_dynamic(str(plain), str(small), weight_type=quantization.QuantType.QInt8)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(str(small), options, providers=["CPUExecutionProvider"])
        names, nbytes = [given.name for given in session.get_inputs()], small.stat().st_size

    def run(*args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        given = [kwargs[name] for name in names] if kwargs else args
        return session.run(None, {n: x.numpy() for n, x in zip(names, given, strict=True)})

    return Variant("onnxruntime dynamic int8", run, nbytes, any_shape=False)


def _openvino(model: nn.Module, batch: Any) -> Variant:
    library = importlib.import_module("openvino")
    example = dict(batch) if isinstance(batch, Mapping) else batch
    converted = library.convert_model(model, example_input=example)
    compiled = library.compile_model(
        converted, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    )

    def run(*args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        given: Any = {name: x.numpy() for name, x in kwargs.items()} if kwargs else [x.numpy() for x in args]
        return compiled(given)

    return Variant("openvino float", run, None, any_shape=False)


_BUILDERS: dict[str, Callable[[nn.Module, Any], Variant]] = {
    "torch dynamic int8": _torch_dynamic,
    "onnxruntime dynamic int8": _onnxruntime,
    "openvino float": _openvino,
}


def served(model: nn.Module) -> dict[str, str]:
    """Who computes each quantized layer of a model (name → backend and operation)."""
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        device = layer.weight.device.type
        if isinstance(layer, QLinear) and layer.is_streamed:
            found[name] = f"linear_pair_float by {weight_only.served_by(device)}"
        elif not layer.is_integer:
            found[name] = "float product of decoded weights"
        elif isinstance(layer, QConv2d):
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
