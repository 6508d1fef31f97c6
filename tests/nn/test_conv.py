"""QConv2d against torch's own float64 convolution of the integer codes, which is exact."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.errors import EvenbitsError
from evenbits.kernels import use_backend
from evenbits.nn.conv import QConv2d
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format

# torch's own word about its float convolution, once a process, and no concern of the quantized one.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def _quantized(
    conv: nn.Conv2d,
    weight: str = "int8:row",
    activation: str | None = "int8:row",
    scale: float | None = None,
    multiplier: torch.Tensor | None = None,
) -> QConv2d:
    quantizer = None
    if activation is not None:
        quantizer = ActivationQuantizer(Format.parse(activation), None if scale is None else torch.tensor([scale]))
    encoded = encode(conv.weight.flatten(1), weight)
    geometry = QConv2d.geometry_of(conv)
    return QConv2d(encoded, tuple(conv.weight.shape), conv.bias, quantizer, multiplier, geometry=geometry)


def _oracle(conv: nn.Conv2d, layer: QConv2d, x: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Integer codes in float64 through torch's convolution, padding modes and all; then the scales."""
    images = x if x.ndim == 4 else x.unsqueeze(0)
    flat = images.float().flatten(1).numpy()
    top = layer.input_format.dtype.qmax
    if scale is not None:
        steps = np.full((len(flat), 1), np.float32(scale))
    else:
        axis = {} if layer.input_format.granularity.kind == "tensor" else {"axis": 1, "keepdims": True}
        steps = np.abs(flat).max(**axis) / np.float32(top) * np.ones((len(flat), 1), np.float32)
    codes = torch.from_numpy(np.clip(np.rint(flat / steps), -top, top)).double().view(images.shape)
    exact = copy.deepcopy(conv).double()
    exact.bias = None
    exact.weight.data = layer.weight_codes().double().view(conv.weight.shape)
    with torch.no_grad():
        product = exact(codes)
    assert product.equal(product.round())
    y = product * torch.from_numpy(steps).double().view(-1, 1, 1, 1) * layer.weight_scale.double().view(1, -1, 1, 1)
    y = y if conv.bias is None else y + conv.bias.detach().double().view(1, -1, 1, 1)
    return y if x.ndim == 4 else y.squeeze(0)


def _check(conv: nn.Conv2d, x: torch.Tensor, scale: float | None = None, **kwargs: Any) -> None:
    layer = _quantized(conv, scale=scale, **kwargs)
    y, expected = layer(x), _oracle(conv, layer, x, scale)
    assert y.shape == expected.shape == conv(x.float()).shape
    assert y.dtype == x.dtype
    # Three float32 roundings of the product and one of the sum with the bias.
    magnitude = expected.abs() + (0 if conv.bias is None else conv.bias.detach().double().abs().view(-1, 1, 1))
    assert ((y.double() - expected).abs() <= magnitude * 5 * 2.0**-24).all()


GEOMETRIES = [
    {},
    {"kernel_size": 1},
    {"kernel_size": (1, 3)},
    {"kernel_size": (3, 2), "padding": (2, 1)},
    {"stride": 2},
    {"stride": (2, 3), "padding": 1},
    {"dilation": 2},
    {"dilation": (1, 3), "padding": (0, 3), "stride": (2, 1)},
    {"kernel_size": 5, "padding": 2},
    {"padding": "same"},
    {"padding": "same", "kernel_size": (2, 4)},
    {"padding": "same", "kernel_size": 2, "dilation": 3},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "replicate"},
    {"padding": (2, 1), "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "reflect", "kernel_size": (3, 2)},
    {"padding": 1, "bias": False},
    {"padding": 1, "stride": 2, "padding_mode": "circular", "dilation": 2},
]


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_geometry(options: dict[str, Any], groups: int) -> None:
    conv = nn.Conv2d(4, 8, **{"kernel_size": 3, "groups": groups} | options)
    _check(conv, torch.randn(3, 4, 9, 8) * torch.tensor([1.0, 5.0, 0.2]).view(3, 1, 1, 1))


@pytest.mark.parametrize("options", [{}, {"padding": 1, "padding_mode": "replicate"}, {"groups": 4}], ids=str)
@pytest.mark.parametrize("activation", ["int8:row", "int8:tensor", "int4:row"])
@pytest.mark.parametrize("weight", ["int8:row", "int8:tensor", "int4:row"])
def test_formats(options: dict[str, Any], activation: str, weight: str) -> None:
    _check(nn.Conv2d(4, 4, 3, **options), torch.randn(2, 4, 6, 6), activation=activation, weight=weight)


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"groups": 4}, {"padding": "same", "padding_mode": "circular"}], ids=str
)
def test_static(options: dict[str, Any]) -> None:
    x = torch.randn(2, 4, 6, 6)
    _check(nn.Conv2d(4, 4, 3, **options), x, scale=0.01, activation="int8:tensor")  # saturates
    _check(nn.Conv2d(4, 4, 3, **options), x, scale=0.04, activation="int8:tensor")


def test_depthwise_and_pointwise() -> None:
    x = torch.randn(2, 6, 7, 7)
    _check(nn.Conv2d(6, 6, 3, padding=1, groups=6), x)
    _check(nn.Conv2d(6, 18, 3, padding=1, groups=6), x)  # channel multiplier 3
    _check(nn.Conv2d(6, 4, 1), x)
    _check(nn.Conv2d(1, 4, 1), torch.randn(2, 1, 5, 5))  # K = 1
    _check(nn.Conv2d(6, 6, 1, groups=6), x)


@pytest.mark.parametrize("per_group", [113, 114, 120])
def test_long_sums_in_groups(per_group: int) -> None:
    """C/groups · 9 on both sides of 1024, where float32 stops being exact."""
    conv = nn.Conv2d(2 * per_group, 4, 3, groups=2)
    conv.weight.data = conv.weight.data.abs() * 0 + 1.0
    conv.weight.data[0, 0, 0, 0] = 1 / 127
    x = torch.ones(1, 2 * per_group, 3, 3)
    x[0, 0, 0, 0] = 2 / 127
    layer = _quantized(conv)
    codes = torch.round(x * 127).to(torch.int8)
    exact = [int((codes[0, g * per_group :][:per_group].long() * 127).sum()) for g in (0, 1)]
    first = exact[0] - 2 * 127 + 2  # the one small weight (code 1) meets the one small pixel (code 2)
    assert first % 2 == (per_group * 9 + 1) % 2  # an odd sum above 2²⁴ is no float32
    assert (first > 2**24) is (per_group == 120)
    assert layer._integer(codes).flatten().tolist() == [first, exact[0], exact[1], exact[1]]
    _check(nn.Conv2d(2 * per_group, 4, 3, groups=2), torch.randn(1, 2 * per_group, 4, 4))


def test_zero_padding_writes_zero() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    conv.weight.data.fill_(1.0)
    y = _quantized(conv)(torch.full((1, 1, 2, 2), 3.0))
    assert y.flatten().tolist() == pytest.approx([12.0] * 4, rel=1e-6)


@pytest.mark.parametrize("options", [{"padding": 1}, {"groups": 2}, {"padding": 1, "padding_mode": "reflect"}], ids=str)
@pytest.mark.parametrize("activation", ["int8:row", "int8:tensor", None])
def test_unbatched_and_empty(options: dict[str, Any], activation: str | None) -> None:
    conv = nn.Conv2d(4, 6, 3, **options)
    layer = _quantized(conv, activation=activation)
    x = torch.randn(4, 5, 6)
    assert layer(x).equal(layer(x.unsqueeze(0)).squeeze(0))
    assert layer(torch.zeros(0, 4, 5, 6)).shape == conv(torch.zeros(0, 4, 5, 6)).shape


LAYOUTS = [{"kernel_size": 1}, {"kernel_size": 1, "stride": 2, "bias": False}, {"kernel_size": 3, "padding": 1}]
LAYOUTS += [{"kernel_size": 3, "groups": 2}]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("activation", "scale"),
    [("int8:row", None), ("int8:tensor", 0.03), (None, None), ("int8:g8", None), ("ovp4:row", None)],
)
@pytest.mark.parametrize("multiplied", [False, True])
def test_layouts(options: dict[str, Any], activation: str | None, scale: float | None, multiplied: bool) -> None:
    """The input's memory format does not change values, and the output's is torch's: a model may `view` it."""
    conv = nn.Conv2d(4, 6, **options)
    multiplier = torch.rand(4) + 0.5 if multiplied else None
    layer = _quantized(conv, activation=activation, scale=scale, multiplier=multiplier)
    base = torch.randn(4, 4, 6, 6)
    views = (
        base,
        base.to(memory_format=torch.channels_last),
        base.transpose(0, 1),
        base[::2],
        base[:1].expand(3, 4, 6, 6),
    )
    for view in views:
        y, expected = layer(view), layer(view.contiguous())
        torch.testing.assert_close(y, expected, rtol=0, atol=0 if layer.is_integer else 1e-5)
        assert y.stride() == conv(view).stride()


def test_images_do_not_see_each_other() -> None:
    layer = _quantized(nn.Conv2d(3, 4, 3))
    x = torch.randn(3, 3, 5, 5)
    x[1] *= 1e4
    x[2, 0, 0, 0] = float("nan")
    y = layer(x)
    assert y[0].equal(layer(x[0]))
    assert y[1].equal(layer(x[1]))
    assert y[2].isnan().all()


@pytest.mark.parametrize("backend", ["torch_fp32", "reference"])
def test_backends_agree(backend: str) -> None:
    layer, x = _quantized(nn.Conv2d(130, 5, 3)), torch.randn(2, 130, 5, 5)
    expected = layer(x)
    with use_backend(backend):
        assert layer(x).equal(expected)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_integers(groups: int, precision: torch.dtype) -> None:
    layer, x = _quantized(nn.Conv2d(64, 8, 3, groups=groups)), torch.randn(2, 64, 6, 6)
    expected = layer(x)
    with torch.autocast("cpu", dtype=precision):
        assert layer(x).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("multiplied", [False, True])
def test_types_in_and_out(dtype: torch.dtype, multiplied: bool) -> None:
    multiplier = torch.tensor([0.3, 7.0, 9e3, 1e-3]) if multiplied else None
    layer, x = _quantized(nn.Conv2d(4, 6, 3), multiplier=multiplier), (torch.randn(2, 4, 5, 5) * 20).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert y.equal(layer(x.float()).to(dtype))


@pytest.mark.parametrize("activation", [None, "int8:row"])
def test_multiplier_is_per_channel(activation: str | None) -> None:
    multiplier = torch.rand(4) + 0.5
    conv, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)
    layer, plain = (
        _quantized(conv, activation=activation, multiplier=multiplier),
        _quantized(conv, activation=activation),
    )
    assert layer(x).equal(plain(x * multiplier.view(1, 4, 1, 1)))


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_only_is_the_float_layer_on_decoded_weights(options: dict[str, Any], dtype: torch.dtype) -> None:
    conv = nn.Conv2d(4, 8, **{"kernel_size": 3} | options)
    layer = _quantized(conv, weight="int4:g8", activation=None)
    decoded = copy.deepcopy(conv).to(dtype)
    decoded.weight.data = layer.qweight().dequantize(dtype).view(conv.weight.shape)
    x = torch.randn(2, 4, 9, 8, dtype=dtype)
    assert (layer(x) - decoded(x)).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-13)
    assert layer(x).dtype == dtype


def test_dynamic_affine_activations_are_refused() -> None:
    with pytest.raises(EvenbitsError, match=r"such as 'int8:row', or static affine ones.*given int8:row:affine"):
        _quantized(nn.Conv2d(1, 1, 1), activation="int8:row:affine")


@pytest.mark.parametrize("options", [{"kernel_size": 1}, {"kernel_size": 3, "padding": 1, "groups": 2}], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_exports_with_any_number_of_images(options: dict[str, Any], last: bool) -> None:
    layer, form = _quantized(nn.Conv2d(4, 6, **options)), torch.channels_last if last else torch.contiguous_format
    x = torch.randn(3, 4, 5, 5).contiguous(memory_format=form)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("n")},), strict=False).module()
    more = torch.randn(5, 4, 5, 5).contiguous(memory_format=form)
    with torch.no_grad():
        assert exported(more).equal(layer(more))
