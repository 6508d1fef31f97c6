"""Packed 4-bit weights and E4M3 activations where there is no kernel: exact sums by torch, what is refused, layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.errors import EvenbitsError
from evenbits.kernels import dispatch, fused, pair_fp8
from evenbits.kernels.ops import linear_pair_fp8
from evenbits.nn.linear import QLinear
from evenbits.numerics.encode import encode
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor
from evenbits.numerics.rows import round_rows

FORMATS = ["int4:row", "int4:tensor", "flint4:row:minmax", "fp4:row", "pot4:row:minmax", "mxfp4", "nvfp4", "int4:g128"]
FORMATS += ["ovp4-int:row:minmax", "ovp4-flint:row:minmax", "ovp4-flint_i8:row:minmax", "ovp4-int:g16:minmax"]
ROWS = Format.parse("fp8:row")


def _weight(rows: int, columns: int, fmt: str) -> QTensor:
    generator = torch.Generator().manual_seed(rows * 7919 + columns)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    weight[torch.rand(rows, columns, generator=generator) < 0.05] *= 14
    return encode(weight, fmt)


def _run(x: torch.Tensor, q: QTensor, bias: torch.Tensor | None = None, **words: Any) -> torch.Tensor:
    return linear_pair_fp8(x, q.packed, q.scale, q.format, bias, global_scale=q.global_scale, **words)


def test_codes_and_scales_are_the_factors_of_the_numerics() -> None:
    x = torch.randn(60, 33) * 10.0 ** torch.randint(-36, 36, (60, 1))
    x[3] = 0.0
    values, scale = pair_fp8.quantize_e4m3(x)
    assert values.equal(values.to(torch.float8_e4m3fn).float()) and scale.shape == (60, 1)
    assert (values * scale).equal(round_rows(x, ROWS)) and (values * scale).equal(fake_quantize(x, ROWS))
    x[5, 2], x[7, 1] = torch.nan, -torch.inf
    scale = pair_fp8.quantize_e4m3(x)[1]
    assert scale.isnan().squeeze(1).nonzero().flatten().tolist() == [5, 7]


@pytest.mark.parametrize("fmt", FORMATS)
def test_products(fmt: str) -> None:
    """Sums are exact and rounded once; scales, groups and bias cost a rounding each."""
    for m, n, k in ((1, 1, 2), (3, 7, 64), (2, 33, 258)):
        q, x, bias = _weight(n, k, fmt), torch.randn(m, k), torch.randn(n)
        rounded, decoded = fake_quantize(x, ROWS).double(), q.dequantize().double()
        exact = rounded @ decoded.t() + bias.double()
        slack = (rounded.abs() @ decoded.abs().t() + bias.double().abs()) * (5 + k / 64) * 2.0**-24
        assert ((_run(x, q, bias) - exact).abs() <= slack).all(), (m, n, k)


def test_panels_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 64)
    for fmt in ("int4:row", "int4:tensor", "ovp4-int:g16:minmax"):
        q = _weight(11, 64, fmt)
        whole = _run(x, q)
        with monkeypatch.context() as patch:
            patch.setattr(pair_fp8, "_PANEL", 192)
            assert _run(x, q).equal(whole)


def test_the_steps_around_the_product() -> None:
    q, factors, bias = _weight(9, 64, "ovp4-int:row:minmax"), torch.rand(64) + 0.5, torch.randn(9)
    x = torch.randn(2, 3, 64).bfloat16()
    y = _run(x, q, bias, multiplier=factors, activation="relu")
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 9) and (y >= 0).all()
    plain = _run(x.float() * factors, q, bias)
    assert y.equal(plain.relu().bfloat16())
    assert _run(x[:0], q).shape == (0, 3, 9)


@pytest.mark.parametrize(
    ("fmt", "says"),
    [
        ("nf4:row", "values that E4M3 does not hold"),
        ("ovp4-mix:g16", "pairs whose kind changes from group to group"),
        ("int8:row", "8-bit weights"),
        ("int4:g12", "not by rows or groups of 8·n columns"),
        ("int4:row:affine", "zero points"),
    ],
)
def test_other_weights_are_refused(fmt: str, says: str) -> None:
    q = _weight(4, 64, fmt)
    with pytest.raises(EvenbitsError, match=f"linear_pair_fp8 takes symmetric 4-bit weights .* has .*{says}"):
        _run(torch.randn(2, 64), q)


def test_shapes_and_types_are_checked() -> None:
    q, x = _weight(4, 64, "int4:row"), torch.randn(2, 64)
    for args, words, says in (
        ((torch.randn(2, 60), q), {}, "60 columns of int4:row take uint8 rows of 30 bytes"),
        ((x.int(), q), {}, "activations are floating-point"),
        ((x, q, torch.randn(5)), {}, "bias is 4 numbers"),
        ((x, q), {"multiplier": torch.ones(3)}, "multiplier is 64 numbers"),
        ((x, q), {"activation": "tanh"}, "unknown activation function"),
    ):
        with pytest.raises(EvenbitsError, match=says):
            _run(*args, **words)


def test_opcheck() -> None:
    q, factors = _weight(5, 16, "ovp4-int:row:minmax"), torch.rand(16) + 0.5
    for x in (torch.randn(2, 3, 16), torch.randn(16).bfloat16()):
        args = (x, q.packed, q.scale, q.global_scale, str(q.format), torch.randn(5), factors, "silu")
        utils = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.evenbits.linear_pair_fp8.default, args, test_utils=utils)


def _layer(weight: str, activation: str | None, scale: torch.Tensor | None = None) -> QLinear:
    given = None if activation is None else ActivationQuantizer(Format.parse(activation), scale)
    return QLinear(_weight(6, 32, weight), (6, 32), torch.randn(6), given, torch.rand(32) + 0.5)


@pytest.mark.parametrize(
    ("weight", "activation", "fits"),
    [
        ("ovp4-int:row:minmax", "fp8:row", True),
        ("int4:g16", "fp8_e4m3:row", True),
        ("nf4:row", "fp8:row", False),
        ("int4:row", "fp8:tensor", False),
        ("int4:row", "fp8_e5m2:row", False),
        ("int4:row", "int8:row", False),
        ("int4:row", None, False),
        ("int8:row", "fp8:row", False),
    ],
)
def test_which_layers_would_run_in_e4m3(weight: str, activation: str | None, fits: bool) -> None:
    assert _layer(weight, activation).is_fp8 == fits


class _Kernels:
    """A backend that notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def linear_e4m3(
        self,
        x: torch.Tensor,
        weight: fused.Weight,
        values: tuple[float, ...],
        bias: Any,
        multiplier: Any,
        activation: str,
    ) -> torch.Tensor:
        self.calls.append((weight.kind, weight.group, len(values), bias is None, multiplier is None, activation))
        return x.new_zeros(*x.shape[:-1], len(weight.bytes), dtype=torch.float32)


def test_a_layer_takes_the_kernel_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, kernels = _layer("ovp4-int:g16:minmax", "fp8:row"), torch.randn(3, 32), _Kernels()
    plain = layer(x)
    exact = fake_quantize(x * layer.input_multiplier, ROWS) @ layer.qweight().dequantize().t() + layer.bias
    torch.testing.assert_close(plain, exact, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(dispatch, "has_e4m3", lambda _: True)
    monkeypatch.setattr(dispatch, "e4m3", lambda _: kernels)
    with torch.no_grad():
        assert not layer(x).any()
    assert kernels.calls == [(fused.PAIRS, 16, 32, False, False, "none")]
    assert layer(x.double()).any() and layer(x.requires_grad_()).any() and len(kernels.calls) == 1
    assert _layer("nf4:row", "fp8:row")(x.detach()).any() and len(kernels.calls) == 1


def test_torch_compile_takes_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer is one graph with one op; whether there is a kernel is not looked into."""
    monkeypatch.setattr(dispatch, "has_e4m3", lambda _: True)
    monkeypatch.setattr(dispatch, "e4m3", lambda _: None)
    layer, x = _layer("ovp4-int:row:minmax", "fp8:row"), torch.randn(3, 32)
    counters.clear()
    with torch.no_grad():
        found = torch.compile(layer, backend="eager", fullgraph=True)(x)
        assert found.equal(layer(x))
    assert counters["stats"]["unique_graphs"] == 1
