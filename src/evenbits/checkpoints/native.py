"""`save` and `load`: a folder with safetensors and a readable config, no pickle, bit-exact both ways.

    OUT/evenbits.json         version, layer table (formats, shapes), ties, result, length and SHA-256 of every file
    OUT/evenbits.safetensors  every tensor: codes and scales of quantized layers, the rest as in the float model
    OUT/config.json, tokenizer…   for Hugging Face models, as transformers writes them

The weights are deliberately not called model.safetensors: a program that does not know quantized layers then fails at
once instead of filling a model with random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from evenbits._version import __version__
from evenbits.checkpoints import transformers as hf
from evenbits.checkpoints.contents import check_contents, with_narrow_orders
from evenbits.checkpoints.files import WEIGHTS, check_config, check_files, read_config, whole_folder, write_config
from evenbits.checkpoints.state import State, model_state, restore
from evenbits.errors import CheckpointError, EvenbitsError
from evenbits.nn.base import QuantizedLayer
from evenbits.nn.conv import CONVOLUTIONS, QConv, QConvTranspose
from evenbits.nn.conv_u8 import U8Conv2d
from evenbits.nn.linear import QLinear
from evenbits.nn.replace import replace_modules
from evenbits.nn.unfuse import unfuse, unfused_kind
from evenbits.numerics.format import Format

VERSION = 1
_KINDS: dict[str, type[QuantizedLayer]] = {"linear": QLinear} | {k.lower(): c for k, c in CONVOLUTIONS.items()}
_LARGEST = 2**48  # elements of one layer; more is no real checkpoint
_MARGIN = 8 * 1024 * 1024  # config, tokenizer and file system overhead


def save(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: Any = None,
    result: Any = None,
    overwrite: bool = False,
    verify: Callable[[Path], None] | None = None,
) -> Path:
    """Writes a quantized model to the folder `path`, whole or not at all, and returns the path.

    tokenizer: saved beside it. result: the `Result` of the run, kept in evenbits.json. overwrite: replace an evenbits
    folder.
    verify: called with the finished folder before it gets its name; if it raises, nothing is written.
    Raises EvenbitsError if the model is not quantized or holds byte chains, the folder exists or the disk is full.
    """
    chained = [name for name, module in model.named_modules() if isinstance(module, U8Conv2d)]
    if chained:
        raise EvenbitsError(
            f"the model holds byte chains ({len(chained)} convolutions, such as {chained[0]}), which checkpoints do "
            "not keep. Save the quantized model that fuse was given, and fuse it again after loading."
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    if not layers:
        raise EvenbitsError("the model has no quantized layer; call evenbits.quantize before evenbits.save.")
    state, path = model_state(model), Path(path)
    with whole_folder(path, overwrite=overwrite, needed=state.nbytes + _MARGIN) as folder:
        try:
            save_file(state.tensors, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        _save_extras(model, tokenizer, folder)
        write_config(folder, _config(model, layers, state, result))
        stored = _read_state(folder, read_config(folder))
        _compare(stored, state)
        if verify is not None:
            verify(folder)
    return path


def _save_extras(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    try:
        hf.save_extras(model, tokenizer, folder)
    except Exception as error:  # tokenizers raises plain Exception, also for a full disk
        raise EvenbitsError(
            f"the model's config or tokenizer cannot be written ({error}); nothing was written."
        ) from error


def _config(model: nn.Module, layers: dict[str, QuantizedLayer], state: State, result: Any) -> dict[str, Any]:
    return {
        "format": "evenbits",
        "format_version": VERSION,
        "evenbits_version": __version__,
        "torch_version": str(torch.__version__),
        "source": hf.source_of(model),
        "unfused": {name: kind for name, module in model.named_modules() if (kind := unfused_kind(module))},
        "layers": {name: _layer_config(layer) for name, layer in layers.items()},
        "aliases": state.aliases,
        "widened": state.widened,
        "result": None if result is None else result.to_json(),
    }


def _layer_config(layer: QuantizedLayer) -> dict[str, Any]:
    kind = next(name for name, cls in _KINDS.items() if type(layer) is cls)
    config: dict[str, Any] = {
        "kind": kind,
        "shape": list(layer.weight_shape),
        "weight": str(layer.weight_format),
        "input": None if layer.input_format is None else str(layer.input_format),
        "static": layer.input_scale is not None,
        "global_scale": layer.weight_global_scale is not None,
        "multiplier": 0 if layer.input_multiplier is None else layer.input_multiplier.numel(),
        "permutation": 0 if layer.input_permutation is None else layer.input_permutation.numel(),
        "bias": layer.bias is not None,
    }
    return {**config, "geometry": layer.geometry} if isinstance(layer, QConv) else config


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Reads a folder written by `save` and returns the quantized model in evaluation mode, bit for bit as it was saved.

    model: the float model (any weights) for a checkpoint that did not come from a Hugging Face model; it is changed in
    place. Raises CheckpointError, with `model` unchanged, for a folder that is not one of ours, was altered, has
    another version, holds numbers that its formats do not have, or belongs to another model.
    """
    folder = Path(path)
    config = read_config(folder)
    check_config(folder, config, VERSION)
    check_files(folder, config)
    state = _read_state(folder, config)
    layers = _empty_layers(config)
    check_contents(state, layers)
    state = with_narrow_orders(state, layers)
    model = hf.skeleton(folder, config.get("source")) if model is None else model
    with ExitStack() as undo:
        undo.callback(_unfuse(model, config.get("unfused", {})))
        present = dict(model.named_modules(remove_duplicate=False))
        strangers = sorted(set(layers) - set(present))
        if strangers:
            raise CheckpointError(
                f"the checkpoint has a layer {strangers[0]!r}, which the model lacks: it belongs to another model."
            )
        for name, layer in layers.items():
            _check_place(name, layer, present[name])
        undo.callback(replace_modules(model, layers))
        restore(model, state)  # checks every name, shape and type before it changes anything
        undo.pop_all()
    return model.eval()


def _unfuse(model: nn.Module, kinds: Any) -> Callable[[], None]:
    """Takes the modules apart that were in the model that was saved. Returns what takes it back."""
    if not isinstance(kinds, dict) or not _strings(kinds.values()):
        raise CheckpointError("the checkpoint's table of unfused modules cannot be read.")
    present = dict(model.named_modules(remove_duplicate=False))
    wanted = {name: kind for name, kind in kinds.items() if unfused_kind(present.get(name)) != kind}
    try:
        return unfuse(model, wanted)
    except EvenbitsError as error:
        raise CheckpointError(f"the checkpoint's table of unfused modules does not fit the model: {error}") from error


def _check_place(name: str, layer: QuantizedLayer, present: nn.Module) -> None:
    """Raises CheckpointError unless `present` is a float layer of the kind and shape that `layer` replaces."""
    weight = getattr(present, "weight", None)
    shape = getattr(present, "weight_shape", tuple(weight.shape) if isinstance(weight, torch.Tensor) else ())
    if isinstance(layer, QConv):
        floating = isinstance(present, layer.replaces)  # or a subclass that computes the same
        geometry = QConv.geometry_of(present) if floating else {}
        if floating and isinstance(layer, QConvTranspose):  # torch stores [in, out/groups, k…]
            groups = int(geometry["groups"])
            shape = (shape[1] * groups, shape[0] // groups, *shape[2:])
        fits = shape == layer.weight_shape and (geometry == layer.geometry or type(present) is type(layer))
    else:
        # Hugging Face's Conv1D holds its weight as [in, out].
        turned = type(present).__name__ == "Conv1D"
        named = isinstance(present, (nn.Linear, QLinear)) or turned
        fits = named and layer.weight_shape == (shape[::-1] if turned else shape)
    if not fits:
        raise CheckpointError(
            f"layer {name!r} of the checkpoint is a {type(layer).__name__} of shape {list(layer.weight_shape)}; the "
            f"model has a {type(present).__name__} there{f' of shape {list(shape)}' if shape else ''}."
        )


def _empty_layers(config: dict[str, Any]) -> dict[str, QuantizedLayer]:
    entries = config.get("layers")
    if not isinstance(entries, dict) or not entries or "" in entries:
        raise CheckpointError("the checkpoint's layer table is empty or unreadable.")
    layers: dict[str, QuantizedLayer] = {}
    for name, entry in entries.items():
        try:
            layers[name] = _empty_layer(entry)
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            what = f"no or unknown {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"layer {name!r} of the checkpoint cannot be built: {what}") from error
    return layers


def _empty_layer(entry: dict[str, Any]) -> QuantizedLayer:
    kind = _KINDS[entry["kind"]]
    shape = tuple(int(size) for size in entry["shape"])
    spatial = kind.spatial if issubclass(kind, QConv) else 0
    if len(shape) != 2 + spatial or min(shape) < 1 or prod(shape) > _LARGEST:
        raise ValueError(f"shape {list(shape)} does not suit kind {entry['kind']!r}")
    groups = int(entry["geometry"]["groups"]) if spatial else 1
    if entry["multiplier"] not in (0, shape[1] * groups):
        raise ValueError(f"{entry['multiplier']!r} multipliers for {shape[1] * groups} channels")
    if entry["permutation"] not in (0, 0 if spatial else shape[1]):
        raise ValueError(f"an order of {entry['permutation']!r} for {shape[1] * groups} channels")
    return kind.empty(
        shape,
        Format.parse(entry["weight"]),
        None if entry["input"] is None else Format.parse(entry["input"]),
        static=bool(entry["static"]),
        global_scale=bool(entry["global_scale"]),
        multiplier=int(entry["multiplier"]),
        permutation=int(entry["permutation"]),
        bias=torch.float32 if entry["bias"] else None,
        **({"geometry": entry["geometry"]} if spatial else {}),
    )


def _read_state(folder: Path, config: dict[str, Any]) -> State:
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}.") from error
    aliases, widened = config.get("aliases", {}), config.get("widened", {})
    if not all(isinstance(table, dict) and _strings(table.values()) for table in (aliases, widened)):
        raise CheckpointError("the checkpoint's tables of ties and types cannot be read.")
    return State(tensors, aliases, widened)


def _strings(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _compare(stored: State, state: State) -> None:
    for name, tensor in state.tensors.items():
        # Compared as bytes: a NaN payload or a signed zero must survive as well.
        same = name in stored.tensors and stored.tensors[name].dtype == tensor.dtype
        if not same or not torch.equal(_bytes(stored.tensors[name]), _bytes(tensor)):
            raise EvenbitsError(f"tensor {name!r} did not read back as it was written; the disk may be faulty.")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
