"""Every kind of quantized convolution against torch's float one on rounded values in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import evenbits
from evenbits.algorithms.base import ActivationQuantizer
from evenbits.errors import EvenbitsError
from evenbits.nn.conv import CONVOLUTIONS, QConv, QConv2d
from evenbits.nn.layout import layout_of
from evenbits.numerics.affine import qparams
from evenbits.numerics.encode import encode
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.format import Format

KINDS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(4, 6, 3, padding=2, stride=2), (2, 4, 9)),
    "1d grouped, dilated": (nn.Conv1d(4, 6, 3, groups=2, dilation=2, padding=1), (2, 4, 9)),
    "1d depthwise, reflected": (nn.Conv1d(4, 8, 3, groups=4, padding=1, padding_mode="reflect"), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, (3, 2), padding=(2, 1), stride=(1, 2), bias=False), (2, 4, 7, 6)),
    "2d grouped": (nn.Conv2d(4, 6, 3, groups=2, dilation=(1, 2)), (2, 4, 7, 6)),
    "2d same, circular": (nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 7, 6)),
    "3d": (nn.Conv3d(4, 6, (2, 3, 1), padding=(1, 0, 1), stride=(1, 2, 1)), (2, 4, 4, 5, 3)),
    "3d grouped": (nn.Conv3d(4, 6, 2, groups=2, dilation=(2, 1, 1)), (2, 4, 4, 5, 3)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5)),
    "transposed 1d grouped": (nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2, bias=False), (2, 4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), output_padding=(1, 2)), (2, 4, 5, 4)),
    "transposed 2d grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, padding=(1, 2)), (2, 4, 5, 4)),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 2, stride=(1, 2, 1), padding=(0, 1, 0)), (2, 4, 3, 4, 3)),
    "transposed 3d depthwise": (nn.ConvTranspose3d(4, 4, 2, groups=4, dilation=(1, 1, 2)), (2, 4, 3, 4, 3)),
}
PLAIN = [name for name in KINDS if not name.startswith("transposed")]
AFFINE = "int8:tensor:affine"


def quantized(conv: nn.Module, activation: ActivationQuantizer | None, weight: str = "int8:row") -> QConv:
    layout = layout_of(conv)
    assert layout is not None
    codes = encode(layout.matrix(conv.weight.detach()).contiguous(), weight)
    shape = (layout.out_channels, layout.in_channels // layout.groups, *conv.weight.shape[2:])
    return CONVOLUTIONS[layout.kind](codes, shape, conv.bias, activation, geometry=QConv.geometry_of(conv))


def quantizer(how: str, x: torch.Tensor) -> ActivationQuantizer:
    fmt = Format.parse("int8:row" if how == "dynamic" else "int8:tensor" if how == "static" else AFFINE)
    if how == "dynamic":
        return ActivationQuantizer(fmt)
    return ActivationQuantizer(fmt, *qparams(x.min().reshape(1) * 0.9, x.max().reshape(1) * 0.9, fmt))  # saturates


def reference(conv: nn.Module, layer: QConv, activation: ActivationQuantizer, x: torch.Tensor) -> tuple[Any, Any]:
    """The float convolution of rounded values in float64, and of their sizes (what roundings are relative to)."""
    layout = layout_of(conv)
    assert layout is not None
    flat = x.float().flatten(1)
    rounded = fake_quantize(flat, activation.format, scale=activation.scale, zero_point=activation.zero_point)
    exact = copy.deepcopy(conv).double()
    weight = layer.qweight().dequantize(torch.float64)
    exact.weight.data = layout.from_matrix(weight, tuple(conv.weight.shape[2:])).contiguous()
    with torch.no_grad():
        y = exact(rounded.double().view(x.shape))
        exact.weight.abs_()
        if conv.bias is not None:
            exact.bias.abs_()
        return y, exact(rounded.double().abs().view(x.shape))


@pytest.mark.parametrize("how", ["dynamic", "static", "affine"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_float_convolution_of_rounded_values(kind: str, how: str) -> None:
    conv, shape = KINDS[kind]
    x = torch.randn(shape) * torch.tensor([1.0, 6.0]).view(2, *(1,) * (len(shape) - 1)) + 0.7
    activation = quantizer(how, x)
    if how == "affine" and kind not in PLAIN:
        with pytest.raises(EvenbitsError, match="transposed ones only the former"):
            quantized(conv, activation)
        return
    layer = quantized(conv, activation)
    if how == "affine":
        assert int(layer.input_zero_point) not in (0, -128)
    y, (expected, size) = layer(x), reference(conv, layer, activation, x)
    assert y.shape == expected.shape == conv(x).shape
    # Rounded values and scales are float32 in both; the integers are exact.
    assert ((y.double() - expected).abs() <= size * 8 * 2.0**-24).all()
    single = layer(x[0])
    assert single.shape == y[0].shape
    if how != "dynamic":
        assert single.equal(y[0])
    assert layer(x[:0]).shape == (0, *y.shape[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_round_at_the_ends_only(kind: str, dtype: torch.dtype) -> None:
    conv, shape = KINDS[kind]
    x = torch.randn(shape).to(dtype)
    layer = quantized(conv, ActivationQuantizer(Format.parse("int8:row")))
    assert layer(x).dtype == dtype
    assert layer(x).equal(layer(x.float()).to(dtype))


@pytest.mark.parametrize("kind", ["Conv1d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels", [341, 400])
def test_sums_of_more_than_1024_products_are_exact(kind: str, groups: int, channels: int) -> None:
    """All codes 127: the sums are odd numbers above 2²⁴, which float32 does not hold."""
    dims = int(kind[-2])
    conv = getattr(nn, kind)(channels * groups, 2 * groups, (3,) + (1,) * (dims - 1), groups=groups, bias=False)
    layer = quantized(conv, ActivationQuantizer(Format.parse("int8:row")))
    layer.weight.fill_(127)
    layer.weight[:, 0] = 1
    codes = torch.full((1, channels * groups, 3) + (1,) * (dims - 1), 127, dtype=torch.int8)
    codes[0, 0] = 126
    found = layer._integer(codes)
    exact = copy.deepcopy(conv).double()
    layout = layout_of(conv)
    exact.weight.data = layout.from_matrix(layer.weight_codes().double(), tuple(conv.weight.shape[2:])).contiguous()
    with torch.no_grad():
        expected = exact(codes.double())
    assert found.double().equal(expected)
    if channels == 400:
        assert float(expected.max()) > 2**24


@pytest.mark.parametrize("how", ["dynamic", "static", "affine"])
@pytest.mark.parametrize("weight", ["int8:row", "int8:tensor", "int4:row"])
@pytest.mark.parametrize("kind", [name for name in KINDS if name.startswith("2d")])
def test_onednn_and_the_generic_path_give_the_same_bits(
    kind: str, weight: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv, shape = KINDS[kind]
    x = torch.randn(shape) * 3 + 1
    layer = quantized(conv, quantizer(how, x), weight)
    assert isinstance(layer, QConv2d)
    found = layer(x)
    with torch.inference_mode():
        assert layer(x).equal(found)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert layer(x).equal(found)


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC", "affine"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, scheme: str, tmp_path: Path) -> None:
    conv, shape = KINDS[kind]
    if scheme == "affine" and kind not in PLAIN:
        return
    wanted: Any = scheme
    if scheme == "affine":
        wanted = {"weights": "int8:row", "input_activations": AFFINE, "dynamic": False}
    model, x = nn.Sequential(copy.deepcopy(conv)), torch.randn(shape) + 0.5
    evenbits.quantize(model, scheme=wanted, method="smoothquant", data=[x])
    evenbits.save(model, tmp_path / "out")
    loaded = evenbits.load(tmp_path / "out", nn.Sequential(copy.deepcopy(conv)))
    assert loaded[0].geometry == model[0].geometry and loaded[0].weight_shape == model[0].weight_shape
    assert loaded(x).equal(model(x))
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_subclass_that_computes_the_same_comes_back(tmp_path: Path) -> None:
    own = type("Own", (nn.Conv2d,), {})
    model, x = nn.Sequential(own(3, 4, 3)), torch.randn(1, 3, 5, 5)
    evenbits.quantize(model, method="rtn", data=[x])
    evenbits.save(model, tmp_path / "out")
    assert evenbits.load(tmp_path / "out", nn.Sequential(own(3, 4, 3)))(x).equal(model(x))


@pytest.mark.parametrize("spelling", ["int8:row:affine", AFFINE])
def test_affine_activations_have_to_be_static(spelling: str) -> None:
    with pytest.raises(EvenbitsError, match="or static affine ones"):
        quantized(nn.Conv2d(1, 1, 1), ActivationQuantizer(Format.parse(spelling)))
