"""Runs calibration batches through a model while observers watch the inputs of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from evenbits.errors import EvenbitsError
from evenbits.observers.channel_range import ChannelRange
from evenbits.observers.second_moment import SecondMoment

Hook = Callable[[str, torch.Tensor, torch.Tensor], None]


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The tensor a layer was called with, positional or by keyword. Raises EvenbitsError if there is none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    raise EvenbitsError("a layer was called without a tensor")


@contextmanager
def watching(model: nn.Module, layers: Iterable[str], see: Hook) -> Iterator[None]:
    """Calls see(name, input, output) after each forward of the named layers, inside the block."""

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            see(name, first_tensor(args, kwargs), output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def channel_ranges(
    model: nn.Module,
    channel_dims: Mapping[str, int],
    run_all: Callable[[], None],
    moments: Mapping[str, SecondMoment] | None = None,
) -> dict[str, ChannelRange]:
    """Per-channel input ranges of the layers in `channel_dims` (name → channel dimension counted from the end).

    `run_all` runs every calibration batch; `moments`, if given, are updated in the same pass. Raises EvenbitsError
    naming the layer for NaN, Inf or changing widths.
    """
    ranges = {name: ChannelRange() for name in channel_dims}

    def see(name: str, x: torch.Tensor, _: torch.Tensor) -> None:
        try:
            ranges[name].update(x, channel_dims[name])
            if moments is not None:
                moments[name].update(x, channel_dims[name])
        except EvenbitsError as error:
            raise EvenbitsError(f"layer {name}: {error}.") from error

    with watching(model, channel_dims, see):
        run_all()
    return ranges
