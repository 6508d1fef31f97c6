"""The three kinds of method, as signatures.

weight method     f(weight_OI, format, stats, **options) -> QTensor
balance method    f(act_absmax_I, weights_RI, **options) -> Rebalance, or a search for one     per region
activation rule   f(act_stats, format) -> ActivationQuantizer

A search is a generator: it yields lists of candidates and is sent, for each, the losses of the region's layers under
the deployed quantizer. So a method can search without knowing the model, and one pass over the data serves every
region's candidates.

A decorator marks the kind and names the statistics that calibration must collect (`needs`). O: out, I: in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from evenbits.numerics.format import Format

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rebalance:
    """What a balance method decides for a region.

    scale_I: float32 [I], positive and finite: activations are divided by it, weight columns multiplied; or None.
    choice:  what to show in the result's line (such as {"alpha": 0.5}).
    perm_I:  int64 [I], a permutation: channel perm_I[i] of the input becomes channel i; or None.
    curve:   what was tried and its loss, to be drawn: pairs (α, loss), sorted.
    """

    scale_I: torch.Tensor | None
    choice: dict[str, float]
    perm_I: torch.Tensor | None = None
    curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class ActivationQuantizer:
    """How a layer's input is quantized. scale, zero_point: [1] if calibrated, None if taken from each input."""

    format: Format
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerStats:
    """What calibration saw of a layer's input, as its weight's columns see it: balanced, one figure per column.

    second_moment_I: mean x², float32 [I] (convolutions: [I·kh·kw]), or None if it was not collected.
    """

    second_moment_I: torch.Tensor | None = None


def weight_method(*, needs: frozenset[str] = frozenset(), uses: frozenset[str] = frozenset()) -> Callable[[_F], _F]:
    """Marks a weight method. needs: statistics it cannot do without; uses: those it takes if there is data."""
    return _mark("weight", needs, uses)


def balance_method(*, needs: frozenset[str] = frozenset({"absmax"}), permutes: bool = False) -> Callable[[_F], _F]:
    """Marks a balance method. permutes: it gives orders of channels, not scales."""
    return _mark("balance", needs, frozenset(), permutes)


def _mark(kind: str, needs: frozenset[str], uses: frozenset[str], permutes: bool = False) -> Callable[[_F], _F]:
    def mark(function: _F) -> _F:
        function.kind, function.needs, function.uses = kind, needs, uses  # type: ignore[attr-defined]
        function.permutes = permutes  # type: ignore[attr-defined]
        return function

    return mark
