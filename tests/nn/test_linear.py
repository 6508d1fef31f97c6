"""QLinear: integers inside, floats outside, nothing left to chance in between."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.nn.linear import QLinear
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor

NAN = float("nan")


def _layer(
    out: int = 5,
    columns: int = 12,
    weight: str = "int8:row",
    activation: str | None = "int8:row",
    *,
    bias: bool = True,
    scale: float | None = None,
    zero: int | None = None,
    multiplier: torch.Tensor | None = None,
) -> tuple[QLinear, QTensor]:
    encoded = encode(torch.randn(out, columns), weight)
    quantizer = None
    if activation is not None:
        quantizer = ActivationQuantizer(
            Format.parse(activation),
            None if scale is None else torch.tensor([scale]),
            None if zero is None else torch.tensor([zero], dtype=torch.int32),
        )
    return QLinear(encoded, (out, columns), torch.randn(out) if bias else None, quantizer, multiplier), encoded


def _expected(layer: QLinear, encoded: QTensor, x: torch.Tensor) -> torch.Tensor:
    """float64: decoded weights times decoded activations (symmetric, dynamic per token)."""
    rows = x.reshape(-1, x.shape[-1]).float().numpy()
    top = layer.input_format.dtype.qmax
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(top)
    scale[scale == 0] = 1
    decoded = torch.from_numpy(np.rint(rows / scale)).double() * torch.from_numpy(scale).double()
    scales = encoded.scale.double() if encoded.scale.numel() > 1 else encoded.scale.double().view(1, 1)
    y = decoded @ (encoded.codes().double() * scales).t()
    y = y if layer.bias is None else y + layer.bias.double()
    return y.view(*x.shape[:-1], -1)


@pytest.mark.parametrize("weight", ["int8:row", "int8:tensor", "int4:row", "int3:row", "int8:row:127.5"])
@pytest.mark.parametrize("activation", ["int8:row", "int4:row"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (7, 12), (2, 3, 12)])
def test_integer_product(weight: str, activation: str, bias: bool, shape: tuple[int, ...]) -> None:
    layer, encoded = _layer(weight=weight, activation=activation, bias=bias)
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 5)
    expected = _expected(layer, encoded, x)
    assert (y.double() - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max()))
    assert layer.is_integer


def test_close_to_the_float_layer() -> None:
    linear, x = nn.Linear(256, 64), torch.randn(32, 256)
    encoded = encode(linear.weight, "int8:row")
    layer = QLinear(encoded, (64, 256), linear.bias, ActivationQuantizer(Format.parse("int8:row")))
    exact = linear(x).detach()
    noise = (layer(x) - exact).square().mean() / exact.square().mean()
    assert float(noise) < 2e-4
    assert layer.bias is not None
    assert not layer.bias.requires_grad
    assert layer.bias.data_ptr() != linear.bias.data_ptr()


@pytest.mark.parametrize(
    "weight", ["int8:row", "int4:g5", "uint4:row:affine", "uint8:tensor:affine:free", "int2:g3:mse"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weight_only_is_the_float_layer_on_decoded_weights(weight: str, dtype: torch.dtype) -> None:
    layer, encoded = _layer(weight=weight, activation=None)
    x = torch.randn(3, 12).to(dtype)
    expected = nn.functional.linear(x, encoded.dequantize(dtype), layer.bias.to(dtype))
    assert layer(x).equal(expected)
    assert layer(x).dtype == dtype
    assert not layer.is_integer
    assert layer.input_scale is layer.weight_sum is None


@pytest.mark.parametrize("activation", [None, "int8:row"])
def test_multiplier_divides_the_input(activation: str | None) -> None:
    multiplier = torch.rand(12) + 0.5
    layer, _ = _layer(activation=activation, multiplier=multiplier)
    plain = copy.deepcopy(layer)
    plain.input_multiplier = None
    x = torch.randn(4, 12)
    assert layer(x).equal(plain(x * multiplier))


def test_static_affine_holds_every_buffer_it_needs() -> None:
    layer, encoded = _layer(activation="int8:tensor:affine", scale=0.02, zero=-100)
    assert layer.weight_sum is not None
    assert layer.weight_sum.dtype == torch.int32
    assert layer.weight_sum.tolist() == encoded.codes().long().sum(1).tolist()
    x = torch.rand(6, 12) * 4
    codes = (torch.round(x / np.float32(0.02)) - 100).clamp(-128, 127).double()
    exact = (codes + 100) @ encoded.codes().double().t() * float(np.float32(0.02)) * encoded.scale.double().view(1, -1)
    expected = exact + layer.bias.double()
    assert (layer(x).double() - expected).abs().max() <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize(("activation", "scale"), [("int8:row", None), ("int8:tensor", 0.05)])
def test_nan_poisons_its_row_only(activation: str, scale: float | None) -> None:
    layer, _ = _layer(activation=activation, scale=scale)
    x = torch.randn(2, 3, 12)
    clean = layer(x)
    x[1, 0, 4] = NAN
    y = layer(x)
    assert y[1, 0].isnan().all()
    assert y[0].equal(clean[0])
    assert y[1, 1:].equal(clean[1, 1:])


@pytest.mark.parametrize("activation", [None, "int8:row", "int8:tensor"])
def test_empty_batches(activation: str | None) -> None:
    layer, _ = _layer(activation=activation)
    assert layer(torch.zeros(0, 12)).shape == (0, 5)
    assert layer(torch.zeros(2, 0, 12)).shape == (2, 0, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_give_the_rounded_float_result(dtype: torch.dtype) -> None:
    layer, _ = _layer()
    x = torch.randn(4, 12).to(dtype)
    assert layer(x).dtype == dtype
    assert layer(x).equal(layer(x.float()).to(dtype))


def test_one_input_feature() -> None:
    layer, encoded = _layer(out=3, columns=1)
    x = torch.randn(4, 1)
    assert (layer(x).double() - _expected(layer, encoded, x)).abs().max() < 1e-6


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_integers(precision: torch.dtype) -> None:
    layer, _ = _layer(columns=2000)
    x = torch.randn(3, 2000)
    expected = layer(x)
    with torch.autocast("cpu", dtype=precision):
        assert layer(x).equal(expected)


def test_runs_without_gradients_and_after_a_trained_layer() -> None:
    layer, _ = _layer()
    with torch.inference_mode():
        inferred = layer(torch.ones(2, 12))
    assert inferred.equal(layer(torch.ones(2, 12)))
    trained = nn.Sequential(nn.Linear(12, 12), layer)
    assert trained(torch.ones(2, 12)).shape == (2, 5)
    assert list(layer.parameters()) == []


def test_a_contiguous_weight_whatever_it_came_from() -> None:
    weight_IO = torch.randn(12, 5)  # Hugging Face's Conv1D
    layer = QLinear(encode(weight_IO.t(), "int8:row"), (5, 12), None, ActivationQuantizer(Format.parse("int8:row")))
    assert layer.weight.is_contiguous()
    plain = QLinear(
        encode(weight_IO.t().contiguous(), "int8:row"), (5, 12), None, ActivationQuantizer(Format.parse("int8:row"))
    )
    x = torch.randn(3, 12)
    assert layer(x).equal(plain(x))
    assert (layer.in_features, layer.out_features) == (12, 5)


@pytest.mark.parametrize(("activation", "scale"), [("int8:row", None), ("int8:tensor", 0.05), (None, None)])
def test_fake_tensors_pass_through(activation: str | None, scale: float | None) -> None:
    layer, _ = _layer(activation=activation, scale=scale)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = layer(torch.empty(2, 7, 12))
    assert tuple(y.shape) == (2, 7, 5)
    assert y.dtype == torch.float32


def test_export_keeps_the_operation_and_the_batch_free() -> None:
    layer, _ = _layer(bias=True)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(3, 12),), dynamic_shapes=({0: rows},), strict=False)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["evenbits.linear_w8a8.default"]
    x = torch.randn(9, 12)
    assert program.module()(x).equal(layer(x))


def test_repr_names_formats() -> None:
    layer, _ = _layer(weight="int4:row", activation="int8:token")
    assert repr(layer) == "QLinear(5×12, weight=int4:row, input=int8:row, bias=True)"
    assert "input=float, bias=False" in repr(_layer(activation=None, bias=False)[0])
