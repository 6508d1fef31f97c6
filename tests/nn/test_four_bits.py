"""Layers with weights in every format: integers where the values fit int8, floats elsewhere; state and casts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.nn.base import QuantizedLayer
from evenbits.nn.conv import QConv2d
from evenbits.nn.linear import QLinear
from evenbits.numerics.encode import encode
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor

NIBBLES = {  # normal codes 0 … 15
    "int4": [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1],
    "flint4": [0, 1, 2, 3, 16, 8, 4, 6, 0, -1, -2, -3, -16, -8, -4, -6],
}
OUTLIERS = {"int": [12, 16, 24, 32, 48, 64, 96], "flint_i8": [20, 24, 32, 48, 64, 96, 120]}
INTEGER = ["int4:row", "flint4:row", "ovp4-int:row", "ovp4-flint_i8:row", "int4:tensor", "ovp4-int:tensor"]
FLOAT = ["ovp4-flint:row", "ovp4:g16", "ovp4-mix:g16", "nf4:row", "fp4:row", "mxfp4", "nvfp4", "int4:g16", "flint4:g16"]
FLOAT += ["ovp8:row", "fp8:row", "uint4:row:affine", "fp8:g16"]
PACKED = ["ovp4-flint:row", "ovp4:g16", "fp4:row", "mxfp4", "nvfp4", "int4:g16", "flint4:g16", "ovp4-flint:g32"]
PACKED += ["ovp4-int:g128", "pot4:row", "int4:g24"]  # integers only with int8 activations, from packed bytes
EVERY = [*INTEGER, *FLOAT, "int8:row", "int3:row", "pot4:row", "ant4:row", "ovp4:row:paper", "ovp4-i8:row", "int2:g8"]
BYTES = {"weight_scale", "weight_global_scale", "weight_kinds", "weight", "input_scale"}


def _activation(spelling: str | None, scale: float | None = None) -> ActivationQuantizer | None:
    if spelling is None:
        return None
    return ActivationQuantizer(Format.parse(spelling), None if scale is None else torch.tensor([scale]))


def _weight(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns) * 0.05
    weight[0, 3] = weight[1, 4 % columns] = 1.3  # outliers
    return weight


def _layer(
    weight: str, activation: str | None, *, columns: int = 37, scale: float | None = None, bias: bool = True
) -> tuple[QLinear, QTensor]:
    encoded = encode(_weight(6, columns), weight)
    added = torch.randn(6) if bias else None
    return QLinear(encoded, (6, columns), added, _activation(activation, scale)), encoded


def _by_hand(encoded: QTensor) -> np.ndarray:
    """float64 weights from bytes: nibbles, identifiers and scales, nothing of the library's decoders."""
    name, columns = encoded.format.dtype.name, encoded.shape[1]
    packed = encoded.packed.numpy().astype(int)
    low, high = packed & 15, packed >> 4
    normal = np.array(NIBBLES["int4" if name in ("int4", "ovp4-int") else "flint4"])
    pairs = np.stack([normal[low], normal[high]], axis=-1)
    if name.startswith("ovp4"):
        magnitudes = np.array([0, *OUTLIERS[name[5:]]])
        outlier = np.array([*magnitudes, *-magnitudes])
        zero = np.zeros_like(low)
        pairs = np.where((high == 8)[..., None], np.stack([outlier[low], zero], -1), pairs)
        pairs = np.where((low == 8)[..., None], np.stack([zero, outlier[high]], -1), pairs)
    scale = encoded.scale.numpy().astype(np.float64) * (
        1 if encoded.global_scale is None else float(encoded.global_scale)
    )
    return pairs.reshape(len(packed), -1)[:, :columns] * scale.reshape(-1, 1)


@pytest.mark.parametrize("activation", ["int8:row", "int8:tensor", "int4:row"])
@pytest.mark.parametrize("weight", INTEGER)
@pytest.mark.parametrize("columns", [37, 64, 4])
def test_the_integer_path_is_the_float64_product(weight: str, activation: str, columns: int) -> None:
    layer, encoded = _layer(weight, activation, columns=columns)
    assert layer.is_integer
    x = torch.randn(5, columns)
    top = np.float32(7 if activation == "int4:row" else 127)
    axis = {} if activation == "int8:tensor" else {"axis": 1, "keepdims": True}
    step = np.abs(x.numpy()).max(**axis) / top
    decoded = np.rint(x.numpy() / step).astype(np.float64) * np.float64(step)
    terms = decoded[:, None, :] * _by_hand(encoded)[None]
    bias = layer.bias.double().numpy()
    error = np.abs(layer(x).double().numpy() - (terms.sum(-1) + bias))
    # The integer product is exact; three float32 roundings of it and one of the sum with the bias.
    assert (error <= (np.abs(terms.sum(-1)) + np.abs(bias)) * 5 * 2.0**-24).all()


@pytest.mark.parametrize("activation", [None, "int8:row", "ovp4:row", "flint4:row", "mxfp4", "int8:g8"])
@pytest.mark.parametrize("weight", FLOAT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_float_path_is_the_float_layer(weight: str, activation: str | None, dtype: torch.dtype) -> None:
    layer, encoded = _layer(weight, activation)
    assert layer.is_integer == (activation == "int8:row" and weight in PACKED)
    if layer.is_integer:
        return
    x = torch.randn(2, 3, 37).to(dtype)
    rounded = x if activation is None else fake_quantize(x, Format.parse(activation))
    _same_product(layer, x, rounded, encoded)


def _same_product(layer: QLinear, x: torch.Tensor, rounded: torch.Tensor, encoded: QTensor) -> None:
    """Decoded weights: torch's own product, to the bit. Streamed ones: float32 sums in another order, one rounding."""
    if not layer.is_streamed:
        assert layer(x).equal(nn.functional.linear(rounded, encoded.dequantize(x.dtype), layer.bias.to(x.dtype)))
        return
    decoded, bias, inputs = encoded.dequantize().double(), layer.bias.double(), rounded.double()
    exact, size = inputs @ decoded.t() + bias, inputs.abs() @ decoded.abs().t() + bias.abs()
    slack = size * (4 + x.shape[-1] / 8) * 2.0**-24 + exact.abs() * torch.finfo(x.dtype).eps
    assert layer(x).dtype == x.dtype
    assert ((layer(x) - exact).abs() <= slack).all()


@pytest.mark.parametrize("activation", ["int8:row", "int8:tensor", "int8:row:127.5"])
@pytest.mark.parametrize("weight", PACKED)
@pytest.mark.parametrize("columns", [37, 64, 300])
def test_packed_weights_run_in_integers(weight: str, activation: str, columns: int) -> None:
    layer, encoded = _layer(weight, activation, columns=columns)
    assert layer.is_integer
    assert layer.is_packed
    x = torch.randn(5, columns)
    rounded = fake_quantize(x, Format.parse(activation)).double()
    decoded, bias = encoded.dequantize().double(), layer.bias.double()
    exact = rounded @ decoded.t() + bias
    # Decoded numbers and group sums are float32: every term has a few roundings.
    scale = rounded.abs() @ decoded.abs().t() + bias.abs()
    assert ((layer(x) - exact).abs() <= scale * (8 + columns / 8) * 2.0**-24).all()


@pytest.mark.parametrize("activation", ["flint4:tensor", "ovp4-int:tensor", "fp8:tensor", "ovp4-flint:tensor:paper"])
@pytest.mark.parametrize("weight", ["int4:row", "ovp4-flint:row", "nvfp4"])
def test_static_activations_of_four_bits(weight: str, activation: str) -> None:
    layer, encoded = _layer(weight, activation, scale=0.31)
    assert not layer.is_integer
    x = torch.randn(4, 37) * 2
    rounded = fake_quantize(x, Format.parse(activation), scale=torch.tensor([0.31]))
    _same_product(layer, x, rounded, encoded)
    x[2, 5] = float("nan")
    y = layer(x)
    assert y[2].isnan().all()
    assert int(y.isnan().sum()) == 6


def test_affine_activations_meet_packed_weights() -> None:
    for weight in ("int4:row", "flint4:row", "ovp4-int:row", "ovp4-flint:row", "fp4:row"):
        layer, encoded = _layer(weight, "int8:row:affine")
        assert layer.weight_sum is not None
        sums = encoded.values().double().sum(1) * (2 if weight == "fp4:row" else 1)
        assert layer.weight_sum.tolist() == sums.tolist()
        x = torch.rand(3, 37) * 4 + 1
        expected = nn.functional.linear(
            fake_quantize(x, Format.parse("int8:row:affine")), encoded.dequantize(), layer.bias
        )
        assert torch.allclose(layer(x), expected, atol=1e-4)


@pytest.mark.parametrize("activation", ["int8:row", None, "ovp4:row"])
@pytest.mark.parametrize("weight", ["int4:row", "ovp4-int:row", "ovp4-flint_i8:row", "ovp4:g16", "mxfp4", "nf4:row"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(weight: str, activation: str | None, groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups)
    conv.weight.data[0, 0, 0, 0] = 3.0
    encoded = encode(conv.weight.detach().flatten(1), weight)
    layer = QConv2d(
        encoded, tuple(conv.weight.shape), conv.bias, _activation(activation), geometry=QConv2d.geometry_of(conv)
    )
    x = torch.randn(2, 4, 7, 5)
    rounded = x if activation is None else fake_quantize(x.flatten(1), Format.parse(activation)).view(x.shape)
    decoded = encoded.dequantize().view(conv.weight.shape)
    expected = nn.functional.conv2d(rounded, decoded, conv.bias, padding=1, groups=groups)
    if layer.is_integer:
        exact = nn.functional.conv2d(rounded.double(), decoded.double(), conv.bias.double(), padding=1, groups=groups)
        assert activation == "int8:row"
        assert (layer(x) - exact).abs().max() <= 1e-5
    else:
        assert layer(x).equal(expected.detach())


def _empty_like(layer: QuantizedLayer) -> QuantizedLayer:
    return QLinear.empty(
        layer.weight_shape,
        layer.weight_format,
        layer.input_format,
        static=layer.input_scale is not None,
        global_scale=layer.weight_global_scale is not None,
        multiplier=0,
        bias=None if layer.bias is None else layer.bias.dtype,
    )


@pytest.mark.parametrize("activation", [None, "int8:row", "int8:row:affine"])
@pytest.mark.parametrize("weight", EVERY)
def test_state_travels_through_an_empty_layer(weight: str, activation: str | None) -> None:
    for factor in (1.0, 1e-7):  # small weights: float16 scales get a factor
        encoded = encode(_weight(6, 37) * factor, weight)
        layer = QLinear(encoded, (6, 37), None, _activation(activation))
        blank = _empty_like(layer)
        assert {name: (t.shape, t.dtype) for name, t in blank.state_dict().items()} == {
            name: (t.shape, t.dtype) for name, t in layer.state_dict().items()
        }
        assert all(tensor.is_meta for tensor in blank.state_dict().values())
        blank.load_state_dict({n: t.clone() for n, t in layer.state_dict().items()}, strict=True, assign=True)
        x = torch.randn(3, 37)
        assert blank(x).equal(layer(x))
        assert blank.bits_per_weight == layer.bits_per_weight
        assert repr(blank) == repr(layer)
        assert blank.qweight().dequantize().equal(encoded.dequantize())


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight", EVERY)
def test_casts_leave_scales_alone_bit_for_bit(weight: str, target: torch.dtype) -> None:
    layer, encoded = _layer(weight, "int8:tensor", scale=0.1)
    nested = nn.Sequential(layer)
    before = {name: t.clone() for name, t in layer.state_dict().items() if name in BYTES}
    for cast in (target, torch.float16, torch.bfloat16, target):
        nested.to(cast)
    assert layer.bias.dtype == target
    for name, tensor in before.items():
        after = layer.state_dict()[name]
        assert after.dtype == tensor.dtype
        assert after.view(torch.uint8).equal(tensor.view(torch.uint8))
    assert layer.qweight().dequantize().equal(encoded.dequantize())
    y = layer(torch.randn(2, 37).to(target))
    assert y.dtype == target
    assert bool(y.isfinite().all())


@pytest.mark.parametrize(
    ("weight", "bits"),
    [
        ("ovp4-int:row", 4 + 16 / 64),
        ("flint4:row", 4 + 16 / 64),
        ("ovp4-int:g16", 4.5 + 32 / 384),
        ("ovp4-mix:g16", 4.5 + 8 / 64 + 32 / 384),
        ("mxfp4", 4.25),
        ("nvfp4", 4.5 + 32 / 384),
        ("int4:tensor", 4 + 32 / 384),
    ],
)
def test_true_bits(weight: str, bits: float) -> None:
    layer, encoded = _layer(weight, None, columns=64)
    assert layer.bits_per_weight == encoded.bits_per_element == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("weight", ["int4:row", "ovp4-int:row", "ovp4:g16", "ovp4-mix:g16", "nf4:row", "nvfp4"])
def test_export(weight: str) -> None:
    """Absent buffers come last: torch.export pairs buffers with inputs by position."""
    for activation in (None, "int8:row") if weight.endswith("row") and weight != "nf4:row" else (None,):
        layer, _ = _layer(weight, activation)
        rows = torch.export.Dim("rows", min=2, max=64)
        program = torch.export.export(layer, (torch.randn(3, 37),), dynamic_shapes=({0: rows},), strict=False)
        x = torch.randn(9, 37)
        assert torch.allclose(program.module()(x), layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight", ["int4:g16", "nf4:row", "ovp4-flint:row"])
def test_what_weights_are_streamed_for_and_what_they_are_decoded_for(weight: str) -> None:
    layer, encoded = _layer(weight, None)
    assert layer.is_streamed
    x = torch.randn(3, 37)
    with torch.no_grad():
        wide = nn.functional.linear(x.double(), encoded.dequantize(torch.float64), layer.bias.double())
        assert layer(x.double()).equal(wide)  # float64 stays float64
    learnt = x.clone().requires_grad_()
    y = layer(learnt)
    y.sum().backward()
    torch.testing.assert_close(learnt.grad, encoded.dequantize().sum(0).expand(3, -1))
    torch.testing.assert_close(y.detach(), layer(x))


def test_a_multiplier_reaches_streamed_weights() -> None:
    encoded = encode(_weight(6, 37), "int4:g16")
    factors = torch.rand(37) + 0.5
    layer = QLinear(encoded, (6, 37), None, None, factors)
    x = torch.randn(4, 37)
    torch.testing.assert_close(layer(x), (x * factors) @ encoded.dequantize().t())


@pytest.mark.parametrize("weight", ["uint4:row:affine", "int8:row", "int3:row", "ovp4-mix:g16", "int4:g12"])
def test_what_cannot_be_streamed_is_decoded(weight: str) -> None:
    assert not _layer(weight, None)[0].is_streamed
