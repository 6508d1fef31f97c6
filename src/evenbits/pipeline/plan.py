"""Which layers a scheme quantizes, and for every other matrix of the model why not. No layer is left unmentioned.

A layer is a module with a layout (nn/layout.py): linear layers and convolutions of every kind. Every other parameter
with two or more dimensions gets a line of its own: embeddings, routers, and the fused weights of experts and attention
that were not taken apart before (unfuse.py), ….
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
from torch import nn

from evenbits.errors import EvenbitsError
from evenbits.graph.trace import Trace
from evenbits.nn.layout import Layout, layout_of
from evenbits.schemes.scheme import Scheme


@dataclass(frozen=True)
class LayerPlan:
    """A layer (or a matrix that belongs to none). `reason` is empty if it is to be quantized.

    layout: of a layer whose weight is its own, quantized or not, so that its channels may be scaled; else None.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str = ""
    layout: Layout | None = None

    @property
    def channels(self) -> Layout:
        """The layout. Raises EvenbitsError for what is no layer."""
        if self.layout is None:
            raise EvenbitsError(f"{self.name} ({self.kind}) is not a layer whose channels can be scaled.")
        return self.layout


def weight_OI(module: nn.Module) -> torch.Tensor:
    """A layer's weight as [out, in] (convolutions: [out, in/groups · k]); shares memory where it can."""
    layout = layout_of(module)
    if layout is None:
        raise EvenbitsError(f"{type(module).__name__} is not a linear or convolution layer.")
    return layout.matrix(module.get_parameter("weight").detach())


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape a quantized layer states: the float weight's with output channels first, [O, I/groups, k…]."""
    shape = tuple(module.get_parameter("weight").shape)
    layout = layout_of(module)
    if layout is None or not layout.swapped:
        return shape
    return (layout.out_channels, layout.in_channels // layout.groups, *shape[2:])


def plan_layers(model: nn.Module, scheme: Scheme) -> list[LayerPlan]:
    """A line for every layer and every other matrix, in model order.

    Raises EvenbitsError for non-finite parameters, and for an override of the scheme that is no layer's.
    """
    check_finite(model)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    plans = list(_lines(model, scheme, owners))
    _check_overrides(plans, scheme)
    return plans


def check_finite(model: nn.Module) -> None:
    """Raises EvenbitsError naming the first parameter that holds NaN or infinite values."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise EvenbitsError(f"parameter {name} holds NaN or infinite values; mend the model before quantizing it.")


def _check_overrides(plans: list[LayerPlan], scheme: Scheme) -> None:
    """An override that decides for no layer was meant for one: its name is misspelt, or one before it took them all."""
    layers = [plan.name for plan in plans if plan.layout is not None]
    used = {scheme.override_of(name) for name in layers}
    for pattern, formats in scheme.overrides:
        if pattern in used:
            continue
        if any(replace(scheme, overrides=((pattern, formats),)).override_of(name) for name in layers):
            raise EvenbitsError(
                f"the override {pattern!r} is never reached: every layer it matches is taken by an override before it. "
                "The first one that matches decides; put it first."
            )
        nearest = ", ".join(get_close_matches(pattern, layers, n=3, cutoff=0.0)) or "none"
        raise EvenbitsError(f"the override {pattern!r} matches no layer of the model; the nearest names: {nearest}.")


def _lines(model: nn.Module, scheme: Scheme, owners: dict[int, list[str]]) -> Iterator[LayerPlan]:
    for name, module in model.named_modules():
        layout = layout_of(module)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{parameter_name}" if name else parameter_name
            if layout is not None and parameter_name == "weight":
                # The same module in two places is one layer; two modules with one weight are tied.
                others = _others(model, module, owners[id(parameter)])
                free = scheme.tied and not scheme.ignores(name) and _only_embeddings(model, others)
                bound = _bound(name, [] if free else others) or _burden(module)
                reason = bound or ("ignored by the scheme" if scheme.ignores(name) else "")
                yield LayerPlan(name, layout.kind, weight_shape(module), reason, None if bound else layout)
            elif parameter.ndim >= 2 and full_name == _first_matrix(model, owners[id(parameter)]):
                yield LayerPlan(full_name, type(module).__name__, tuple(parameter.shape), _foreign(module))


def _others(model: nn.Module, module: nn.Module, names: list[str]) -> list[str]:
    """Of the names of one parameter those that are not `module`'s."""
    return [name for name in names if model.get_submodule(name.rpartition(".")[0]) is not module]


def _only_embeddings(model: nn.Module, names: list[str]) -> bool:
    return all(isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding) for name in names)


def _first_matrix(model: nn.Module, names: list[str]) -> str:
    """The name under which a parameter that is no layer's weight has its line: not a layer's, if it has another."""
    return next((name for name in names if layout_of(model.get_submodule(name.rpartition(".")[0])) is None), names[0])


def untied(model: nn.Module, plans: list[LayerPlan]) -> tuple[str, ...]:
    """What to know of the layers to be quantized whose weight is an embedding's too. Before they are replaced."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    notes = []
    for plan in plans:
        module = model.get_submodule(plan.name)
        if others := _others(model, module, owners[id(module.get_parameter("weight"))]):
            notes.append(
                f"{plan.name} is quantized from a copy of its own; the float weight stays in {', '.join(others)}."
            )
    return tuple(notes)


def _bound(name: str, others: list[str]) -> str:
    if others:
        return f"its weight is tied to {', '.join(others)}"
    return "" if name else "the model is this single layer; wrap it in a module to have it replaced"


def _burden(module: nn.Module) -> str:
    """What a layer carries that its replacement would lose."""
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    extra = [name for name in (*own, *dict(module.named_children())) if name not in ("weight", "bias")]
    if extra:
        return f"it carries {extra[0]!r} besides weight and bias"
    return "it has forward hooks, which would be lost" if module._forward_hooks or module._forward_pre_hooks else ""


def _foreign(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding: rows are looked up, nothing is multiplied"
    return f"a parameter of {type(module).__name__}, which this version does not replace"


def outside_readers(trace: Trace, plans: list[LayerPlan]) -> dict[str, str]:
    """Layers whose weight was read outside their own forward (name → reason): replacing them would break the reader."""
    names = {plan.name for plan in plans}
    found: dict[str, str] = {}
    for value, owners in trace.parameters.items():
        layer = owners[0].rpartition(".")[0]
        if layer not in names:
            continue
        for index in trace.readers.get(value, []):
            if trace.ops[index].module != layer:
                place = trace.ops[index].module or "the model"
                found[layer] = f"its parameters are read directly by {place}, outside the layer"
    return found


def unwatched_readers(watched: Trace, bare: Trace, plans: list[LayerPlan]) -> dict[str, str]:
    """Layers whose weight other operations read when no hook is set (name → reason), such as a fused encoder layer."""
    names = {plan.name for plan in plans}
    found: dict[str, str] = {}
    value_of = {owners: value for value, owners in watched.parameters.items()}
    for value, owners in bare.parameters.items():
        layer = owners[0].rpartition(".")[0]
        if layer not in names:
            continue
        seen, now = _reading(watched, value_of[owners]), [bare.ops[index].name for index in bare.readers.get(value, [])]
        if new := sorted(set(now) - set(seen)):
            fused = new[0].removeprefix("aten.").partition(".")[0]
            found[layer] = f"its parameters are read directly by {fused} when nobody watches, outside the layer"
    return found


def _reading(trace: Trace, value: int) -> list[str]:
    return [trace.ops[index].name for index in trace.readers.get(value, [])]
