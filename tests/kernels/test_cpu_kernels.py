"""Every variant of the C kernels that this processor runs, against the exact reference: the same bits in any shape.

`make sanitize` runs this file on a library with address and undefined-behaviour checks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.kernels import use_backend
from evenbits.kernels.activations import ACTIVATIONS, apply_activation
from evenbits.kernels.cpu import loader
from evenbits.kernels.ops import int8_matmul, linear_pair, linear_w8a8, quantize_rows
from evenbits.kernels.pair_codes import pair_codes
from evenbits.kernels.reference import int8_matmul as exact
from evenbits.numerics import ovp
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor

LIBRARY = loader.status().library
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=loader.status().reason)
VARIANTS = [] if LIBRARY is None else list(LIBRARY.variants)
NAN, INF = float("nan"), float("inf")
UTILS = ("test_schema", "test_faketensor")
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 31, 33, 64, 65, 130]
SHAPES = [(1, 1), (1, 300), (3, 7), (5, 2), (16, 64), (17, 65), (33, 127), (63, 129), (64, 128), (65, 257), (70, 600)]
PACKED = ["int4:row", "int4:tensor", "flint4:row", "fp4:row", "pot4:row", "ovp4-int:row", "ovp4-flint:row"]
PACKED += ["ovp4-flint_i8:row", "ovp4-int:g16", "int4:g32", "ovp4-flint:g64", "int4:g128", "ovp4-int:g256", "int4:g24"]
PACKED += ["ovp4-flint_i8:g40", "mxfp4", "nvfp4", "int4:g1000", "ovp4-flint:g32", "flint4:g8"]


@pytest.fixture(params=VARIANTS, autouse=True)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    with loader.use_variant(request.param):
        yield request.param


def _codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@cache  # searching scales takes longer than all products with them
def _weight(rows: int, columns: int, fmt: str) -> QTensor:
    weight = torch.randn(rows, columns) * 0.1
    weight[torch.rand(rows, columns) < 0.05] *= 14  # outliers of every size
    return encode(weight, fmt)


def _pair(x: torch.Tensor, q: QTensor, fmt: str = "int8:row", **kwargs: object) -> torch.Tensor:
    bias = kwargs.pop("bias", None)
    return linear_pair(x, q.packed, q.scale, q.format, bias, fmt, global_scale=q.global_scale, **kwargs)


def _same(y: torch.Tensor, expected: torch.Tensor) -> bool:
    return y.dtype == expected.dtype and torch.equal(y.nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0))


@pytest.mark.parametrize("m", ROWS)
def test_products_of_int8_codes(m: int) -> None:
    for n, k in SHAPES:
        a, b = _codes(m, k), _codes(n, k)
        assert int8_matmul(a, b).equal(exact(a, b)), (m, n, k)


@pytest.mark.parametrize(("m", "n", "k"), [(512, 130, 70), (300, 65, 1100), (7, 3, 9000), (1, 1, 131071), (257, 1, 64)])
def test_large_products_of_int8_codes(m: int, n: int, k: int) -> None:
    a, b = _codes(m, k), _codes(n, k)
    assert int8_matmul(a, b).equal(exact(a, b))


@pytest.mark.parametrize(("left", "right"), [(127, 127), (-127, 127), (-128, -128), (-128, 127), (127, -128)])
def test_worst_case_codes_neither_saturate_nor_overflow(left: int, right: int) -> None:
    for m, k in ((1, 131071), (9, 131071), (2, 1025), (12, 64)):
        a, b = torch.full((m, k), left, dtype=torch.int8), torch.full((2, k), right, dtype=torch.int8)
        assert int8_matmul(a, b).tolist() == [[left * right * k] * 2] * m


@given(data=st.data())
def test_any_small_product(data: st.DataObject) -> None:
    m, n, k = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=generator) for rows in (m, n))
    assert int8_matmul(a, b).equal(exact(a, b))


@pytest.mark.parametrize("kind", ["int", "flint", "flint_i8"])
@pytest.mark.parametrize("m", [1, 3, 8, 40])
def test_every_byte_of_pairs(kind: str, m: int) -> None:
    """A row of each byte against inputs that pick one column; illegal bytes are zeros, as in the numerics."""
    table = ovp.decode_table(ovp.pair_kind(kind))
    packed = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    packed[1], packed[2] = packed[0].flip(0), packed[0].roll(77)
    scale, one = torch.ones(3, 1, dtype=torch.float16), torch.ones(1)
    picks = torch.eye(512)
    for start in range(0, 512, m):
        x = picks[start : start + m]
        y = linear_pair(x, packed, scale, f"ovp4-{kind}:row", None, "int8:tensor", scale=one)
        assert y.equal(table[packed.long()].reshape(3, 512)[:, start : start + m].t())


@pytest.mark.parametrize("fmt", PACKED)
def test_packed_weights(fmt: str) -> None:
    for m in (1, 2, 4, 5, 8, 9, 70):
        for n, k in ((1, 1), (3, 7), (17, 65), (65, 257), (70, 600), (4, 1000)):
            q, x, bias = _weight(n, k, fmt), torch.randn(m, k), torch.randn(n)
            if pair_codes(q.format, k) is None:  # pairs of an odd width get groups that no kernel has
                continue
            y = _pair(x, q, bias=bias)
            with use_backend("reference"):
                assert y.equal(_pair(x, q, bias=bias)), (fmt, m, n, k)


@given(data=st.data())
def test_any_packed_weight(data: st.DataObject) -> None:
    m, n, k = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 400))
    fmt, activation = data.draw(st.sampled_from(PACKED)), data.draw(st.sampled_from(["int8:row", "int8:row:127.5"]))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    q, x = _weight(n // 10 * 10 + 1, k // 20 * 20 + 3, fmt), torch.randn(m, k // 20 * 20 + 3)
    if pair_codes(q.format, x.shape[1]) is not None:
        y = _pair(x, q, activation)
        with use_backend("reference"):
            assert y.equal(_pair(x, q, activation))


def test_a_group_is_added_in_order_and_rounded_each_time() -> None:
    """Three groups whose sum depends on the order: 2²⁴ + 1 − 2²⁴ is 0 from the left, and 1 the other way."""
    for m in (1, 12):
        packed = torch.zeros(1, 24, dtype=torch.uint8)
        packed[0, 0] = packed[0, 8] = 1
        packed[0, 16] = 15  # −1
        x = torch.zeros(m, 48)
        x[:, [0, 16, 32]] = 1.0
        scale = torch.tensor([[2.0**14, 2.0**-10, 2.0**14]], dtype=torch.float16)
        factor = torch.tensor([2.0**10])
        y = linear_pair(x, packed, scale, "int4:g16", None, "int8:tensor", global_scale=factor, scale=torch.ones(1))
        assert y.tolist() == [[0.0]] * m


ROW_FORMATS = ["int8:row", "int8:row:127.5", "int8:row:affine", "int8:tensor", "int8:tensor:affine", "int4:row"]
ROW_FORMATS += ["int4:row:7.5", "int6:row:affine", "int8:row:affine:free", "int2:row"]


def _hard_rows(columns: int) -> torch.Tensor:
    """Rows of ties, zeros, subnormals, huge, one-sided and broken numbers."""
    ties = (torch.arange(columns) % 255 - 127).float() + 0.5
    rows = [
        torch.randn(columns),
        ties,
        ties * 1e-3,
        torch.zeros(columns),
        torch.rand(columns) + 3,
        -torch.rand(columns),
    ]
    rows += [torch.randn(columns) * scale for scale in (1e-44, 1e-38, 1e-30, 1e30, 1e37)]
    rows += [torch.full((columns,), 3.4e38), torch.full((columns,), -1e-45)]
    for broken in (NAN, INF, -INF, -NAN):
        row = torch.randn(columns)
        row[columns // 2] = broken
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("fmt", ROW_FORMATS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("columns", [1, 5, 64, 700])
def test_codes_are_those_of_torch_bit_for_bit(fmt: str, static: bool, columns: int) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        x = _hard_rows(columns).to(dtype)
        multiplier = torch.rand(columns) * 2
        fixed = {"scale": torch.tensor([0.037])} if static else {}
        if static and "affine" in fmt:
            fixed["zero_point"] = torch.tensor([-1], dtype=torch.int32)
        for kwargs in (fixed, {**fixed, "multiplier": multiplier}):
            codes, scale, zero = quantize_rows(x, fmt, **kwargs)
            with use_backend("reference"):
                expected = quantize_rows(x, fmt, **kwargs)
            assert _same(scale, expected[1])
            whole = scale[:, 0].isfinite()  # a tensor with a broken row has no scale at all, and no codes
            assert codes[whole].equal(expected[0][whole])
            assert zero[whole].equal(expected[2][whole])


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), affine=st.booleans(), static=st.booleans())
def test_codes_of_any_float(bits: list[int], affine: bool, static: bool) -> None:
    x = torch.tensor([b - 2**32 if b >= 2**31 else b for b in bits], dtype=torch.int32).view(torch.float32).view(1, -1)
    fmt, kwargs = "int8:row:affine" if affine else "int8:row", {"scale": torch.tensor([0.5])} if static else {}
    codes, scale, zero = quantize_rows(x, fmt, **kwargs)
    with use_backend("reference"):
        expected = quantize_rows(x, fmt, **kwargs)
    assert _same(scale, expected[1])
    assert codes.equal(expected[0]) and zero.equal(expected[2])


@pytest.mark.parametrize("scale", [1e-42, 2.0**-126, 1e-20, 3e38, 0.0, -0.5])
def test_codes_with_extreme_calibrated_scales(scale: float) -> None:
    x = torch.tensor([[1.0, -1.0, 1e-40, 3e38, 0.3, -2e38, 1e-44]])
    codes, _, _ = quantize_rows(x, "int8:tensor", scale=torch.tensor([scale]))
    with use_backend("reference"):
        expected, _, _ = quantize_rows(x, "int8:tensor", scale=torch.tensor([scale]))
    assert codes.equal(expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("fmt", ROW_FORMATS)
def test_int8_linear_layers(fmt: str, activation: str) -> None:
    for m, n, k in ((1, 5, 33), (4, 70, 129), (9, 65, 64), (40, 3, 600)):
        x, weight, bias = torch.randn(m, k), _codes(n, k), torch.randn(n)
        kwargs = {"weight_sum": weight.sum(1, dtype=torch.int32), "activation": activation}
        for scale in (torch.rand(n, 1) * 0.01, torch.rand(1) * 0.01):
            y = linear_w8a8(x, weight, scale, bias, fmt, **kwargs)
            with use_backend("reference"):
                assert y.equal(linear_w8a8(x, weight, scale, bias, fmt, **kwargs)), (m, n, k)


@pytest.mark.parametrize("m", [17, 32, 33, 48, 255, 256, 257, 300, 512])
def test_many_rows_and_blocks_of_them(m: int) -> None:
    """Rows are quantized 256 at a time: scales and zero points of later blocks are their own."""
    for n, k in ((33, 70), (65, 2048), (64, 2176)):
        x, bias, multiplier = torch.randn(m, k) * torch.logspace(-2, 2, m).view(-1, 1), torch.randn(n), torch.rand(k)
        weight, scale = _codes(n, k), torch.rand(n, 1) * 0.01
        sums = weight.sum(1, dtype=torch.int32)
        static = {"scale": torch.tensor([0.03]), "zero_point": torch.tensor([-5], dtype=torch.int32)}
        for fmt, words in (("int8:row", {}), ("int8:row:affine", {}), ("int8:tensor:affine", static)):
            words = {**words, "multiplier": multiplier, "weight_sum": sums, "activation": "relu"}
            y = linear_w8a8(x, weight, scale, bias, fmt, **words)
            with use_backend("torch_int_mm"):
                assert y.equal(linear_w8a8(x, weight, scale, bias, fmt, **words)), (n, k, fmt)
    for stored in ("int4:row", "ovp4-flint:row", "ovp4-int:g128"):
        q = _weight(33, 300, stored)
        x = torch.randn(m, 300)
        y = _pair(x, q)
        with use_backend("torch_int_mm"):
            assert y.equal(_pair(x, q)), stored


@pytest.mark.parametrize("backend", ["torch_int_mm", "torch_fp32"])
def test_packed_weights_by_torch(backend: str) -> None:
    for fmt in ("int4:row", "fp4:row", "ovp4-flint:row", "ovp4-int:g16", "mxfp4", "nvfp4"):
        q, x, bias = _weight(17, 65, fmt), torch.randn(5, 65), torch.randn(17)
        y = _pair(x, q, bias=bias)
        with use_backend(backend):
            assert y.equal(_pair(x, q, bias=bias)), fmt


@pytest.mark.parametrize("fmt", ["int8:row:affine", "int8:tensor:affine"])
def test_affine_activations_and_packed_weights(fmt: str) -> None:
    for weight in ("ovp4-flint:row", "int4:row", "fp4:row"):
        q, x = _weight(19, 90, weight), torch.rand(7, 90) + 1
        unit = pair_codes(q.format, 90).unit  # type: ignore[union-attr]
        weight_sum = (q.values() / unit).sum(1).to(torch.int32)
        y = _pair(x, q, fmt, weight_sum=weight_sum)
        with use_backend("reference"):
            assert y.equal(_pair(x, q, fmt, weight_sum=weight_sum))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype: torch.dtype, bias_dtype: torch.dtype | None) -> None:
    q, int8, scale = _weight(21, 70, "ovp4-int:g32"), _codes(21, 70), torch.rand(21, 1)
    for m in (1, 6, 20):
        x = (torch.randn(m, 70) * torch.logspace(-9, 4, m).view(-1, 1)).to(dtype)
        bias = None if bias_dtype is None else torch.randn(21).to(bias_dtype)
        for activation in ("none", "gelu"):
            y, z = (
                _pair(x, q, bias=bias, activation=activation),
                linear_w8a8(x, int8, scale, bias, "int8:row", activation=activation),
            )
            assert y.dtype == z.dtype == dtype
            with use_backend("reference"):
                assert _same(y, _pair(x, q, bias=bias, activation=activation))
                assert _same(z, linear_w8a8(x, int8, scale, bias, "int8:row", activation=activation))


def test_broken_rows_come_out_as_nan_and_spoil_no_other() -> None:
    q, weight = _weight(9, 50, "ovp4-flint:g16"), _codes(9, 50)
    x = torch.randn(8, 50)
    clean = _pair(x, q), linear_w8a8(x, weight, torch.ones(9, 1), None, "int8:row")
    for broken in (NAN, INF, -INF):
        poisoned = x.clone()
        poisoned[3, 7] = broken
        y, z = _pair(poisoned, q), linear_w8a8(poisoned, weight, torch.ones(9, 1), None, "int8:row")
        keep = [0, 1, 2, 4, 5, 6, 7]
        assert y[3].isnan().all() and z[3].isnan().all()
        assert y[keep].equal(clean[0][keep]) and z[keep].equal(clean[1][keep])


def test_layouts_and_empty_inputs() -> None:
    q, weight, base = _weight(9, 8, "int4:row"), _codes(9, 8), torch.randn(8, 6, 8)
    for x in (base.permute(2, 1, 0), base[:, ::2], base.transpose(0, 1), base[:1].expand(4, 6, 8), base[0, 0]):
        assert _pair(x, q).equal(_pair(x.contiguous(), q))
        assert quantize_rows(x, "int8:row")[0].equal(quantize_rows(x.contiguous(), "int8:row")[0])
    for shape in ((0, 8), (2, 0, 8)):
        assert _pair(torch.randn(shape), q).shape == (*shape[:-1], 9)
        assert linear_w8a8(torch.randn(shape), weight, torch.ones(9, 1), None, "int8:row").shape == (*shape[:-1], 9)
    wide = torch.randn(5, 40)[:, 3:11]
    assert _pair(wide, q).equal(_pair(wide.contiguous(), q))


def test_threads_do_not_change_a_bit() -> None:
    assert LIBRARY is not None
    assert LIBRARY.threads or sys.platform != "linux"  # else three calls in one thread would be compared
    before = torch.get_num_threads()
    for fmt in ("ovp4-flint:row", "int4:g32"):
        q, bias = _weight(700, 260, fmt), torch.randn(700)
        for m in (1, 5, 70):
            x, results = torch.randn(m, 260), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(_pair(x, q, bias=bias, activation="silu"))
            torch.set_num_threads(before)
            assert results[0].equal(results[1]) and results[0].equal(results[2])


@pytest.mark.parametrize("shape", [(1, 48), (2, 3, 48), (48,)])
@pytest.mark.parametrize("fmt", ["ovp4-int:row", "ovp4-flint:g64", "mxfp4", "nvfp4"])
def test_opcheck(shape: tuple[int, ...], fmt: str) -> None:
    q = _weight(5, 48, fmt)
    args = (torch.randn(shape), q.packed, q.scale, q.global_scale, str(q.format), torch.randn(5), "int8:row")
    args += (torch.rand(48), None, None, None, "relu")
    # The schema test multiplies every argument by zero, which torch cannot do with E4M3 scales.
    utils = UTILS[1:] if q.scale.dtype == torch.float8_e4m3fn else UTILS
    torch.library.opcheck(torch.ops.evenbits.linear_pair.default, args, test_utils=utils)


@pytest.mark.parametrize("fmt", ["nf4:row", "int4:g4", "uint4:row:affine", "ovp8:row", "int3:row", "ovp4-mix:g16"])
def test_formats_that_are_no_integers_are_refused(fmt: str) -> None:
    with pytest.raises(EvenbitsError, match="linear_pair takes 4-bit weights of integer values"):
        packed = torch.zeros(3, 32, dtype=torch.uint8)
        linear_pair(torch.randn(2, 64), packed, torch.ones(3, 1), fmt, None, "int8:row")


def test_what_does_not_fit_is_refused() -> None:
    q = _weight(3, 64, "int4:row")
    with pytest.raises(EvenbitsError, match="66 columns of int4:row take uint8 rows of 33 bytes; given"):
        _pair(torch.randn(2, 66), q)
    with pytest.raises(EvenbitsError, match="unknown activation function 'tanh'"):
        _pair(torch.randn(2, 64), q, activation="tanh")
    with pytest.raises(EvenbitsError, match="affine activations need the row sums"):
        _pair(torch.randn(2, 64), q, "int8:row:affine")
    with pytest.raises(EvenbitsError, match="groups: symmetric activations"):
        _pair(torch.randn(2, 64), _weight(3, 64, "int4:g32"), "int8:row:affine", weight_sum=torch.ones(3))
    with pytest.raises(EvenbitsError, match=r"int8_matmul takes int8 \[M, K\] and int8 \[N, K\]"):
        linear_w8a8(torch.randn(2, 63), _codes(3, 64), torch.ones(3, 1), None, "int8:row")


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "none"])
def test_activation_functions_are_close_to_the_exact_ones(name: str) -> None:
    x = torch.cat([torch.linspace(-30, 30, 100001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e4, -3e4])])
    exact_ones = {
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
    }
    y = apply_activation(x, name).double()
    expected = exact_ones[name](x.double())
    assert ((y - expected).abs() <= 3e-7 * x.double().abs().clamp(min=1)).all()


def test_formats_parse_once_and_share_tables() -> None:
    assert pair_codes(Format.parse("ovp4-int:row"), 64) is pair_codes(Format.parse("ovp4-int:row"), 64)
