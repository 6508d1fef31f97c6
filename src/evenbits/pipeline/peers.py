"""Other libraries' versions of a float model, for `bench`.

A peer is taken if it is installed, and named if it is not: an absent figure must not look like a won one. Each is used
as its own documentation does, with the threads that torch has.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from evenbits.errors import EvenbitsError
from evenbits.evaluation.latency import forward
from evenbits.nn.replace import replace_modules
from evenbits.pipeline.variants import Variant, to_type

# Peer → the packages it needs.
PEERS: dict[str, tuple[str, ...]] = {
    "torch dynamic int8": (),
    "torchao int8 dynamic": ("torchao",),
    "bitsandbytes nf4": ("bitsandbytes",),
    "optimum-quanto int8": ("optimum.quanto",),
    "onnxruntime dynamic int8": ("onnxruntime", "onnx", "onnxscript"),
    "openvino float": ("openvino",),
    "openvino NNCF int8": ("openvino", "nncf"),
}


def peers(model: nn.Module, batch: Any) -> tuple[list[Variant], list[str]]:
    """Other libraries' versions of a float model, and a sentence for each that is missing, with the reason."""
    found, notes = [], []
    for name, packages in PEERS.items():
        absent = [package for package in packages if not _installed(package)]
        if absent:
            notes.append(f"{name}: not measured ({', '.join(absent)} not installed).")
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations of the peers' own
                variant = _BUILDERS[name](model, batch)
                with torch.inference_mode():  # some say only now that they cannot
                    forward(variant.run, to_type(batch, variant.dtype))()
            found.append(variant)
        except Exception as error:  # whatever a peer raises for a model it cannot take
            reason = " ".join(str(error).split())[:160]
            notes.append(f"{name}: not measured ({type(error).__name__}: {reason}).")
            if isinstance(error, MemoryError):
                raise
    return found, notes


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that a dotted name stands in
        return False


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    found = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if not found:
        raise EvenbitsError("it quantizes linear layers only, and the model has none")
    return found


def _torch_dynamic(model: nn.Module, _: Any) -> Variant:
    _linears(model)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return Variant("torch dynamic int8", quantized, None)


def _torchao(model: nn.Module, _: Any) -> Variant:
    _linears(model)
    library = importlib.import_module("torchao.quantization")
    made = copy.deepcopy(model)
    library.quantize_(made, library.Int8DynamicActivationInt8WeightConfig())
    return Variant("torchao int8 dynamic", made, None)


def _bitsandbytes(model: nn.Module, _: Any) -> Variant:
    library = importlib.import_module("bitsandbytes")
    made, half = copy.deepcopy(model).to(torch.bfloat16), torch.bfloat16
    smaller: dict[str, nn.Module] = {}
    for name, layer in _linears(made).items():
        if (
            layer.out_features % 64
        ):  # its CPU product refuses those; transformers leaves heads alone for its own reasons
            continue
        sizes = (layer.in_features, layer.out_features, layer.bias is not None, half)
        smaller[name] = library.nn.Linear4bit(*sizes, quant_type="nf4")
        smaller[name].load_state_dict(layer.state_dict())
        smaller[name].to("cpu")  # which packs the weight
    replace_modules(made, smaller)
    kept = len(_linears(model)) - len(smaller)  # said in the name: the figure is theirs too
    return Variant(f"bitsandbytes nf4{f', {kept} layers bfloat16' * bool(kept)}", made.eval(), None, "bfloat16")


def _quanto(model: nn.Module, _: Any) -> Variant:
    _linears(model)
    library = importlib.import_module("optimum.quanto")
    made = copy.deepcopy(model)
    library.quantize(made, weights=library.qint8)
    library.freeze(made)
    return Variant("optimum-quanto int8", made.eval(), None)


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


def _openvino(model: nn.Module, batch: Any, *, bits: int = 32) -> Variant:
    library = importlib.import_module("openvino")
    example = dict(batch) if isinstance(batch, Mapping) else batch
    converted = library.convert_model(model, example_input=example)
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    if bits == 8:
        nncf = importlib.import_module("nncf")
        inputs = tree_map(lambda leaf: leaf.numpy() if isinstance(leaf, torch.Tensor) else leaf, example)
        converted = nncf.quantize(converted, nncf.Dataset([inputs]), subset_size=1)
    compiled = library.compile_model(converted, "CPU", settings)

    def run(*args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        given: Any = {name: x.numpy() for name, x in kwargs.items()} if kwargs else [x.numpy() for x in args]
        return compiled(given)

    return Variant("openvino NNCF int8" if bits == 8 else "openvino float", run, None, any_shape=False)


_BUILDERS: dict[str, Callable[[nn.Module, Any], Variant]] = {
    "torch dynamic int8": _torch_dynamic,
    "torchao int8 dynamic": _torchao,
    "bitsandbytes nf4": _bitsandbytes,
    "optimum-quanto int8": _quanto,
    "onnxruntime dynamic int8": _onnxruntime,
    "openvino float": _openvino,
    "openvino NNCF int8": lambda model, batch: _openvino(model, batch, bits=8),
}
