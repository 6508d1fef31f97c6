"""A model's tensors as a file holds them: each stored once, and in half precision where that loses nothing.

Tied tensors are stored under one name; the others are aliases. A large float32 tensor whose every value is also a
float16 (or bfloat16) value, as in a model that was loaded from half precision, is stored in that type and widened again
on load: half the bytes, the same bits. Tensors of quantized layers are stored as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from evenbits.errors import CheckpointError, EvenbitsError
from evenbits.nn.base import QuantizedLayer

_NARROW_FROM = 1024  # elements; below that the saving is not worth a line in the config


@dataclass(frozen=True)
class State:
    """tensors: what is written; aliases: other name → name; widened: name → the type it has in the model."""

    tensors: dict[str, torch.Tensor]
    aliases: dict[str, str]
    widened: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def model_state(model: nn.Module) -> State:
    """The parameters and persistent buffers of `model`, ready to be written."""
    quantized = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, QuantizedLayer))
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    widened: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            raise EvenbitsError(f"the model's state {name!r} is a {type(tensor).__name__}; only tensors can be saved.")
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        narrow = None if name.startswith(quantized) else _narrower(tensor)
        if narrow is not None:
            widened[name] = str(tensor.dtype).removeprefix("torch.")
        stored = tensor.detach().to("cpu", narrow or tensor.dtype).contiguous()
        # A file has no overlapping tensors: a view of another one is written as a copy.
        storage = stored.untyped_storage().data_ptr()
        tensors[name] = stored.clone() if storage in storages else stored
        storages.add(storage)
    return State(tensors, aliases, widened)


def _narrower(tensor: torch.Tensor) -> torch.dtype | None:
    if tensor.dtype != torch.float32 or tensor.numel() < _NARROW_FROM:
        return None
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(tensor.to(dtype).float(), tensor):
            return dtype
    return None


def restore(model: nn.Module, state: State) -> None:
    """Puts `state` into `model`, with the file's types and ties. Raises CheckpointError if names or shapes differ."""
    tensors = dict(state.tensors)
    for name, dtype in state.widened.items():
        if name not in tensors or dtype != "float32":
            raise CheckpointError(f"the checkpoint widens {name!r} to {dtype!r}, which it cannot.")
        tensors[name] = tensors[name].float()
    for alias, name in state.aliases.items():
        if name not in tensors:
            raise CheckpointError(f"the checkpoint ties {alias!r} to {name!r}, which it does not hold.")
        tensors[alias] = tensors[name]
    expected = model.state_dict()
    _check_names(set(expected), set(tensors))
    exact = _exact_names(model)
    for name, tensor in tensors.items():
        if tuple(expected[name].shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"tensor {name!r} has shape {list(tensor.shape)} in the checkpoint and {list(expected[name].shape)} in "
                "the model."
            )
        same = expected[name].dtype == tensor.dtype
        if not same and (name in exact or not (expected[name].is_floating_point() and tensor.is_floating_point())):
            raise CheckpointError(
                f"tensor {name!r} is {tensor.dtype} in the checkpoint, {expected[name].dtype} in the model."
            )
    model.load_state_dict(tensors, strict=True, assign=True)
    for alias, name in state.aliases.items():
        _tie(model, alias, name)


def _exact_names(model: nn.Module) -> set[str]:
    """Codes, scales and zero points: a quantized layer has them in one type only (its bias in any float type)."""
    layers = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantizedLayer)]
    return {f"{name}.{part}" for name, layer in layers for part, _ in layer.named_buffers() if part != "bias"}


def _check_names(expected: set[str], given: set[str]) -> None:
    missing, extra = sorted(expected - given), sorted(given - expected)
    if missing or extra:
        parts = [
            f"lacks {missing[0]!r}" if missing else "",
            f"has {extra[0]!r}, which the model lacks" if extra else "",
        ]
        raise CheckpointError(
            f"the checkpoint does not belong to this model: it {' and '.join(p for p in parts if p)} "
            f"({len(missing)} missing, {len(extra)} unexpected)."
        )


def _tie(model: nn.Module, alias: str, name: str) -> None:
    def place(full: str) -> tuple[nn.Module, str]:
        parent, _, last = full.rpartition(".")
        return model.get_submodule(parent), last

    (owner, tensor_name), (other, other_name) = place(name), place(alias)
    if (tensor_name in owner._parameters) == (other_name in other._parameters):
        setattr(other, other_name, getattr(owner, tensor_name))
