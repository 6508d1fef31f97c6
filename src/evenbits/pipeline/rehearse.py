"""A rehearsal before anything is replaced: stand-ins with weights of the quantized type take the layers' places.

Some models look at a layer they are about to call. Vision models cast the pixels to `projection.weight.dtype`, T5 its
hidden states to `wo.weight.dtype`: with integer codes in `weight` they would hand over integers, and nothing would
fail, only the numbers would be rubbish. A stand-in notes how it is called and lets the float layer compute.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from evenbits.nn.layout import layout_of
from evenbits.nn.replace import quantized_class, replace_modules
from evenbits.numerics.format import Format
from evenbits.observers.calibrate import first_tensor


class _StandIn(nn.Module):
    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        weight = layer.get_parameter("weight")
        self.register_buffer("weight", torch.empty(weight.shape, dtype=dtype, device=weight.device))
        self.training = layer.training
        self.bias = getattr(layer, "bias", None)
        self.reason = ""
        # Held in a tuple so that it is no submodule: the layer has left the model.
        self._float = (layer, weight.dtype)
        layout = layout_of(layer)
        made = quantized_class(layout.kind if layout is not None else "Linear")
        self._names = set(inspect.signature(made.forward).parameters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer, dtype = self._float
        x = first_tensor(args, kwargs)
        if not x.is_floating_point():
            self.reason = "the model casts its input to the type of its weight, which would be integers"
        if strange := sorted(set(kwargs) - self._names):
            self.reason = f"it is called with the keyword {strange[0]!r}, which its replacement does not have"
        args = tuple(a.to(dtype) if a is x else a for a in args)
        return layer(*args, **{name: a.to(dtype) if a is x else a for name, a in kwargs.items()})


def rehearse(model: nn.Module, layers: Mapping[str, Format], run: Callable[[], Any]) -> dict[str, str]:
    """Which layers (name → weight format) must stay float because of how the model treats them (name → reason).

    A forward that fails says nothing here: the same failure comes up when the real layers are in their places.
    """
    stand_ins = {
        # Other codes than int8 are packed into bytes.
        name: _StandIn(model.get_submodule(name), torch.int8 if str(fmt).startswith("int8:") else torch.uint8)
        for name, fmt in layers.items()
    }
    restore = replace_modules(model, stand_ins)
    try:
        run()
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError):
        pass
    finally:
        restore()
    return {name: stand_in.reason for name, stand_in in stand_ins.items() if stand_in.reason}
