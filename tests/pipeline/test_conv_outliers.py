"""Smoothed convolutions, end to end: planted outlier channels cost 20 dB without smoothing, dead ones nothing with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import evenbits
from evenbits.algorithms.smoothquant import smoothquant
from evenbits.nn.layout import layout_of
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.format import Format
from evenbits.observers.channel_range import ChannelRange

LOUD = {17: 80.0, 40: 30.0}


def picture(*shape: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for channel, gain in LOUD.items():
        x[:, channel] *= gain
    return x


def quietly(conv: nn.Conv2d, factor: float) -> nn.Conv2d:
    """Loud channels have small weights, as in trained models; else they alone would be the output."""
    with torch.no_grad():
        conv.weight[:, list(LOUD)] /= factor
    return conv


def sqnr(reference: torch.Tensor, found: torch.Tensor) -> float:
    reference, found = reference.double(), found.double()
    return float(10 * torch.log10(reference.square().sum() / (reference - found).square().sum()))


def gain(model: nn.Module, x: torch.Tensor, scheme: str = "W8A8_STATIC") -> tuple[float, float]:
    """SQNR of the quantized output without and with smoothing."""
    found = []
    for method in ("rtn", "smoothquant"):
        quantized = copy.deepcopy(model).eval()
        evenbits.quantize(quantized, scheme=scheme, method=method, data=[x])
        with torch.no_grad():
            found.append(sqnr(model(x), quantized(x)))
    return found[0], found[1]


class Behind(nn.Module):
    """A convolution behind another whose rows are loud, with something between."""

    def __init__(self, second: nn.Module, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Conv2d(3, 64, 3, padding=1), second, between
        with torch.no_grad():
            for channel, loud in LOUD.items():
                self.first.weight[channel] *= loud

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))


def test_one_convolution_gains_twenty_decibels() -> None:
    plain, smoothed = gain(nn.Sequential(quietly(nn.Conv2d(64, 32, 3, padding=1), 8.0)), picture(2, 64, 24, 24))
    assert 8 < plain < 12 and smoothed >= 33


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels last"])
@pytest.mark.parametrize("kind", ["grouped", "transposed", "transposed, grouped", "one by one", "strided"])
def test_every_kind_of_convolution_gains(kind: str, memory: torch.memory_format) -> None:
    layer = {
        "grouped": lambda: nn.Conv2d(64, 32, 3, groups=4),
        "transposed": lambda: nn.ConvTranspose2d(64, 32, 3, stride=2),
        "transposed, grouped": lambda: nn.ConvTranspose2d(64, 32, 3, groups=2),
        "one by one": lambda: nn.Conv2d(64, 32, 1),
        "strided": lambda: nn.Conv2d(64, 32, 3, stride=2, padding=1, padding_mode="reflect"),
    }[kind]()
    plain, smoothed = gain(nn.Sequential(layer), picture(2, 64, 16, 16).contiguous(memory_format=memory))
    assert smoothed > plain + 8 and smoothed > 25


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_one_and_three_dimensions_gain(dims: int) -> None:
    layer = {1: nn.Conv1d, 3: nn.Conv3d}[dims](64, 32, 3)
    plain, smoothed = gain(nn.Sequential(layer), picture(2, 64, *(8,) * dims))
    assert smoothed > plain + 10 and smoothed > 28


@pytest.mark.parametrize(
    "between", [torch.relu, nn.functional.gelu], ids=["folded behind ReLU", "multiplied behind GELU"]
)
def test_a_fold_and_a_multiply_gain_the_same(between: Callable[[torch.Tensor], torch.Tensor]) -> None:
    plain, smoothed = gain(Behind(nn.Conv2d(64, 16, 3), between), torch.randn(4, 3, 16, 16))
    assert smoothed > plain + 10 and smoothed > 28


def test_depthwise_codes_do_not_change_with_s() -> None:
    """With one weight scale per output channel all of the difficulty may move into the weight for nothing."""
    model, x = nn.Sequential(nn.Conv2d(64, 64, 3, groups=64)), picture(2, 64, 16, 16)
    codes, found = [], []
    for options in (
        {"method": "rtn"},
        {"method": "smoothquant", "alpha": 0.5},
        {"method": "smoothquant", "alpha": 1.0},
    ):
        quantized = copy.deepcopy(model).eval()
        evenbits.quantize(quantized, scheme="W8A8_STATIC", data=[x], **options)
        codes.append(quantized[0].weight.clone())
        with torch.no_grad():
            found.append(sqnr(model(x), quantized(x)))
    assert all(int((code != codes[0]).sum()) <= code.numel() // 500 for code in codes)  # a tie may round the other way
    assert found[0] < found[1] < found[2] and found[2] > found[0] + 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_dead_channel_is_left_alone_in_every_type(dtype: torch.dtype) -> None:
    """Clamping s to 1e-5 there would multiply the gain before it by 1e5: infinite in float16."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, -1.0  # dead behind ReLU
        model[2].weight[:, 5] = 0.0  # read by nobody
        model[3].weight[1], model[3].bias[1] = 0.0, 0.0
    model, x = model.to(dtype).eval(), torch.randn(2, 3, 12, 12).to(dtype)
    before = copy.deepcopy(model)
    result = evenbits.quantize(model, scheme="W8A8_STATIC", method="smoothquant", data=[x])
    assert [row.status for row in result.regions] == ["multiplied", "folded", "folded"]
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values() if tensor.is_floating_point())
    with torch.no_grad():
        assert sqnr(before(x), model(x)) > 25
    assert torch.equal(model[0].bias[2], before[0].bias[2])  # s is 1 there
    assert model[3].weight[1] == 0 and model[3].bias[1] == 0


def test_s_of_a_convolution_is_the_papers_formula() -> None:
    torch.manual_seed(4)
    model, x = (
        nn.Sequential(nn.Conv2d(8, 6, 3, groups=2)),
        torch.randn(3, 8, 9, 9) * torch.logspace(-1, 1, 8).view(-1, 1, 1),
    )
    weight = model[0].weight.detach().double()
    evenbits.quantize(model, scheme="W8A8_STATIC", method="smoothquant", data=[x], alpha=0.7)
    largest = torch.stack([weight[3 * (c // 4) : 3 * (c // 4) + 3, c % 4].abs().max() for c in range(8)])
    expected = x.double().abs().amax((0, 2, 3)) ** 0.7 / largest**0.3
    assert torch.allclose(1 / model[0].input_multiplier.double(), expected, rtol=1e-5)


def test_the_shape_of_the_note_and_the_wrong_statistic() -> None:
    """[4, 256, 182, 182], two planted channels: the right s gains 20 dB, the s of view(-1, C) next to nothing. Both
    leave the float layer as it is, so that only a figure like this tells them apart. (Output errors of one picture.)"""
    x = picture(4, 256, 182, 182)
    conv = quietly(nn.Conv2d(256, 16, 3, bias=False), 2.5)
    weight, layout = conv.weight.detach(), layout_of(conv)
    assert layout is not None
    seen = ChannelRange()
    seen.update(x, layout.channel_dim)
    figures = {
        "none": None,
        "right": (seen.absmax, layout.columns(weight)),
        "wrong": (x.view(-1, 256).abs().amax(0), weight.reshape(-1, 256)),
    }
    found, one = {}, x[:1]
    with torch.no_grad():
        expected = conv(one)
        for name, statistics in figures.items():
            scale = torch.ones(256) if statistics is None else smoothquant(statistics[0], [statistics[1]]).scale_I
            assert scale is not None
            s = scale.view(1, -1, 1, 1)
            # In real numbers nothing changes, whatever s is.
            assert sqnr(expected, nn.functional.conv2d(one / s, weight * s)) > 100
            step = (seen.absmax / scale).amax() / 127
            rounded = fake_quantize(one / s, Format.parse("int8:tensor"), scale=step.reshape(1))
            matrix = fake_quantize(layout.matrix(weight * s), Format.parse("int8:row"))
            found[name] = sqnr(expected, nn.functional.conv2d(rounded, matrix.view_as(weight)))
    assert 8 < found["none"] < 12 and found["wrong"] < found["none"] + 3 and found["right"] >= 30


@pytest.mark.parametrize(
    ("kernel", "quieter", "searched"),
    [
        (1, 2.5, 34),
        pytest.param(3, 2.5, 32.5, marks=pytest.mark.slow),
    ],
)
def test_at_the_shape_of_the_note_a_searched_alpha_gains_23_decibels(
    kernel: int, quieter: float, searched: float
) -> None:
    """The product itself behind [4, 256, 182, 182]: α = 0.5 leaves about 2 dB to the searched one."""
    x = picture(4, 256, 182, 182)
    torch.manual_seed(0)
    model, found = nn.Sequential(quietly(nn.Conv2d(256, 16, kernel, bias=False), quieter)).eval(), {}
    for alpha in (None, 0.5, "auto:0.5:0.9:0.2"):
        quantized = copy.deepcopy(model)
        method, options = ("rtn", {}) if alpha is None else ("smoothquant", {"alpha": alpha})
        evenbits.quantize(quantized, scheme="W8A8_STATIC", method=method, data=[x], **options)
        with torch.no_grad():
            found[alpha] = sqnr(model(x[:1]), quantized(x[:1]))
    assert 9 < found[None] < 10.5 and found[0.5] > 30.5 and found["auto:0.5:0.9:0.2"] > searched
