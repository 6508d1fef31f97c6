"""`UnfusedExperts`: a module that keeps all experts' weights in two 3-D parameters, as one pair of layers per expert.

    first [E, F, H], second [E, H, I]  (or turned: [E, H, F], [E, I, H]);  F = 2·I with a gate, else I
    expert e on its rows x: second_e(act(gate) · up) with gate, up = first_e(x), or second_e(act(first_e(x)))
    output: Σ over the k experts of each token, times its weight

No table of architectures: the shapes say which parameter is which, the module's own `_apply_gate` or `act_fn` is what
stands between the layers, and whoever puts the unfused form in place proves first that it gives the same output
(pipeline/unfuse.py). Every expert is called on every forward, with no rows if nothing was routed to it, so that
whoever watches the model sees all of them.

Left out: experts that get their tokens sorted beforehand and return them so (Llama 4, JetMoE).

E: experts, T: tokens, k: experts per token, H: hidden, I: intermediate.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from evenbits.errors import EvenbitsError
from evenbits.nn.views import linear_view

_PLAIN = frozenset(vars(nn.Module()))  # what every module has


class UnfusedExperts(nn.Module):
    """Takes the place of a fused experts module: (hidden states [T, H], experts [T, k], weights [T, k]) → [T, H].

    Layers are named as the parameters were: `0.gate_up_proj`, `0.down_proj`, …; their weights are views of the fused
    ones. turned: matrices are stored as [in, out]. Raises EvenbitsError for a module that is not built so.
    """

    act_fn: Any
    post_expert_norm: Any

    def __init__(self, fused: nn.Module, *, turned: bool = False) -> None:
        super().__init__()
        if reason := why_not(fused, turned=turned):
            raise EvenbitsError(f"{type(fused).__name__} is no fused experts module that can be taken apart: {reason}.")
        for name, value in vars(fused).items():
            if name not in _PLAIN:
                setattr(self, name, value)
        for name, child in fused.named_children():
            self.add_module(name, child)
        self.source, self.turned = type(fused), turned
        self.projections = tuple(name for name, p in fused.named_parameters(recurse=False) if p.ndim == 3)
        self.argument_names = _arguments(fused)
        self.expert_count = len(fused.get_parameter(self.projections[0]))
        for number in range(self.expert_count):
            layers = {name: _layer(fused, name, number, turned=turned) for name in self.projections}
            self.add_module(str(number), nn.ModuleDict(layers))
            for module in self._modules[str(number)].modules():  # type: ignore[union-attr]
                module.training = fused.training
        gated, up = self._layer(0, 0).out_features, self._layer(0, 1).in_features
        self.gated = gated == 2 * up
        self.training = fused.training

    def _layer(self, expert: int, position: int) -> nn.Linear:
        layer: nn.Linear = self._modules[str(expert)][self.projections[position]]  # type: ignore[index]
        return layer

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """The original's forward, under its names. Raises EvenbitsError for other arguments."""
        x_TH, index_Tk, weight_Tk = self._given(args, kwargs)
        total = torch.zeros_like(x_TH, dtype=torch.promote_types(x_TH.dtype, weight_Tk.dtype))
        for expert in range(self.expert_count):
            token, slot = torch.where(index_Tk == expert)
            y = self._layer(expert, 1)(self._between(self._layer(expert, 0)(x_TH[token])))
            if getattr(self, "has_post_expert_norm", False):
                y = self.post_expert_norm(y)
            total.index_add_(0, token, (y * weight_Tk[token, slot, None]).to(total.dtype))
        return total.to(x_TH.dtype)

    def _between(self, y: torch.Tensor) -> torch.Tensor:
        """What stands between the two layers: the module's own gate, or the usual one."""
        if not self.gated:
            activated: torch.Tensor = self.act_fn(y)
            return activated
        if hasattr(self.source, "_apply_gate"):
            joined: torch.Tensor = self.source._apply_gate(self, y)
            return joined
        gate, up = y.chunk(2, dim=-1)
        product: torch.Tensor = self.act_fn(gate) * up
        return product

    def _given(self, args: Any, kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        given = {**dict(zip(self.argument_names, args, strict=False)), **kwargs}
        if len(args) > 3 or set(given) != set(self.argument_names):
            raise EvenbitsError(f"the experts take {', '.join(self.argument_names)}; given {', '.join(given)}.")
        x_TH, *routing = (given[name] for name in self.argument_names)
        routing.sort(key=lambda tensor: tensor.is_floating_point())  # some have the weights first
        return x_TH, routing[0], routing[1]

    def extra_repr(self) -> str:
        return f"{self.expert_count} experts of {self.source.__name__}"


def _layer(fused: nn.Module, name: str, number: int, *, turned: bool) -> nn.Linear:
    bias = dict(fused.named_parameters(recurse=False)).get(f"{name}_bias")
    return linear_view(fused.get_parameter(name), bias, number, number, turned=turned)


def _arguments(fused: nn.Module) -> tuple[str, ...]:
    """Names of the three arguments of its forward; () if it takes others."""
    parameters = inspect.signature(fused.forward).parameters.values()
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return tuple(named) if len(named) == len(parameters) == 3 else ()


def looks_fused(module: nn.Module) -> bool:
    """Whether the module keeps matrices of several experts in two or more 3-D parameters of equal first dimension."""
    shapes = [p.shape for p in module.parameters(recurse=False) if p.ndim == 3 and p.is_floating_point()]
    return len(shapes) >= 2 and len({shape[0] for shape in shapes}) == 1 and shapes[0][0] > 1


def why_not(fused: nn.Module, *, turned: bool) -> str:
    """Why a module cannot be taken apart with its matrices stored as [out, in] (turned: [in, out]); "" if it can."""
    own = dict(fused.named_parameters(recurse=False))
    cubes = {name: tuple(p.shape) for name, p in own.items() if p.ndim == 3}
    if len(cubes) != 2:
        return f"it has {len(cubes)} parameters of three dimensions, not two"
    (first, a), (second, b) = cubes.items()
    sizes = {first: a[:0:-1] if turned else a[1:], second: b[:0:-1] if turned else b[1:]}
    (wide, hidden), (out, inner) = sizes[first], sizes[second]
    if a[0] != b[0] or out != hidden or wide not in (inner, 2 * inner):
        return f"{first} {list(a)} and {second} {list(b)} are not the two layers of {a[0]} experts"
    biases = {f"{name}_bias": (a[0], size[0]) for name, size in sizes.items()}
    buffers = [name for name, _ in fused.named_buffers(recurse=False)]
    strange = [name for name, p in own.items() if name not in cubes and biases.get(name) != tuple(p.shape)] + buffers
    strange += [
        name for name, child in fused.named_children() if any(child.parameters()) and name != "post_expert_norm"
    ]
    if strange:
        return f"it carries {strange[0]!r} besides weights and biases"
    if not callable(getattr(fused, "act_fn", None)) and not (wide == 2 * inner and hasattr(fused, "_apply_gate")):
        return "it has neither act_fn nor _apply_gate"
    return "" if _arguments(fused) else "its forward does not take hidden states, indices of experts and weights"
