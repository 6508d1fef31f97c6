"""What balancing decided, and how a layer's input and output look because of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from evenbits.graph.folding import Fold
from evenbits.nn.layout import Layout
from evenbits.pipeline.result import RegionRow


@dataclass(frozen=True)
class Balanced:
    """What was decided for the layers' inputs and outputs.

    scales: layer → s [I]; multiplied: layers that must divide their input by s themselves; folds: the others', with the
        s of their region; rows: layer → factor [O] of its rows and bias, because a reader's s was folded into them.
    perms: layer → order of its input channels [I]; indexed: layers that must put them in order themselves.
    outputs: layer → order of its output channels [O], because a reader's order was folded into it.
    layouts: of every planned layer.
    """

    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    multiplied: frozenset[str] = frozenset()
    folds: tuple[tuple[Fold, torch.Tensor], ...] = ()
    row_factors: dict[str, torch.Tensor] = field(default_factory=dict)
    perms: dict[str, torch.Tensor] = field(default_factory=dict)
    indexed: frozenset[str] = frozenset()
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    rows: tuple[RegionRow, ...] = ()
    notes: tuple[str, ...] = ()

    def delivered(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The float model's input of a layer as the balanced model delivers it, before what the layer does itself."""
        if name in self.scales and name not in self.multiplied:
            x = self._divided(name, x)
        if name in self.perms and name not in self.indexed:
            x = x[..., self.perms[name].to(x.device)]
        return x

    def seen(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The float model's input of a layer as the layer's quantizer and weight meet it."""
        if name in self.scales:
            x = self._divided(name, x)
        return x[..., self.perms[name].to(x.device)] if name in self.perms else x

    def returned(self, name: str, y: torch.Tensor) -> torch.Tensor:
        """The float model's output of a layer as the balanced layer has to return it."""
        if name in self.row_factors:
            factor_O = self.row_factors[name].to(y.device, y.dtype)
            y = y * self.layouts[name].on_activation(factor_O, y.ndim)
        return y[..., self.outputs[name].to(y.device)] if name in self.outputs else y

    def _divided(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x / self.layouts[name].on_activation(self.scales[name].to(x.device, x.dtype), x.ndim)
