"""Packed 4-bit weights and float activations: every variant of the C kernels to the bit, every backend to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.kernels import use_backend
from evenbits.kernels.activations import ACTIVATIONS, apply_activation
from evenbits.kernels.cpu import loader
from evenbits.kernels.ops import linear_pair_float
from evenbits.kernels.pair_codes import float_codes
from evenbits.kernels.reference import float_product, fused_multiply_add
from evenbits.kernels.weight_only import served_by
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor

LIBRARY = loader.status().library
VARIANTS = [] if LIBRARY is None else list(LIBRARY.variants)
FORMATS = ["int4:row", "int4:tensor", "flint4:row", "fp4:row", "pot4:row", "nf4:row", "mxfp4", "nvfp4", "int4:g128"]
FORMATS += ["ovp4-int:row", "ovp4-flint:row", "ovp4-flint_i8:row", "ovp4-int:g16", "ovp4-flint:g64", "nf4:g64"]
FORMATS += ["int4:g24", "flint4:g8", "int4:g1000", "ovp4-int:g40"]
SHAPES = [(1, 1), (1, 300), (3, 7), (5, 2), (16, 64), (17, 65), (33, 127), (63, 129), (65, 257), (31, 1030)]
NAN = float("nan")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    with loader.use_variant(request.param):
        yield request.param


@cache  # searching scales takes longer than all products with them
def _weight(rows: int, columns: int, fmt: str) -> QTensor:
    generator = torch.Generator().manual_seed(rows * 7919 + columns)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    weight[torch.rand(rows, columns, generator=generator) < 0.05] *= 14
    return encode(weight, f"{fmt}:minmax" if fmt.startswith("ovp4") else fmt)


def _run(x: torch.Tensor, q: QTensor, bias: torch.Tensor | None = None, **words: Any) -> torch.Tensor:
    return linear_pair_float(x, q.packed, q.scale, q.format, bias, global_scale=q.global_scale, **words)


def _by_hand(x: torch.Tensor, q: QTensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact result and how far float32 sums may be from it."""
    decoded = q.dequantize().double()
    exact, size = x.double() @ decoded.t(), x.double().abs() @ decoded.abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    return exact, size * (4 + x.shape[-1] / 8) * 2.0**-24


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_variant_is_the_reference_to_the_bit(variant: str, fmt: str) -> None:
    for n, k in SHAPES:
        q = _weight(n, k, fmt)
        for m in (1, 3, 9):
            x = torch.randn(m, k)
            expected = float_product(x, q.dequantize())
            assert _run(x, q).equal(expected), (m, n, k)


@pytest.mark.parametrize("m", [1, 2, 4, 5, 8, 13, 32, 127, 128, 129, 300, 512])
def test_rows_do_not_depend_on_their_number_nor_on_threads(variant: str, m: int) -> None:
    q = _weight(70, 600, "int4:g128")
    x, bias = torch.randn(m, 600), torch.randn(70)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(_run(x, q, bias))
    finally:
        torch.set_num_threads(before)
    alone = torch.cat([_run(x[i : i + 1], q, bias) for i in range(m)])
    assert found[0].equal(found[1])
    assert found[0].equal(alone)
    exact, slack = _by_hand(x, q, bias)
    assert ((found[0] - exact).abs() <= slack).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_steps_around_the_product(variant: str, activation: str, dtype: torch.dtype) -> None:
    q, factors = _weight(33, 127, "nf4:g64"), torch.rand(127) + 0.5
    x, bias = torch.randn(2, 3, 127).to(dtype), torch.randn(33).to(dtype)
    y = _run(x, q, bias, multiplier=factors, activation=activation)
    sums = float_product((x.float() * factors).view(6, 127), q.dequantize()) + bias.float()
    expected = apply_activation(sums, activation).view(2, 3, 33)
    assert y.dtype == dtype and y.shape == (2, 3, 33)
    if activation in ("none", "relu"):
        assert y.equal(expected.to(dtype))
    tolerance = max(4e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["torch_int_mm", "torch_fp32", "reference"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_other_backend_is_near(backend: str, fmt: str) -> None:
    """These decode a panel of rows at a time."""
    q = _weight(17, 65, fmt)
    x, bias = torch.randn(5, 65), torch.randn(17)
    with use_backend(backend):
        y = _run(x, q, bias)
        assert served_by("cpu") == ("reference" if backend == "reference" else "torch float32, decoded in panels")
    exact, slack = _by_hand(x, q, bias)
    assert ((y - exact).abs() <= slack).all()


def test_panels_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    from evenbits.kernels import weight_only

    q, x = _weight(63, 129, "int4:row"), torch.randn(4, 129)
    with use_backend("reference"):
        whole = _run(x, q)
        monkeypatch.setattr(weight_only, "_PANEL", 129 * 5)
        assert _run(x, q).equal(whole)


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 20), st.sampled_from(FORMATS), st.integers(0, 9))
def test_any_shape(n: int, k: int, m: int, fmt: str, seed: int) -> None:
    q = _weight(n, k, fmt)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 4)
    exact, slack = _by_hand(x, q)
    assert ((_run(x, q) - exact).abs() <= slack).all()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
def test_one_rounding(numbers: list[float]) -> None:
    """The reference's a · b + c against exact fractions."""
    from fractions import Fraction

    a, b, c = (torch.tensor([v]) for v in numbers)
    exact = Fraction(numbers[0]) * Fraction(numbers[1]) + Fraction(numbers[2])
    if not 2.0**-100 < abs(exact) < 2.0**120:
        return  # subnormal and infinite results are not what weights make
    found = Fraction(float(fused_multiply_add(a, b, c)))
    mantissa = 2.0 ** (torch.frexp(torch.tensor(float(exact)))[1].item() - 24)
    assert abs(found - exact) <= Fraction(mantissa) / 2


def test_what_is_not_finite_stays_in_its_row(variant: str) -> None:
    q, x = _weight(33, 127, "int4:row"), torch.randn(4, 127)
    x[1, 5], x[2, 7] = NAN, float("inf")
    y = _run(x, q)
    assert y[1].isnan().all()
    assert y[[0, 3]].isfinite().all()
    met = q.dequantize()[:, 7]  # infinity times zero is NaN, times anything else infinity
    assert met.count_nonzero() not in (0, 33)
    assert y[2].isnan().equal(met == 0) and y[2].isinf().equal(met != 0)


def test_no_rows_and_strided_inputs(variant: str) -> None:
    q = _weight(33, 127, "int4:row")
    assert _run(torch.empty(0, 127), q).shape == (0, 33)
    wide = torch.randn(127, 4)
    assert _run(wide.t(), q).equal(_run(wide.t().contiguous(), q))
    every = torch.randn(8, 254)
    assert _run(every[::2, ::2], q).equal(_run(every[::2, ::2].contiguous(), q))


def test_torch_sees_through() -> None:
    q, x, bias = _weight(17, 65, "int4:row"), torch.randn(2, 3, 65), torch.randn(17)
    args = (x, q.packed, q.scale, q.global_scale, str(q.format), bias, None, "relu")
    torch.library.opcheck(torch.ops.evenbits.linear_pair_float, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"x": torch.zeros(2, 65, dtype=torch.int8)}, "activations are floating-point, .* given torch.int8"),
        ({"x": torch.zeros(2, 64)}, "64 columns of"),
        ({"fmt": "uint4:row:affine"}, "zero points"),
        ({"fmt": "int8:row"}, "8-bit weights"),
        ({"fmt": "int4:g12"}, "not by rows or groups"),
        ({"weight": torch.zeros(17, 9, dtype=torch.uint8)}, "take uint8 rows of 33 bytes"),
        ({"scale": torch.ones(16, 1)}, "weight_scale is 17 numbers of"),
        ({"multiplier": torch.ones(64)}, "multiplier is 65 numbers of"),
        ({"activation": "tanh"}, "tanh"),
    ],
)
def test_what_does_not_fit_is_refused(words: dict[str, Any], says: str) -> None:
    q = _weight(17, 65, "int4:row")
    with pytest.raises(EvenbitsError, match=says):
        linear_pair_float(
            words.get("x", torch.zeros(2, 65)),
            words.get("weight", q.packed),
            words.get("scale", q.scale),
            words.get("fmt", q.format),
            None,
            multiplier=words.get("multiplier"),
            activation=words.get("activation", "none"),
        )


def test_a_format_says_why_it_cannot_be_multiplied_from_its_bytes() -> None:
    assert float_codes(Format.parse("ovp4-mix:g16"), 64) == "pairs whose kind changes from group to group"
    assert float_codes(Format.parse("int3:row"), 64) == "3-bit weights"
