"""What every quantized layer keeps: types, bytes, state, and formats it cannot run."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.errors import EvenbitsError
from evenbits.nn.base import QuantizedLayer, check_formats
from evenbits.nn.conv import QConv2d
from evenbits.nn.linear import QLinear
from evenbits.numerics.encode import encode
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.format import Format

CASES: dict[str, dict[str, Any]] = {
    "dynamic": {"weight": "int8:row", "activation": "int8:row"},
    "static": {"weight": "int8:row", "activation": "int8:tensor", "scale": 0.037},
    "static affine": {"weight": "int8:tensor", "activation": "int8:tensor:affine", "scale": 0.037, "zero": -5},
    "dynamic affine": {"weight": "int8:row", "activation": "int8:row:affine"},
    "narrow": {"weight": "int4:row", "activation": "int8:row", "multiplier": True},
    "weight only": {"weight": "int4:g4", "activation": None, "multiplier": True},
    "weight only affine": {"weight": "uint3:g5:affine", "activation": None},
    "weight only free": {"weight": "uint8:row:affine:free", "activation": None, "bias": False},
}


def _linear(
    weight: str,
    activation: str | None,
    scale: float | None = None,
    zero: int | None = None,
    multiplier: bool = False,
    bias: bool = True,
) -> QLinear:
    quantizer = None
    if activation is not None:
        scales = None if scale is None else torch.tensor([scale])
        zeros = None if zero is None else torch.tensor([zero], dtype=torch.int32)
        quantizer = ActivationQuantizer(Format.parse(activation), scales, zeros)
    divisor = torch.rand(10) + 0.5 if multiplier else None
    return QLinear(encode(torch.randn(6, 10), weight), (6, 10), torch.randn(6) if bias else None, quantizer, divisor)


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _empty_like(layer: QuantizedLayer, **kwargs: Any) -> QuantizedLayer:
    return type(layer).empty(
        layer.weight_shape,
        layer.weight_format,
        layer.input_format,
        static=layer.input_scale is not None,
        global_scale=layer.weight_global_scale is not None,
        multiplier=0 if layer.input_multiplier is None else layer.input_multiplier.numel(),
        bias=None if layer.bias is None else layer.bias.dtype,
        **kwargs,
    )


def test_state_travels_through_an_empty_layer(case: str) -> None:
    layer = _linear(**CASES[case])
    blank = _empty_like(layer)
    assert {name: (t.shape, t.dtype) for name, t in blank.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in layer.state_dict().items()
    }
    assert all(t.is_meta for t in blank.state_dict().values())
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    blank.load_state_dict(state, strict=True, assign=True)
    x = torch.randn(3, 10)
    assert blank(x).equal(layer(x))
    assert repr(blank) == repr(layer)
    assert blank.bits_per_weight == layer.bits_per_weight


def test_a_convolution_travels_too() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="circular")
    quantizer = ActivationQuantizer(Format.parse("int8:tensor"), torch.tensor([0.02]))
    geometry = QConv2d.geometry_of(conv)
    layer = QConv2d(encode(conv.weight.flatten(1), "int8:row"), (6, 2, 3, 3), conv.bias, quantizer, geometry=geometry)
    blank = _empty_like(layer, geometry=geometry)
    blank.load_state_dict(layer.state_dict(), strict=True, assign=True)
    x = torch.randn(2, 4, 5, 5)
    assert blank(x).equal(layer(x))
    assert layer.bits_per_weight == 8 + 32 / 18
    assert layer.float_weight_bytes == 4 * 6 * 18


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("inside", [False, True])
def test_casts_leave_scales_and_integers_alone(case: str, target: torch.dtype, inside: bool) -> None:
    layer = _linear(**CASES[case])
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    (nn.Sequential(layer) if inside else layer).to(target)
    for name, tensor in layer.state_dict().items():
        if name == "bias":
            assert tensor.dtype == target
            assert tensor.equal(before[name].to(target))
        else:
            assert tensor.dtype == before[name].dtype
            assert tensor.equal(before[name])
    x = torch.randn(2, 10).to(target)
    y = layer(x)
    assert y.dtype == target
    assert torch.isfinite(y).all()


def test_half_and_back_keeps_every_bit_of_the_scales(case: str) -> None:
    layer = _linear(**CASES[case])
    x = torch.randn(3, 10)
    bias = None if layer.bias is None else layer.bias.clone()
    expected = layer(x)
    layer.half().float()
    layer.bias = bias
    assert layer(x).equal(expected)


def test_copies_are_equal_and_independent(case: str) -> None:
    layer, x = _linear(**CASES[case]), torch.randn(3, 10)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin(x).equal(expected)
        twin.weight.zero_()
        twin.weight_scale.zero_()
    assert layer(x).equal(expected)


def test_the_weight_comes_back_as_it_was_encoded(case: str) -> None:
    torch.manual_seed(1)
    layer = _linear(**CASES[case])
    torch.manual_seed(1)
    if CASES[case].get("multiplier"):
        torch.rand(10)
    encoded = encode(torch.randn(6, 10), CASES[case]["weight"])
    assert layer.qweight().dequantize().equal(encoded.dequantize())
    assert layer.qweight().codes().tolist() == encoded.codes().tolist()
    if encoded.format.dtype.signed:
        assert layer.weight_codes().tolist() == encoded.codes().tolist()
    assert layer.weight.dtype == (torch.int8 if encoded.format.dtype.name == "int8" else torch.uint8)


@pytest.mark.parametrize(
    ("case", "bits"),
    [
        ("dynamic", 8 + 32 / 10),
        ("static", 8 + 32 / 10),
        ("static affine", 8 + 32 / 60 + 32 / 10),  # one scale; a row sum for every row
        ("dynamic affine", 8 + 32 / 10 + 32 / 10),
        ("narrow", 8 * 5 / 10 + 16 / 10 + 32 / 6),  # with a multiplier for every column
        ("weight only", 8 * 5 / 10 + 3 * 16 / 10 + 32 / 6),
        ("weight only affine", 8 * 4 / 10 + 2 * 16 / 10 + 2 * 8 / 10),  # 30 bits of codes are four bytes
        ("weight only free", 8 + 32 / 10 + 32 / 10),
    ],
)
def test_true_bits(case: str, bits: float) -> None:
    layer = _linear(**CASES[case])
    assert layer.bits_per_weight == pytest.approx(bits, rel=1e-12)
    names = ("weight", "weight_scale", "weight_zero_point", "weight_sum", "input_multiplier")
    stored = [getattr(layer, name) for name in names if getattr(layer, name) is not None]
    assert layer.weight_bytes == sum(len(t.numpy().tobytes()) for t in stored)
    assert layer.float_weight_bytes == 240


def test_nothing_is_trained_and_nothing_is_hidden(case: str) -> None:
    layer = _linear(**CASES[case])
    assert list(layer.parameters()) == []
    assert set(layer.state_dict()) == {name for name, buffer in layer.named_buffers()}
    assert not layer.training
    assert all(not tensor.requires_grad for tensor in layer.state_dict().values())


@pytest.mark.parametrize(
    ("weight", "activation", "words"),
    [
        ("int8:axis1", None, "int8:axis1 has another axis"),
        ("flint4:axis0", "int8:row", "flint4:axis0 has another axis"),
        ("int8:row", "int8:axis0", "activations are quantized by tokens; int8:axis0 has another axis"),
    ],
)
def test_formats_that_cannot_be_run(weight: str, activation: str | None, words: str) -> None:
    with pytest.raises(EvenbitsError, match=words):
        check_formats(Format.parse(weight), None if activation is None else Format.parse(activation))
    with pytest.raises(EvenbitsError, match=words):
        _linear(weight, activation)


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        *[("int8:row", a) for a in ("uint8:row:affine", "int8:g4", "int8:row:mse", "int8:tensor:p99.9")],
        *[("int8:row", a) for a in ("int8:row:affine:free", "flint4:row", "ovp4:row", "mxfp4")],
        *[(w, "int8:row") for w in ("int4:g4", "uint8:row:affine", "int8:row:affine", "uint8:tensor")],
        *[(w, "int8:row") for w in ("ovp4-int:g4", "ovp4-mix:g4", "ovp8:row", "nf4:row", "flint6:row")],
    ],
)
def test_formats_outside_the_integer_path_run_in_float(weight: str, activation: str) -> None:
    torch.manual_seed(3)
    layer = _linear(weight, activation) if not weight.startswith("uint8:tensor") else None
    if layer is None:
        quantizer = ActivationQuantizer(Format.parse(activation))
        layer = QLinear(encode(torch.rand(6, 10), weight), (6, 10), torch.randn(6), quantizer)
    assert not layer.is_integer
    x = torch.randn(3, 10)
    expected = nn.functional.linear(
        fake_quantize(x, Format.parse(activation)), layer.qweight().dequantize(), layer.bias
    )
    if layer.is_streamed:  # sums in another order
        torch.testing.assert_close(layer(x), expected)
    else:
        assert layer(x).equal(expected)
    assert (expected - nn.functional.linear(x, layer.qweight().dequantize(), layer.bias)).abs().max() > 0


@pytest.mark.parametrize("weight", ["int8:row", "int8:tensor", "int2:row:mse", "int8:row:127.5"])
@pytest.mark.parametrize("activation", ["int8:row", "int8:tensor:affine", "int4:row", "int8:row:127.5"])
def test_formats_that_can(weight: str, activation: str) -> None:
    check_formats(Format.parse(weight), Format.parse(activation))
    assert _linear(weight, activation)(torch.randn(2, 10)).shape == (2, 6)
