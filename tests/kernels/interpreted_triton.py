"""Triton's kernels in Triton's interpreter, on CPU tensors, through the public operations.

test_triton.py runs this file in a process of its own: TRITON_INTERPRET must be set before a kernel is defined. What it
shows is that the kernels compute what they should; not that a GPU's compiler makes the same of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evenbits.kernels import dispatch, report, use_backend
from evenbits.kernels.activations import ACTIVATIONS
from evenbits.kernels.ops import int8_matmul, linear_pair, linear_pair_float, linear_w8a8, quantize_rows
from evenbits.kernels.pair_codes import pair_codes
from evenbits.kernels.weight_only import served_by
from evenbits.numerics import ovp
from evenbits.numerics.encode import encode
from evenbits.numerics.qtensor import QTensor

assert os.environ.get("TRITON_INTERPRET") == "1", "run it through test_triton.py"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # numpy's, about NaN and infinity
NAN, INF = float("nan"), float("inf")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
INTEGER = ["int4:row", "int4:tensor", "flint4:row", "fp4:row", "pot4:row", "mxfp4", "nvfp4", "int4:g128", "int4:g24"]
INTEGER += ["ovp4-int:row", "ovp4-flint:row", "ovp4-flint_i8:row", "ovp4-int:g16", "ovp4-flint:g64", "ovp4-int:g256"]
INTEGER += ["flint4:g8", "int4:g1000", "ovp4-flint_i8:g40", "ovp4-flint:g32"]
FORMATS = [*INTEGER, "nf4:row", "nf4:g64"]
SHAPES = [(1, 1), (1, 300), (5, 2), (17, 65), (65, 257), (70, 600)]
QUANTIZED = ["int8:row", "int8:row:127.5", "int8:row:affine", "int5:row", "int4:row:affine", "int8:tensor"]
QUANTIZED += ["int6:tensor:affine", "int2:row"]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


@cache
def _weight(rows: int, columns: int, fmt: str) -> QTensor:
    generator = torch.Generator().manual_seed(rows * 7919 + columns)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    weight[torch.rand(rows, columns, generator=generator) < 0.05] *= 14
    return encode(weight, f"{fmt}:minmax" if fmt.startswith("ovp4") else fmt)


def _pair(x: torch.Tensor, q: QTensor, fmt: str = "int8:row", bias: torch.Tensor | None = None, **words: Any) -> Any:
    return linear_pair(x, q.packed, q.scale, q.format, bias, fmt, global_scale=q.global_scale, **words)


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and found.nan_to_num(nan=12345.0).equal(expected.nan_to_num(nan=12345.0))


def _rows(m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k) * 10.0 ** torch.randint(-3, 4, (m, 1))


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [*((fmt, torch.float32) for fmt in QUANTIZED), *(("int8:row", dtype) for dtype in (*FLOATS[1:], torch.float64))],
)
def test_codes_are_those_of_torch(fmt: str, dtype: torch.dtype) -> None:
    for m, k in ((1, 1), (5, 301), (1, 16500)):
        x, factors = _rows(m, k).to(dtype), torch.rand(k) + 0.5
        x[0, 0] = 0.0
        for words in ({}, {"multiplier": factors}, {"scale": torch.tensor([0.02]), "multiplier": factors}):
            if "scale" in words and "affine" in fmt:
                words["zero_point"] = torch.tensor([3], dtype=torch.int32)
            found = quantize_rows(x, fmt, **words)
            with use_backend("reference"):
                expected = quantize_rows(x, fmt, **words)
            assert all(map(_same, found, expected)), (m, k, words.keys())


@pytest.mark.parametrize("fmt", ["int8:row", "int8:row:affine", "int8:tensor"])
def test_broken_rows(fmt: str) -> None:
    x = torch.randn(6, 20)
    x[1, 3], x[2, 4], x[3, 5], x[4] = NAN, INF, -INF, 0.0
    zero = torch.tensor([-2], dtype=torch.int32) if "affine" in fmt else None
    for words in ({}, {"scale": torch.tensor([0.03]), "zero_point": zero}):
        found = quantize_rows(x, fmt, **words)
        with use_backend("reference"):
            assert all(map(_same, found, quantize_rows(x, fmt, **words)))
    weight = torch.randint(-127, 128, (3, 20), dtype=torch.int8)
    y = linear_w8a8(x, weight, torch.ones(3, 1), None, "int8:row")
    assert y.isnan().all(1).tolist() == [False, True, True, True, False, False]


def test_quantization_of_what_is_empty_or_strided() -> None:
    assert [len(part) for part in quantize_rows(torch.empty(0, 5), "int8:row")] == [0, 0, 0]
    wide = torch.randn(8, 254)
    for x in (wide[::2, ::2], wide[:, :9].t(), wide[:, 3:9]):
        assert all(map(torch.equal, quantize_rows(x, "int8:row"), quantize_rows(x.contiguous(), "int8:row")))


@pytest.mark.parametrize("m", [1, 16, 17, 130])
def test_products_of_int8_codes(m: int) -> None:
    for n, k in SHAPES:
        a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
        assert int8_matmul(a, b).tolist() == (a.long() @ b.long().t()).tolist()
    for left, right in ((-128, -128), (127, -128)):
        a, b = torch.full((m, 9000), left, dtype=torch.int8), torch.full((2, 9000), right, dtype=torch.int8)
        assert int8_matmul(a, b).tolist() == [[left * right * 9000] * 2] * m


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "rows"), [*((dtype, "0") for dtype in FLOATS), (torch.float16, "1")])
def test_int8_weights(monkeypatch: pytest.MonkeyPatch, activation: str, dtype: torch.dtype, rows: str) -> None:
    """To the bit, by one kernel and by torch's product between two."""
    monkeypatch.setenv("EVENBITS_INT_MM_ROWS", rows)
    weight, scale = torch.randint(-127, 128, (33, 130), dtype=torch.int8), torch.rand(33, 1) / 100
    x, bias, factors = (torch.randn(2, 3, 130) * 3).to(dtype), torch.randn(33).to(dtype), torch.rand(130) + 0.5
    total = weight.sum(1, dtype=torch.int32)
    for fmt in ("int8:row", "int8:row:affine"):
        for words in ({}, {"bias": bias, "multiplier": factors}):
            args = (x, weight, scale, words.get("bias"), fmt)
            more = {"multiplier": words.get("multiplier"), "weight_sum": total, "activation": activation}
            found = linear_w8a8(*args, **more)
            with use_backend("reference"):
                assert _same(found, linear_w8a8(*args, **more)), (fmt, words.keys())
    one = linear_w8a8(x, weight, torch.tensor([0.01]), bias, "int8:tensor")
    with use_backend("reference"):
        assert _same(one, linear_w8a8(x, weight, torch.tensor([0.01]), bias, "int8:tensor"))


@pytest.mark.parametrize(("m", "n", "k"), [(512, 3, 70), (129, 65, 300), (1, 1, 131071)])
def test_large_int8_layers(m: int, n: int, k: int) -> None:
    weight, scale, x = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n, 1), torch.randn(m, k)
    found = linear_w8a8(x, weight, scale, None, "int8:row")
    with use_backend("reference"):
        assert found.equal(linear_w8a8(x, weight, scale, None, "int8:row"))


@pytest.mark.parametrize("fmt", INTEGER)
def test_packed_weights(fmt: str) -> None:
    cases = [(3, 1, 1), (3, 5, 2), (17, 17, 65), (1, 70, 257)]
    for m, n, k in cases if ":g" in fmt or fmt.endswith("fp4") else [*cases, (2, 33, 600)]:
        q, x, bias = _weight(n, k, fmt), torch.randn(m, k), torch.randn(n)
        if pair_codes(q.format, k) is None:  # pairs of an odd width get groups that no kernel has
            continue
        found = _pair(x, q, bias=bias)
        with use_backend("reference"):
            assert found.equal(_pair(x, q, bias=bias)), (m, n, k)


@pytest.mark.parametrize(("m", "n", "k", "fmt"), [(512, 5, 66, "ovp4-flint:row"), (130, 65, 256, "int4:g128")])
def test_many_rows_of_packed_weights(m: int, n: int, k: int, fmt: str) -> None:
    q, x = _weight(n, k, fmt), torch.randn(m, k)
    found = _pair(x, q)
    with use_backend("reference"):
        assert found.equal(_pair(x, q))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("fmt", ["int4:row", "ovp4-flint:g64"])
def test_the_steps_around_packed_products(fmt: str, dtype: torch.dtype, activation: str) -> None:
    q, bias, factors = _weight(33, 130, fmt), torch.randn(33).to(dtype), torch.rand(130) + 0.5
    x = (torch.randn(2, 3, 130) * 3).to(dtype)
    affine = {"weight_sum": torch.randint(-500, 500, (33,), dtype=torch.int32)}
    for how, words in (("int8:row:127.5", {}), *((("int8:row:affine", affine),) if ":g" not in fmt else ())):
        more: dict[str, Any] = {"bias": bias, "multiplier": factors, "activation": activation, **words}
        found = _pair(x, q, how, **more)
        with use_backend("reference"):
            assert _same(found, _pair(x, q, how, **more))


@pytest.mark.parametrize("kind", ["int", "flint", "flint_i8"])
def test_every_byte_of_pairs(kind: str) -> None:
    """A row of each byte against inputs that pick one column; illegal bytes are zeros, as in the numerics."""
    values = ovp.decode_table(ovp.pair_kind(kind))
    packed = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    packed[1], packed[2] = packed[0].flip(0), packed[0].roll(77)
    scale, one = torch.ones(3, 1, dtype=torch.float16), torch.ones(1)
    y = linear_pair(torch.eye(512), packed, scale, f"ovp4-{kind}:row", None, "int8:tensor", scale=one)
    assert y.equal(values[packed.long()].reshape(3, 512).t())
    y = linear_pair_float(torch.eye(512).half(), packed, scale, f"ovp4-{kind}:row", None)
    assert y.float().equal(values[packed.long()].reshape(3, 512).t())


def test_a_group_is_added_in_order_and_rounded_each_time() -> None:
    """Three groups whose sum depends on the order: 2²⁴ + 1 − 2²⁴ is 0 from the left, and 1 the other way."""
    packed = torch.zeros(1, 24, dtype=torch.uint8)
    packed[0, 0] = packed[0, 8] = 1
    packed[0, 16] = 15  # −1
    x = torch.zeros(1, 48)
    x[:, [0, 16, 32]] = 1.0
    scale, one = torch.tensor([[2.0**24, 1.0, 2.0**24]]), torch.ones(1)
    assert linear_pair(x, packed, scale, "int4:g16", None, "int8:tensor", scale=one).item() == 0.0
    scale = torch.tensor([[2.0**24, 1.0, 2.0**23]])
    assert linear_pair(x, packed, scale, "int4:g16", None, "int8:tensor", scale=one).item() == 2.0**23


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_float_activations(fmt: str, dtype: torch.dtype) -> None:
    """As near the exact result as float32 sums are, and rounded once to the activations' type."""
    for m, n, k in ((1, 33, 600 if ":row" in fmt else 130), (17, 17, 65), (2, 1, 1)):
        q, x, bias = _weight(n, k, fmt), (torch.randn(m, k) * 2).to(dtype), torch.randn(n)
        found = linear_pair_float(x, q.packed, q.scale, q.format, bias, global_scale=q.global_scale)
        decoded = q.dequantize().double()
        exact = x.double() @ decoded.t() + bias.double()
        slack = (x.double().abs() @ decoded.abs().t() + bias.double().abs()) * (4 + k / 8) * 2.0**-24
        slack += 0 if dtype == torch.float32 else exact.abs() * torch.finfo(dtype).eps / 2 * 1.001
        assert found.dtype == dtype and ((found - exact).abs() <= slack).all(), (m, n, k)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_steps_around_a_float_product(activation: str) -> None:
    q, factors, bias = _weight(33, 128, "ovp4-int:row"), torch.rand(128) + 0.5, torch.randn(33)
    x = torch.randn(2, 3, 128).bfloat16()
    words: dict[str, Any] = {"multiplier": factors, "activation": activation, "global_scale": q.global_scale}
    found = linear_pair_float(x, q.packed, q.scale, q.format, bias, **words)
    with use_backend("reference"):
        expected = linear_pair_float(x, q.packed, q.scale, q.format, bias, **words)
    torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=1e-5)


def test_what_is_not_finite_stays_in_its_row() -> None:
    q, x = _weight(33, 127, "int4:row"), torch.randn(4, 127)
    x[1, 5], x[2, 7] = NAN, INF
    y = linear_pair_float(x, q.packed, q.scale, q.format, None)
    assert y[1].isnan().all() and y[[0, 3]].isfinite().all()
    y = _pair(x, q)
    assert y.isnan().all(1).tolist() == [False, True, True, False] and y[[0, 3]].isfinite().all()


def test_no_rows_and_strided_inputs() -> None:
    q, every = _weight(33, 127, "int4:row"), torch.randn(8, 254)
    assert _pair(torch.empty(0, 127), q).shape == (0, 33)
    assert linear_pair_float(torch.empty(0, 127), q.packed, q.scale, q.format, None).shape == (0, 33)
    for x in (every[::2, ::2], every[:, :127], torch.randn(127, 4).t()):
        assert _pair(x, q).equal(_pair(x.contiguous(), q))
        whole = linear_pair_float(x.contiguous(), q.packed, q.scale, q.format, None)
        assert linear_pair_float(x, q.packed, q.scale, q.format, None).equal(whole)


@settings(max_examples=10)
@given(data=st.data())
def test_any_layer(data: st.DataObject) -> None:
    m, n, k = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 9)) * 7, data.draw(st.integers(1, 20)) * 19
    fmt, how = data.draw(st.sampled_from(INTEGER)), data.draw(st.sampled_from(["int8:row", "int7:row:63.5"]))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    q, x = _weight(n, k, fmt), torch.randn(m, k)
    if pair_codes(q.format, k) is not None:
        found = _pair(x, q, how)
        with use_backend("reference"):
            assert found.equal(_pair(x, q, how))


def test_who_serves_is_said() -> None:
    assert dispatch.backend("cpu") == "triton" and served_by("cpu") == "triton"
    assert dispatch.choice("cpu").reason.startswith(
        "forced by use_backend; int8 weights too, from 1024 rows on by torch"
    )
    assert report()[0].backend == "triton"
    assert dispatch._cuda().backend == "triton" and "interpreter" in dispatch._cuda().reason


def test_what_the_kernels_do_not_take_runs_by_torch() -> None:
    """Unsigned codes, a free zero point, a float64 bias: torch's steps around Triton's product, or none of it."""
    x, weight, scale = torch.rand(5, 64), torch.randint(-127, 128, (9, 64), dtype=torch.int8), torch.rand(9, 1)
    total = weight.sum(1, dtype=torch.int32)
    for args in (
        (x, weight, scale, torch.randn(9).double(), "int8:row"),
        (x, weight, scale, None, "int8:row:affine:free"),
    ):
        found = linear_w8a8(*args, weight_sum=total)
        with use_backend("reference"):
            assert found.equal(linear_w8a8(*args, weight_sum=total))


def test_a_model_of_quantized_layers() -> None:
    import evenbits

    for scheme in ("W8A8", "W4A16", "W4A8_OVP", "W4A16_OVP"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32))
        x = torch.randn(5, 64)
        evenbits.quantize(model, scheme=scheme, data=[x])
        found = model(x)
        with use_backend("reference"):
            torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)


def test_torch_sees_through() -> None:
    q, x, bias = _weight(17, 65, "ovp4-int:row"), torch.randn(2, 3, 65), torch.randn(17)
    args = (x, q.packed, q.scale, q.global_scale, str(q.format), bias)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.evenbits.linear_pair_float, (*args, None, "relu"), test_utils=utils)
    rows = ("int8:row", None, None, None, None, "silu")
    torch.library.opcheck(torch.ops.evenbits.linear_pair, (*args, *rows), test_utils=utils)
