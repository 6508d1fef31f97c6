"""Layouts against oracles that know nothing of them: what an impulse in one input channel does to the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from evenbits.nn.layout import Layout, layout_of

KINDS: dict[str, tuple[type[nn.Module], int, dict[str, Any]]] = {
    "Linear": (nn.Linear, 0, {"in_features": 6, "out_features": 4}),
    "Conv1D of Hugging Face": (Conv1D, 0, {"nx": 6, "nf": 4}),
    "Conv1d": (nn.Conv1d, 1, {"in_channels": 6, "out_channels": 4}),
    "Conv2d": (nn.Conv2d, 2, {"in_channels": 6, "out_channels": 4}),
    "Conv3d": (nn.Conv3d, 3, {"in_channels": 6, "out_channels": 4}),
    "Conv1d, two groups": (nn.Conv1d, 1, {"in_channels": 6, "out_channels": 4, "groups": 2}),
    "Conv2d, two groups": (nn.Conv2d, 2, {"in_channels": 6, "out_channels": 4, "groups": 2}),
    "Conv2d, three groups, wider": (nn.Conv2d, 2, {"in_channels": 6, "out_channels": 12, "groups": 3}),
    "Conv3d, two groups": (nn.Conv3d, 3, {"in_channels": 4, "out_channels": 6, "groups": 2}),
    "Conv1d, depthwise": (nn.Conv1d, 1, {"in_channels": 5, "out_channels": 5, "groups": 5}),
    "Conv2d, depthwise": (nn.Conv2d, 2, {"in_channels": 5, "out_channels": 5, "groups": 5}),
    "Conv2d, depthwise, two a channel": (nn.Conv2d, 2, {"in_channels": 5, "out_channels": 10, "groups": 5}),
    "Conv2d, one channel": (nn.Conv2d, 2, {"in_channels": 1, "out_channels": 3}),
    "ConvTranspose1d": (nn.ConvTranspose1d, 1, {"in_channels": 6, "out_channels": 4}),
    "ConvTranspose2d": (nn.ConvTranspose2d, 2, {"in_channels": 6, "out_channels": 4}),
    "ConvTranspose3d": (nn.ConvTranspose3d, 3, {"in_channels": 6, "out_channels": 4}),
    "ConvTranspose1d, two groups": (nn.ConvTranspose1d, 1, {"in_channels": 6, "out_channels": 4, "groups": 2}),
    "ConvTranspose2d, two groups": (nn.ConvTranspose2d, 2, {"in_channels": 6, "out_channels": 4, "groups": 2}),
    "ConvTranspose2d, depthwise": (nn.ConvTranspose2d, 2, {"in_channels": 5, "out_channels": 5, "groups": 5}),
    "ConvTranspose2d, depthwise, two": (nn.ConvTranspose2d, 2, {"in_channels": 5, "out_channels": 10, "groups": 5}),
    "ConvTranspose3d, two groups": (nn.ConvTranspose3d, 3, {"in_channels": 4, "out_channels": 6, "groups": 2}),
}
KERNEL = (2, 3, 2)


def made(name: str) -> tuple[nn.Module, Layout, int]:
    """A layer in float64 with weights of many sizes, its layout, and how many dimensions its kernel has."""
    kind, spatial, options = KINDS[name]
    module = kind(**options, **({"kernel_size": KERNEL[:spatial]} if spatial else {})).double()
    weight = module.weight.data
    weight.copy_(torch.randn_like(weight) * torch.exp(torch.randn_like(weight)))
    module.bias.data.normal_()
    layout = layout_of(module)
    assert layout is not None
    return module, layout, spatial


def impulses(module: nn.Module, layout: Layout, spatial: int) -> torch.Tensor:
    """[I, O, positions]: the output for a one in one input channel in the middle of nothing, without the bias."""
    size = (5,) * spatial
    x = torch.zeros(layout.in_channels, layout.in_channels, *size, dtype=torch.float64)
    channels = torch.arange(layout.in_channels)
    x[(channels, channels, *(2,) * spatial)] = 1.0
    with torch.no_grad():
        y = module(x) - module(torch.zeros_like(x))
    return y.reshape(layout.in_channels, layout.out_channels, -1)


@pytest.mark.parametrize("name", KINDS)
def test_the_weight_statistic_of_an_input_channel_is_its_largest_impulse_response(name: str) -> None:
    module, layout, spatial = made(name)
    seen = impulses(module, layout, spatial)
    assert torch.allclose(layout.input_absmax(module.weight), seen.abs().amax((1, 2)), rtol=1e-12)
    columns = layout.columns(module.weight)
    for channel in range(layout.in_channels):
        taps = seen[channel].flatten()
        assert torch.allclose(columns[:, channel].sort().values, taps[taps != 0].sort().values, rtol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_the_matrix_are_output_channels(name: str) -> None:
    module, layout, spatial = made(name)
    seen = impulses(module, layout, spatial).transpose(0, 1).flatten(1)
    matrix = layout.matrix(module.weight)
    assert matrix.shape[0] == layout.out_channels and matrix.numel() == module.weight.numel()
    for row, taps in zip(matrix, seen, strict=True):
        assert torch.allclose(row.sort().values, taps[taps != 0].sort().values, rtol=1e-9)
    kernel = tuple(module.weight.shape[2:])
    assert torch.equal(layout.from_matrix(matrix, kernel), module.weight)


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_mounted_factors_cancel_on_the_way_in_and_appear_on_the_way_out(name: str, unbatched: bool) -> None:
    module, layout, spatial = made(name)
    ndim = spatial + 2 - unbatched
    x = torch.randn(3, layout.in_channels, *(5,) * spatial, dtype=torch.float64)[0 if unbatched else slice(None)]
    into, out = (torch.exp(torch.randn(n, dtype=torch.float64)) for n in (layout.in_channels, layout.out_channels))
    with torch.no_grad():
        before = module(x)
        assert x.shape[layout.channel_dim] == layout.in_channels
        assert before.shape[layout.channel_dim] == layout.out_channels
        weight = module.weight.data
        module.weight.data = weight * layout.mount_inputs(into, weight.ndim) * layout.mount_outputs(out, weight.ndim)
        module.bias.data *= out
        after = module(x / layout.on_activation(into, ndim))
    expected = before * layout.on_activation(out, ndim)
    assert float((after - expected).norm() / expected.norm()) < 1e-14


@pytest.mark.parametrize("name", KINDS)
def test_factors_along_the_matrix_columns_are_those_mounted_on_the_weight(name: str) -> None:
    module, layout, spatial = made(name)
    figure = torch.exp(torch.randn(layout.in_channels, dtype=torch.float64))
    taps = int(torch.tensor(KERNEL[:spatial]).prod()) if spatial else 1
    lines = layout.along_columns(figure, taps).repeat_interleave(layout.out_channels // layout.groups, 0)
    mounted = layout.matrix(module.weight * layout.mount_inputs(figure, module.weight.ndim))
    assert torch.allclose(mounted, layout.matrix(module.weight) * lines, rtol=1e-14)


@pytest.mark.parametrize("name", KINDS)
def test_a_planted_weight_is_found_in_its_own_channel_and_in_no_other(name: str) -> None:
    """Negative, once, in every channel in turn: a statistic that mixes channels or forgets the sign misses it."""
    module, layout, spatial = made(name)
    module.weight.data.uniform_(-0.1, 0.1)
    for channel in range(layout.in_channels):
        seen = impulses(module, layout, spatial)
        _, position = seen[channel].abs().flatten().max(0)
        value = seen[channel].flatten()[position]
        planted = module.weight.detach().clone()
        planted[torch.isclose(planted, value, rtol=1e-12, atol=0)] = -50.0
        found = layout.input_absmax(planted)
        assert found.argmax() == channel and float(found[channel]) == 50.0
        assert int((found > 1).sum()) == 1


@given(
    groups=st.integers(1, 4),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    transposed=st.booleans(),
)
def test_every_shape_goes_to_a_matrix_and_back(
    groups: int, inputs: int, outputs: int, kernel: list[int], transposed: bool
) -> None:
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) if transposed else ()
    kind = (kinds or (nn.Conv1d, nn.Conv2d, nn.Conv3d))[len(kernel) - 1]
    module = kind(groups * inputs, groups * outputs, tuple(kernel), groups=groups)
    layout = layout_of(module)
    assert layout is not None and layout.kind == kind.__name__
    weight = torch.arange(module.weight.numel(), dtype=torch.float32).view(module.weight.shape)
    matrix = layout.matrix(weight)
    assert matrix.shape == (groups * outputs, inputs * int(torch.tensor(kernel).prod()))
    assert torch.equal(layout.from_matrix(matrix, tuple(kernel)), weight)
    assert layout.columns(weight).shape == (outputs * int(torch.tensor(kernel).prod()), groups * inputs)
    assert torch.equal(layout.input_absmax(weight), layout.columns(weight).amax(0))
    halves = layout.input_absmax(weight.half() / 8), layout.input_absmax(weight.bfloat16())
    assert all(half.shape == (groups * inputs,) and half.isfinite().all() for half in halves)


def test_a_weight_that_is_not_contiguous_has_the_same_statistics() -> None:
    module = nn.Conv2d(6, 4, 3, groups=2).to(memory_format=torch.channels_last)
    plain = module.weight.detach().clone(memory_format=torch.contiguous_format)
    layout = layout_of(module)
    assert layout is not None and not module.weight.is_contiguous()
    for figures in (layout.input_absmax, layout.columns, layout.matrix):
        assert torch.equal(figures(module.weight), figures(plain))
