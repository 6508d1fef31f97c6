"""The operations against an independent float64 account of codes and scales, and under torch's own tracing tools."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from evenbits.errors import EvenbitsError
from evenbits.kernels import use_backend
from evenbits.kernels.ops import int8_matmul, linear_w8a8, quantize_rows

NAN, INF = float("nan"), float("inf")
UTILS = ("test_schema", "test_faketensor")


def _quantize(x_MK: np.ndarray, spelling: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zero points [M, 1] of float32 rows by numpy."""
    dtype, granularity, *options = spelling.split(":")
    bits = int(dtype[-1])
    top, bottom = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    axis = {"axis": 1, "keepdims": True} if granularity == "row" else {"keepdims": True}
    low, high = x_MK.min(**axis), x_MK.max(**axis)
    if "affine" in options:
        low, high = np.minimum(low, 0).astype(np.float64), np.maximum(high, 0).astype(np.float64)
        scale = ((high - low) / (top - bottom)).astype(np.float32)
        scale[scale == 0] = 1
        zero = np.clip(bottom - np.rint(low / scale.astype(np.float64)), bottom, top)
    else:
        levels = next((float(option) for option in options if option.endswith(".5")), top)
        bottom = bottom if options else -top
        scale = np.maximum(np.abs(low), np.abs(high)) / np.float32(levels)
        scale[scale == 0] = 1
        zero = np.zeros_like(scale, dtype=np.float64)
    codes = np.clip(np.rint(x_MK / scale) + zero, bottom, top)
    rows = (len(x_MK), 1)
    return codes, np.broadcast_to(scale, rows), np.broadcast_to(zero, rows)


def _linear(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, weight: torch.Tensor, weight_scale: torch.Tensor
) -> np.ndarray:
    """scale · weight_scale · Σ (code − zero) · weight in float64: no rounding that shows."""
    total = (codes - zero) @ weight.double().numpy().T
    return total * scale.astype(np.float64) * weight_scale.double().numpy().reshape(1, -1)


def _weight(out: int, columns: int, *, per_tensor: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = torch.randint(-127, 128, (out, columns), dtype=torch.int8)
    scale = torch.rand(1) if per_tensor else torch.rand(out, 1)
    return weight, scale * 0.01 + 1e-4, weight.sum(dim=1, dtype=torch.int32)


DYNAMIC = [
    "int8:row",
    "int8:tensor",
    "int8:row:127.5",
    "int8:row:affine",
    "int8:tensor:affine",
    "int4:row",
    "int4:row:7.5",
    "int6:row:affine",
]


@pytest.mark.parametrize("spelling", DYNAMIC)
@pytest.mark.parametrize("per_tensor_weight", [False, True])
@pytest.mark.parametrize("columns", [1, 7, 64, 1500])
def test_dynamic_linear_is_exact_to_the_last_rounding(spelling: str, per_tensor_weight: bool, columns: int) -> None:
    x = torch.randn(9, columns) * torch.logspace(-2, 2, 9).view(-1, 1) + 0.3
    weight, weight_scale, weight_sum = _weight(6, columns, per_tensor=per_tensor_weight)
    exact = _linear(*_quantize(x.numpy(), spelling), weight, weight_scale)
    y = linear_w8a8(x, weight, weight_scale, None, spelling, weight_sum=weight_sum)
    assert y.dtype == torch.float32
    # int32 → float32, scale · scale, product: three roundings of 2⁻²⁴ each.
    assert (np.abs(y.double().numpy() - exact) <= 3.01 * 2.0**-24 * np.abs(exact)).all()
    for backend in ("reference", "torch_fp32"):
        with use_backend(backend):
            assert linear_w8a8(x, weight, weight_scale, None, spelling, weight_sum=weight_sum).equal(y)


def test_bits_of_the_epilogue() -> None:
    """The same three float32 operations in numpy give the same bits."""
    x, (weight, weight_scale, _), bias = torch.randn(5, 33), _weight(4, 33), torch.randn(4)
    codes, scale, _ = _quantize(x.numpy(), "int8:row")
    product = (codes @ weight.double().numpy().T).astype(np.int32).astype(np.float32)
    expected = product * (scale * weight_scale.numpy().reshape(1, -1)) + bias.numpy()
    assert linear_w8a8(x, weight, weight_scale, bias, "int8:row").numpy().tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("spelling", "zero"),
    [("int8:tensor", None), ("int8:tensor:127.5", None), ("int8:tensor:affine", 37), ("int8:tensor:affine", -128)],
)
def test_static_scales_are_used_and_saturate(spelling: str, zero: int | None) -> None:
    x = torch.randn(8, 20) * 4
    weight, weight_scale, weight_sum = _weight(5, 20)
    scale = torch.tensor([0.03])
    zero_point = None if zero is None else torch.tensor([zero], dtype=torch.int32)
    bottom = -127 if spelling == "int8:tensor" else -128
    codes = np.clip(np.rint(x.numpy() / np.float32(0.03)) + (zero or 0), bottom, 127)
    assert (codes == 127).any()
    assert (codes == bottom).any()
    assert not ((codes == 127) | (codes == bottom)).all()
    exact = _linear(codes, np.full((8, 1), np.float32(0.03)), np.full((8, 1), float(zero or 0)), weight, weight_scale)
    y = linear_w8a8(x, weight, weight_scale, None, spelling, scale=scale, zero_point=zero_point, weight_sum=weight_sum)
    assert (np.abs(y.double().numpy() - exact) <= 3.01 * 2.0**-24 * np.abs(exact)).all()
    got, row_scale, row_zero = quantize_rows(x, spelling, scale=scale, zero_point=zero_point)
    assert got.tolist() == codes.tolist()
    assert row_scale.tolist() == [[float(np.float32(0.03))]] * 8
    assert row_zero.tolist() == [[zero or 0]] * 8


@pytest.mark.parametrize("spelling", DYNAMIC)
def test_quantize_rows(spelling: str) -> None:
    x = torch.randn(3, 4, 10) - 0.4
    codes, scale, zero = quantize_rows(x, spelling)
    expected = _quantize(x.view(12, 10).numpy(), spelling)
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.int8, torch.float32, torch.int32)
    assert codes.tolist() == expected[0].tolist()
    assert scale.tolist() == expected[1].tolist()
    assert zero.tolist() == expected[2].tolist()


def test_affine_spends_its_codes_on_one_sided_data() -> None:
    x, (weight, weight_scale, weight_sum) = torch.rand(16, 64) + 1, _weight(8, 64)
    exact = x.double() @ (weight.double() * weight_scale.double()).t()
    errors = {
        spelling: float(
            (linear_w8a8(x, weight, weight_scale, None, spelling, weight_sum=weight_sum) - exact).square().mean()
        )
        for spelling in ("int8:row", "int8:row:affine")
    }
    assert errors["int8:row:affine"] < errors["int8:row"] / 2  # a step half as wide


def test_affine_without_row_sums_is_refused() -> None:
    weight, weight_scale, _ = _weight(2, 3)
    with pytest.raises(EvenbitsError, match="affine activations need the row sums"):
        linear_w8a8(torch.randn(1, 3), weight, weight_scale, None, "int8:row:affine")


@pytest.mark.parametrize("scale", [None, torch.tensor([0.02])])
def test_multiplier_is_applied_first_in_float32(scale: torch.Tensor | None) -> None:
    spelling = "int8:row" if scale is None else "int8:tensor"
    x, multiplier = torch.randn(7, 12).half(), torch.rand(12) * 5
    weight, weight_scale, _ = _weight(4, 12)
    y = linear_w8a8(x.float() * multiplier, weight, weight_scale, None, spelling, scale=scale)
    got = linear_w8a8(x, weight, weight_scale, None, spelling, multiplier=multiplier, scale=scale)
    assert got.dtype == torch.float16
    assert got.equal(y.half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias_dtype", [None, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_in_and_out(dtype: torch.dtype, bias_dtype: torch.dtype | None) -> None:
    x = torch.randn(4, 16).to(dtype)
    weight, weight_scale, _ = _weight(3, 16)
    bias = None if bias_dtype is None else torch.randn(3).to(bias_dtype)
    y = linear_w8a8(x, weight, weight_scale, bias, "int8:row")
    plain = linear_w8a8(x.float(), weight, weight_scale, None, "int8:row")
    assert y.dtype == dtype
    assert y.equal((plain if bias is None else plain + bias).to(dtype))


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 8), (2, 1, 3, 8), (0, 8), (2, 0, 8)])
@pytest.mark.parametrize("spelling", ["int8:row", "int8:tensor", "int8:row:affine", "int8:tensor:affine"])
@pytest.mark.parametrize("static", [False, True])
def test_shapes(shape: tuple[int, ...], spelling: str, static: bool) -> None:
    x = torch.randn(shape)
    weight, weight_scale, weight_sum = _weight(5, 8)
    calibrated = {"scale": torch.tensor([0.05])} if static else {}
    if static and "affine" in spelling:
        calibrated["zero_point"] = torch.tensor([3], dtype=torch.int32)
    y = linear_w8a8(x, weight, weight_scale, torch.ones(5), spelling, weight_sum=weight_sum, **calibrated)
    assert y.shape == (*shape[:-1], 5)
    rows = x.reshape(-1, 8)
    flat = linear_w8a8(rows, weight, weight_scale, torch.ones(5), spelling, weight_sum=weight_sum, **calibrated)
    assert y.equal(flat.view(y.shape))


def test_layouts() -> None:
    base = torch.randn(8, 6, 8)
    weight, weight_scale, _ = _weight(5, 8)
    for view in (base.permute(2, 1, 0), base[:, ::2], base.transpose(0, 1), base[:1].expand(4, 6, 8)):
        y = linear_w8a8(view, weight, weight_scale, None, "int8:row")
        assert y.equal(linear_w8a8(view.contiguous(), weight, weight_scale, None, "int8:row"))
    narrow = torch.randint(-127, 128, (8, 5), dtype=torch.int8).t()
    assert linear_w8a8(base, narrow, weight_scale, None, "int8:row").equal(
        linear_w8a8(base, narrow.contiguous(), weight_scale, None, "int8:row")
    )


@pytest.mark.parametrize("spelling", ["int8:row", "int8:row:affine"])
def test_rows_do_not_see_each_other(spelling: str) -> None:
    x, (weight, weight_scale, weight_sum) = torch.randn(6, 20), _weight(4, 20)
    x[3] *= 1e6
    y = linear_w8a8(x, weight, weight_scale, None, spelling, weight_sum=weight_sum)
    for row in range(6):
        alone = linear_w8a8(x[row], weight, weight_scale, None, spelling, weight_sum=weight_sum)
        assert y[row].equal(alone)


@pytest.mark.parametrize(
    ("spelling", "scale", "zero"),
    [
        ("int8:row", None, None),
        ("int8:row:affine", None, None),
        ("int8:tensor", 0.1, None),
        ("int8:tensor:affine", 0.1, 5),
    ],
)
def test_nan_poisons_its_own_row_only(spelling: str, scale: float | None, zero: int | None) -> None:
    x, (weight, weight_scale, weight_sum) = torch.randn(4, 10), _weight(3, 10)
    calibrated = {
        "scale": None if scale is None else torch.tensor([scale]),
        "zero_point": None if zero is None else torch.tensor([zero], dtype=torch.int32),
        "weight_sum": weight_sum,
    }
    clean = linear_w8a8(x, weight, weight_scale, torch.ones(3), spelling, **calibrated)
    poisoned = x.clone()
    poisoned[2, 7] = NAN
    y = linear_w8a8(poisoned, weight, weight_scale, torch.ones(3), spelling, **calibrated)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].equal(clean[[0, 1, 3]])


def test_infinity_saturates_in_static() -> None:
    weight, weight_scale, _ = _weight(3, 4)
    x = torch.tensor([[INF, 1.0, -INF, 0.0]])
    y = linear_w8a8(x, weight, weight_scale, None, "int8:tensor", scale=torch.tensor([0.1]))
    limited = torch.tensor([[12.7, 1.0, -12.7, 0.0]])
    assert torch.isfinite(y).all()
    assert y.equal(linear_w8a8(limited, weight, weight_scale, None, "int8:tensor", scale=torch.tensor([0.1])))


def test_zeros_give_the_bias() -> None:
    weight, weight_scale, weight_sum = _weight(3, 4)
    bias = torch.randn(3)
    for spelling in DYNAMIC:
        y = linear_w8a8(torch.zeros(2, 4), weight, weight_scale, bias, spelling, weight_sum=weight_sum)
        assert y.equal(bias.expand(2, 3))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.ones(2, 3), torch.ones(4, 3, dtype=torch.int8)),
        (torch.ones(2, 3, dtype=torch.int8), torch.ones(4, 3, dtype=torch.uint8)),
        (torch.ones(2, 3, dtype=torch.int8), torch.ones(3, 4, dtype=torch.int8)),
        (torch.ones(3, dtype=torch.int8), torch.ones(3, dtype=torch.int8)),
        (torch.ones(2, 3, 4, dtype=torch.int8), torch.ones(5, 3, dtype=torch.int8)),
    ],
)
def test_int8_matmul_takes_two_int8_matrices(a: torch.Tensor, b: torch.Tensor) -> None:
    with pytest.raises(EvenbitsError, match=r"int8_matmul takes int8 \[M, K\] and int8 \[N, K\]; given"):
        int8_matmul(a, b)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_int8_matmul_of_nothing(m: int, n: int, k: int) -> None:
    product = int8_matmul(torch.ones(m, k, dtype=torch.int8), torch.ones(n, k, dtype=torch.int8))
    assert product.shape == (m, n)
    assert product.dtype == torch.int32
    assert not product.any()


SCALE, ZERO = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_opcheck_int8_matmul(rows: int) -> None:
    a, b, _ = torch.ones(rows, 7, dtype=torch.int8), *_weight(3, 7)[:2]
    torch.library.opcheck(torch.ops.evenbits.int8_matmul.default, (a, b), test_utils=UTILS)


@pytest.mark.parametrize("shape", [(1, 7), (5, 7), (2, 3, 7), (7,)])
@pytest.mark.parametrize(
    ("spelling", "scale", "zero"),
    [
        ("int8:row", None, None),
        ("int8:tensor:affine", None, None),
        ("int8:tensor", SCALE, None),
        ("int8:tensor:affine", SCALE, ZERO),
    ],
)
def test_opcheck_quantize_rows(
    shape: tuple[int, ...], spelling: str, scale: torch.Tensor | None, zero: torch.Tensor | None
) -> None:
    for multiplier in (None, torch.rand(7)):
        args = (torch.randn(shape), spelling, multiplier, scale, zero)
        torch.library.opcheck(torch.ops.evenbits.quantize_rows.default, args, test_utils=UTILS)


@pytest.mark.parametrize("shape", [(1, 7), (2, 3, 7), (7,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, weight_scale, weight_sum = _weight(4, 7)
    x = torch.randn(shape).to(dtype)
    for rest in (("int8:row", None, None, None, None), ("int8:tensor:affine", torch.rand(7), SCALE, ZERO, weight_sum)):
        args = (x, weight, weight_scale, torch.randn(4), *rest)
        torch.library.opcheck(torch.ops.evenbits.linear_w8a8.default, args, test_utils=UTILS)


def test_fake_tensors_know_shape_and_type_without_data() -> None:
    with FakeTensorMode():
        x, weight, scale = torch.empty(2, 5, 8).half(), torch.empty(3, 8, dtype=torch.int8), torch.empty(3, 1)
        y = linear_w8a8(x, weight, scale, None, "int8:row")
        codes, row_scale, zero = quantize_rows(x, "int8:row:affine")
        product = int8_matmul(codes, weight)
    assert (tuple(y.shape), y.dtype) == ((2, 5, 3), torch.float16)
    assert (tuple(codes.shape), codes.dtype, tuple(row_scale.shape), zero.dtype) == (
        (10, 8),
        torch.int8,
        (10, 1),
        torch.int32,
    )
    assert (tuple(product.shape), product.dtype) == ((10, 3), torch.int32)


def test_a_traced_graph_holds_one_op_and_computes_the_same() -> None:
    weight, weight_scale, _ = _weight(3, 8)
    graph = make_fx(lambda x: linear_w8a8(x, weight, weight_scale, None, "int8:row"))(torch.randn(2, 8))
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.evenbits.linear_w8a8.default]
    x = torch.randn(2, 8)
    assert graph(x).equal(linear_w8a8(x, weight, weight_scale, None, "int8:row"))


def test_inputs_are_left_alone() -> None:
    x, (weight, weight_scale, weight_sum) = torch.randn(3, 6), _weight(2, 6)
    given = [x, weight, weight_scale, weight_sum, SCALE, ZERO]
    before = [t.clone() for t in given]
    linear_w8a8(
        x, weight, weight_scale, None, "int8:tensor:affine", scale=SCALE, zero_point=ZERO, weight_sum=weight_sum
    )
    assert all(now.equal(then) for now, then in zip(given, before, strict=True))
    assert math.isclose(float(SCALE), 0.1, rel_tol=1e-6)


def test_an_infinite_value_poisons_its_row_when_the_scale_is_taken_from_it() -> None:
    x = torch.tensor([[1.0, torch.inf], [1.0, 2.0], [-torch.inf, 1.0]])
    y = linear_w8a8(x, torch.ones(3, 2, dtype=torch.int8), torch.ones(1), None, "int8:row")
    assert bool(y[0].isnan().all())
    assert bool(y[2].isnan().all())
    assert bool(y[1].isfinite().all())
    static = linear_w8a8(x, torch.ones(3, 2, dtype=torch.int8), torch.ones(1), None, "int8:tensor", scale=torch.ones(1))
    assert static[0].tolist() == [128.0] * 3


def test_sums_that_may_not_fit_int32_are_refused() -> None:
    wide = torch.zeros(1, 131_072, dtype=torch.int8)
    with pytest.raises(EvenbitsError, match="131071"):
        int8_matmul(wide, wide)
    assert int8_matmul(wide[:, 1:], wide[:, 1:]).item() == 0
