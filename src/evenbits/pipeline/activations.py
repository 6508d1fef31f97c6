"""How each layer's input is quantized: dynamically, by its calibrated range, or by a calibrated search."""

from __future__ import annotations

import torch
from torch import nn

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.errors import EvenbitsError
from evenbits.numerics.affine import qparams
from evenbits.numerics.elements import PairType, TypeChoice
from evenbits.numerics.format import Format
from evenbits.observers.calibrate import watching
from evenbits.observers.channel_range import ChannelRange
from evenbits.observers.scale_search import ScaleSearch
from evenbits.pipeline.balanced import Balanced
from evenbits.pipeline.batches import KEPT
from evenbits.pipeline.plan import LayerPlan
from evenbits.pipeline.watch import Watched
from evenbits.schemes.scheme import LayerFormats, Scheme


def activation_quantizers(
    model: nn.Module, plans: list[LayerPlan], scheme: Scheme, balanced: Balanced, watched: Watched | None
) -> dict[str, ActivationQuantizer | None]:
    """The input quantizer of every planned layer; None where inputs stay float."""
    found: dict[str, ActivationQuantizer | None] = {}
    searched: dict[str, Format] = {}
    for plan in plans:
        formats = scheme.of(plan.name)
        fmt = formats.input_activations
        if fmt is None or formats.dynamic or watched is None:
            found[plan.name] = None if fmt is None else ActivationQuantizer(fmt)
        elif not is_searched(formats):
            found[plan.name] = _spanning(fmt, watched.ranges[plan.name], balanced.scales.get(plan.name))
        else:
            searched[plan.name] = fmt
    if searched and watched is not None:
        found |= _searched(model, [plan for plan in plans if plan.name in searched], searched, balanced, watched)
    return found


def is_searched(formats: LayerFormats) -> bool:
    """Whether a layer's static activation scale is searched on data of its own, not taken from the range."""
    fmt = formats.input_activations
    if fmt is None or formats.dynamic:
        return False
    return fmt.rule.range != "minmax" or isinstance(fmt.dtype, (PairType, TypeChoice))


def _spanning(fmt: Format, ranges: ChannelRange, scale_I: torch.Tensor | None) -> ActivationQuantizer:
    # No second pass is needed after smoothing: the range of x/s is the range of x, channel by channel, over s.
    divisor = torch.ones(()) if scale_I is None else scale_I.to(ranges.hi.device)
    lo, hi = (ranges.lo / divisor).amin(), (ranges.hi / divisor).amax()
    scale, zero_point = qparams(lo.reshape(1), hi.reshape(1), fmt)
    return ActivationQuantizer(fmt, scale, zero_point)


def _searched(
    model: nn.Module, plans: list[LayerPlan], formats: dict[str, Format], balanced: Balanced, watched: Watched
) -> dict[str, ActivationQuantizer | None]:
    """Two more passes over the kept batches: deviations first, then every candidate's error."""
    kinds = {plan.name: plan for plan in plans}
    searches = {name: ScaleSearch(formats[name]) for name in kinds}

    def balanced_input(name: str, x: torch.Tensor) -> torch.Tensor:
        x = balanced.seen(name, x)
        spatial = kinds[name].channels.spatial
        return x.flatten(-1 - spatial) if spatial else x  # each image one row, as the layer has it

    def measure(name: str, x: torch.Tensor, _: torch.Tensor) -> None:
        try:
            searches[name].measure(balanced_input(name, x))
        except EvenbitsError as error:
            raise EvenbitsError(f"layer {name}: {error}") from error

    def update(name: str, x: torch.Tensor, _: torch.Tensor) -> None:
        searches[name].update(balanced_input(name, x))

    for see in (measure, update):
        with watching(model, kinds, see):
            for run in watched.source.runs():
                run()
    return {name: _best(name, search) for name, search in searches.items()}


def _best(name: str, search: ScaleSearch) -> ActivationQuantizer:
    try:
        return ActivationQuantizer(*search.best())
    except EvenbitsError as error:
        raise EvenbitsError(
            f"layer {name} did not run on the first {KEPT} calibration batches, on which scales are searched; put a "
            "batch that reaches it first, or keep it in float (ignore)."
        ) from error
