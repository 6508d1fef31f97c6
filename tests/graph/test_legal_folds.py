"""Every path through which factors may be folded, in float64: found, proved, and exact for random s.

conv(a) stands for any convolution; the layer that reads the model's input is multiplied in every net.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_nets import (
    D,
    HandLayerNorm,
    Handmade,
    HandRMSNorm,
    affine,
    check_smoothing,
    conv,
    lin,
    regions,
)
from torch import nn
from torch.nn import functional as F

OUTSIDE = "× its tensor comes from outside the model"
NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(D),
    "LayerNorm without bias": lambda: nn.LayerNorm(D, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(D),
    "1 + w": lambda: HandRMSNorm(1.0),
    "LayerNorm by hand": HandLayerNorm,
}


@pytest.mark.parametrize("norm", NORMS)
def test_norm_to_linear_and_the_float_layer_beside_it(norm: str) -> None:
    body = lambda m, x: (lambda y: m.a(y) * torch.sigmoid(m.b(y)))(m.norm(x))  # noqa: E731
    model = Handmade(body, norm=affine(NORMS[norm]()), a=lin(), b=lin())
    check_smoothing(model, [torch.randn(2, 3, D)], {"a": "norm"}, layers=["a"])


@pytest.mark.parametrize("groups", [1, 2, D])
def test_group_norm_to_convolution(groups: int) -> None:
    body = lambda m, x: m.b(m.norm(m.a(x)).relu())  # noqa: E731
    model = Handmade(body, norm=affine(nn.GroupNorm(groups, D)), a=conv(width=3), b=conv(groups=2))
    check_smoothing(model, [torch.randn(2, 3, 5, 5)], {"a": OUTSIDE, "b": "norm"})


def test_instance_norm_with_a_gain_to_convolution() -> None:
    norm = affine(nn.InstanceNorm2d(D, affine=True))
    model = Handmade(lambda m, x: m.b(m.norm(m.a(x))), norm=norm, a=conv(width=3), b=conv())
    check_smoothing(model, [torch.randn(2, 3, 5, 5)], {"a": OUTSIDE, "b": "norm"})


PAIRS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "linear to linear": (lin(), lin(4), (2, 3, D)),
    "linear without bias": (lin(bias=False), lin(4), (2, D)),
    "Conv1d": (nn.Conv1d(3, D, 3), nn.Conv1d(D, 4, 3), (2, 3, 9)),
    "Conv2d": (nn.Conv2d(3, D, 3), nn.Conv2d(D, 4, 3), (2, 3, 9, 9)),
    "Conv3d": (nn.Conv3d(3, D, 2), nn.Conv3d(D, 4, 2), (2, 3, 5, 5, 5)),
    "unbatched": (nn.Conv2d(3, D, 3), nn.Conv2d(D, 4, 3), (3, 9, 9)),
    "grouped to grouped": (nn.Conv2d(4, D, 3, groups=2), nn.Conv2d(D, 12, 3, groups=4), (2, 4, 9, 9)),
    "depthwise": (nn.Conv2d(3, D, 1), nn.Conv2d(D, D, 3, groups=D), (2, 3, 9, 9)),
    "depthwise, two a channel": (nn.Conv2d(3, 3 * 4, 3, groups=3), nn.Conv2d(12, 24, 3, groups=12), (2, 3, 9, 9)),
    "transposed": (nn.ConvTranspose2d(3, D, 3), nn.ConvTranspose2d(D, 4, 3, stride=2), (2, 3, 5, 5)),
    "transposed, grouped": (
        nn.ConvTranspose2d(4, D, 3, groups=2),
        nn.ConvTranspose2d(D, 12, 3, groups=4),
        (2, 4, 5, 5),
    ),
    "transposed, 1-D": (nn.ConvTranspose1d(4, D, 3, groups=2), nn.ConvTranspose1d(D, 4, 3), (2, 4, 5)),
    "transposed, 3-D": (nn.ConvTranspose3d(2, D, 2), nn.ConvTranspose3d(D, 4, 2, groups=2), (2, 2, 3, 3, 3)),
    "padded in a circle": (
        nn.Conv2d(3, D, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(D, 4, 3, padding=1, padding_mode="reflect"),
        (2, 3, 9, 9),
    ),
}


@pytest.mark.parametrize("between", ["nothing", "ReLU", "ReLU in place"])
@pytest.mark.parametrize("kind", PAIRS)
def test_layer_to_layer(kind: str, between: str) -> None:
    first, second, shape = copy.deepcopy(PAIRS[kind])
    act = {"nothing": nn.Identity(), "ReLU": nn.ReLU(), "ReLU in place": nn.ReLU(inplace=True)}[between]
    model = Handmade(lambda m, x: m.b(m.act(m.a(x))), a=first, b=second, act=act)
    check_smoothing(model, [torch.randn(shape)], {"a": OUTSIDE, "b": "the rows of a"})


@pytest.mark.parametrize("inplace", [False, True])
def test_convolution_batch_norm_relu_convolution(inplace: bool) -> None:
    body = lambda m, x: m.b(m.act(m.bn(m.a(x))))  # noqa: E731
    model = Handmade(body, a=conv(width=3), bn=affine(nn.BatchNorm2d(D)), act=nn.ReLU(inplace), b=conv())
    check_smoothing(model, [torch.randn(2, 3, 5, 5)], {"a": OUTSIDE, "b": "bn"})
    assert float(model.bn.running_var.mean()) > 0.5


@pytest.mark.parametrize("dims", [1, 3])
def test_batch_norm_of_other_dimensions(dims: int) -> None:
    layer, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 3: (nn.Conv3d, nn.BatchNorm3d)}[dims]
    model = Handmade(lambda m, x: m.b(m.bn(m.a(x))), a=layer(3, D, 2), bn=affine(norm(D)), b=layer(D, 3, 2))
    check_smoothing(model, [torch.randn(2, 3, *(4,) * dims)], {"a": OUTSIDE, "b": "bn"})


BETWEEN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ReLU in place": lambda y: F.relu_(y),
    "LeakyReLU": lambda y: F.leaky_relu(y, 0.1),
    "LeakyReLU in place": lambda y: F.leaky_relu_(y, 0.1),
    "abs": torch.abs,
    "negated and halved": lambda y: -y / 2.0,
    "times a map": lambda y: y * torch.arange(36.0).view(6, 6),
    "dropout": lambda y: F.dropout(y, 0.5, training=False),
    "max pooling": lambda y: F.max_pool2d(y, 3, 2, 1),
    "average pooling": lambda y: F.avg_pool2d(y, 2),
    "adaptive average pooling": lambda y: F.adaptive_avg_pool2d(y, 3),
    "adaptive average pooling to one": lambda y: F.adaptive_avg_pool2d(y, 1),
    "adaptive max pooling": lambda y: F.adaptive_max_pool2d(y, 3),
    "mean": lambda y: y.mean((2, 3), keepdim=True),
    "sum over rows": lambda y: y.sum(2).unsqueeze(2),
    "nearest": lambda y: F.interpolate(y, scale_factor=2),
    "bilinear": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"),
    "bicubic": lambda y: F.interpolate(y, size=(7, 5), mode="bicubic", align_corners=True),
    "zero padding": lambda y: F.pad(y, (1, 2, 0, 1)),
    "reflected padding": lambda y: F.pad(y, (1, 2, 0, 1), mode="reflect"),
    "replicated padding": lambda y: F.pad(y, (1, 2, 0, 1), mode="replicate"),
    "channels last": lambda y: y.contiguous(memory_format=torch.channels_last),
    "flipped": lambda y: y.flip(3).roll(1, 2),
    "transposed picture": lambda y: y.transpose(2, 3),
    "some pixels": lambda y: y[:, :, 1:5, ::2],
    "picked pixels": lambda y: y.index_select(3, torch.tensor([0, 0, 4])),
    "channels moved": lambda y: y.roll(3, 1)[:, torch.tensor([7, 1, 2, 3, 4, 5, 6, 0])],
    "channels shuffled": lambda y: F.channel_shuffle(y, 2),
    "split and joined": lambda y: torch.cat(y.split(2, 1)[::-1], 1),
    "stacked": lambda y: torch.stack([y[:, 0::2], y[:, 1::2]], 1).flatten(1, 2),
    "tokens and back": lambda y: y.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, (6, 6)),
    "checkpointed": lambda y: torch.utils.checkpoint.checkpoint(F.relu, y, use_reentrant=False),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_convolution_to_convolution_through(between: str) -> None:
    model = Handmade(lambda m, x: m.b(BETWEEN[between](m.a(x))), a=conv(width=3), b=conv(4))
    check_smoothing(model, [torch.randn(2, 3, 6, 6)], {"a": OUTSIDE, "b": "the rows of a"})


@pytest.mark.parametrize("size", [1, D])
def test_prelu_passes(size: int) -> None:
    model = Handmade(lambda m, x: m.b(m.act(m.a(x))), a=conv(width=3), b=conv(4), act=nn.PReLU(size))
    check_smoothing(model, [torch.randn(2, 3, 6, 6)], {"a": OUTSIDE, "b": "the rows of a"})


@pytest.mark.parametrize("dims", [1, 3])
def test_pooling_and_upsampling_of_other_dimensions(dims: int) -> None:
    layer, pool, mode = {1: (nn.Conv1d, F.max_pool1d, "linear"), 3: (nn.Conv3d, F.avg_pool3d, "trilinear")}[dims]
    body = lambda m, x: m.b(F.interpolate(pool(m.a(x), 2), scale_factor=2, mode=mode))  # noqa: E731
    model = Handmade(body, a=layer(3, D, 2), b=layer(D, 3, 2))
    check_smoothing(model, [torch.randn(2, 3, *(6,) * dims)], {"a": OUTSIDE, "b": "the rows of a"})


def test_pixel_shuffle_makes_the_factors_of_four_rows_one() -> None:
    model = Handmade(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2).relu()), a=conv(4 * D, 3), b=conv(4))
    check_smoothing(model, [torch.randn(2, 3, 5, 5)], {"a": OUTSIDE, "b": "the rows of a"})
    region = regions(model.float(), torch.randn(2, 3, 5, 5))[1]
    assert region.width == D and region.parts[0].index_C.tolist() == [c // 4 for c in range(4 * D)]


def test_pixel_unshuffle_gives_four_channels_the_factor_of_one() -> None:
    model = Handmade(lambda m, x: m.b(F.pixel_unshuffle(m.a(x), 2).relu()), a=conv(D, 3), b=conv(4, 4 * D))
    check_smoothing(model, [torch.randn(2, 3, 6, 6)], {"a": OUTSIDE, "b": "the rows of a"})


def test_a_flattened_map_gives_each_channel_s_to_all_of_its_pixels() -> None:
    body = lambda m, x: m.head(m.a(x).relu().flatten(1))  # noqa: E731
    model = Handmade(body, a=nn.Conv2d(3, D, 3), head=lin(5, D * 9))
    check_smoothing(model, [torch.randn(2, 3, 5, 5)], {"a": OUTSIDE, "head": "the rows of a"})
    region = regions(model, torch.randn(2, 3, 5, 5).double())[1]
    assert region.width == D and region.index["head"].tolist() == [c for c in range(D) for _ in range(9)]


GATES: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], str]] = {
    "SwiGLU": (lambda m, h: F.silu(m.gate(h)) * m.up(h), "the rows of up"),
    "SwiGLU, the other way round": (lambda m, h: m.up(h) * F.silu(m.gate(h)), "the rows of up"),
    "GEGLU": (lambda m, h: F.gelu(m.gate(h), approximate="tanh") * m.up(h), "the rows of up"),
    "ReGLU": (lambda m, h: F.relu(m.gate(h)) * m.up(h), "the rows of gate"),
    "in place": (lambda m, h: m.up(h).mul_(torch.sigmoid(m.gate(h))), "the rows of up"),
    "fused": (lambda m, h: (lambda a, b: F.silu(a) * b)(*m.both(h).chunk(2, -1)), "the rows of both"),
    "GLU": (lambda m, h: (lambda a, b: a * b.sigmoid())(*m.both(h).split(12, -1)), "the rows of both"),
    "a gate of one number": (lambda m, h: m.up(h) * torch.sigmoid(m.gate(h).mean(-1, True)), "the rows of up"),
}


@pytest.mark.parametrize("gate", GATES)
def test_a_gated_product_is_folded_into_the_factor_that_is_linear(gate: str) -> None:
    act, into = GATES[gate]
    layers = {"both": lin(24)} if "both" in into else {"up": lin(12), "gate": lin(12)}
    model = Handmade(lambda m, x: m.down(act(m, m.norm(x))), norm=affine(nn.RMSNorm(D)), **layers, down=lin(D, 12))
    names = [name for name, _ in model.named_children() if name in layers]
    readers = "{up,gate}" if len(names) == 2 and gate not in ("SwiGLU", "GEGLU", "ReGLU") else "{gate,up}"
    check_smoothing(model, [torch.randn(2, 3, D)], {names[0] if len(names) == 1 else readers: "norm", "down": into})


def test_layer_scale_and_a_bias_of_its_own_are_the_sources() -> None:
    body = lambda m, x: m.b((m.a(x) * m.gamma + m.beta).relu())  # noqa: E731
    gamma, beta = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.randn(D))
    model = Handmade(body, a=lin(), b=lin(), gamma=gamma, beta=beta)
    (_, region) = regions(model, torch.randn(3, D))
    assert {part.source.name for part in region.parts} == {"gamma", "beta"}
    body = lambda m, x: m.b((m.gamma.view(-1, 1, 1) * m.a(x)).relu())  # noqa: E731
    model = Handmade(body, a=conv(width=3), b=conv(), gamma=gamma)
    (_, region) = regions(model, torch.randn(1, 3, 4, 4))
    assert [part.source.name for part in region.parts] == ["gamma"]
    before = model.double()(x := torch.randn(1, 3, 4, 4).double())
    check_smoothing(model, [x], {"a": OUTSIDE, "b": ""})
    assert torch.allclose(model(x), before)
