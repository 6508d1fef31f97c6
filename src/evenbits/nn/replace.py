"""Putting modules in the place of others, everywhere they are shared, and taking it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from evenbits.nn.base import QuantizedLayer
from evenbits.nn.conv import CONVOLUTIONS
from evenbits.nn.linear import QLinear


def quantized_class(kind: str) -> type[QuantizedLayer]:
    """The integer layer that replaces a float layer of this kind (layout.py's word)."""
    return CONVOLUTIONS.get(kind, QLinear)


def replace_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Replaces the named submodules of `model` wherever the same object stands. Returns what restores them."""
    by_identity = {id(model.get_submodule(name)): module for name, module in replacements.items()}
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and id(child) in by_identity
    ]
    for parent, name, child in places:
        parent._modules[name] = by_identity[id(child)]

    def restore() -> None:
        for parent, name, child in places:
            parent._modules[name] = child

    return restore
