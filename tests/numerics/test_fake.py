"""Activations on their way into a layer: what encoding and decoding would make of them."""

from __future__ import annotations

import pytest
import torch

from evenbits.numerics.encode import encode
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.format import Format

DYNAMIC = ["int8:row", "int4:row", "int8:tensor", "uint8:row:affine", "int4:g4", "int8:row:mse", "int8:tensor:p99"]
DYNAMIC += ["flint4:row", "pot4:tensor", "fp4:g16", "nf4:row", "fp8:row", "mxfp4", "nvfp4", "ant4:row"]
DYNAMIC += ["ovp4:row", "ovp4:row:paper", "ovp4-int:tensor:reference", "ovp4:g16", "ovp4-mix:g16", "ovp8:row"]
STATIC = ["int8:tensor", "int4:tensor", "int8:tensor:127.5", "flint4:tensor", "fp4:tensor", "nf4:tensor", "fp8:tensor"]
STATIC += [
    "ovp4-int:tensor",
    "ovp4-flint:tensor",
    "ovp4-flint_i8:tensor:paper",
    "ovp4-int:tensor:reference",
    "ovp8:tensor",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spelling", DYNAMIC)
def test_dynamic_is_encoded_and_decoded(spelling: str, dtype: torch.dtype) -> None:
    fmt = Format.parse(spelling)
    for shape in ((3, 32), (2, 3, 17), (9,), (4, 1)):
        x = (torch.randn(shape) * torch.exp(torch.randn(shape))).to(dtype)
        y = fake_quantize(x, fmt)
        assert y.shape == x.shape
        assert y.dtype == dtype
        rows = x.reshape(-1, x.shape[-1])
        if fmt.granularity.kind != "tensor":  # each row by itself
            expected = torch.cat([encode(row[None], fmt).dequantize() for row in rows]).view(x.shape)
        else:
            expected = encode(x, fmt).dequantize()
        assert y.equal(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spelling", [s for s in DYNAMIC if s != "uint8:row:affine"])
def test_the_largest_half_numbers_stay_finite(spelling: str, dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    x = torch.tensor([[top, -top, top * 0.9, 1.0]], dtype=dtype)
    y = fake_quantize(x, Format.parse(spelling))
    assert bool(y.isfinite().all())
    assert y.equal(encode(x, spelling).dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spelling", STATIC)
def test_static_is_what_its_scale_encodes_to(spelling: str, dtype: torch.dtype) -> None:
    fmt = Format.parse(spelling)
    for columns in (16, 17, 1):
        x = (torch.randn(5, columns) * 3).to(dtype)
        encoded = encode(x, fmt)
        assert encoded.scale.shape == (1,)
        assert fake_quantize(x, fmt, scale=encoded.scale).equal(encoded.dequantize())
        assert fake_quantize(x[None], fmt, scale=encoded.scale).equal(encoded.dequantize()[None])


@pytest.mark.parametrize("spelling", STATIC)
def test_static_saturates(spelling: str) -> None:
    y = fake_quantize(torch.tensor([[1e30, 0.0, -1e38, 0.0]]), Format.parse(spelling), scale=torch.tensor([0.5]))
    assert bool(y.isfinite().all())
    assert float(y[0, 0]) > 0 > float(y[0, 2])
    assert not y[0, 1::2].any()
    assert not torch.signbit(y[0, 1::2]).any()


def test_static_affine() -> None:
    scale, zero = torch.tensor([0.1]), torch.tensor([-100], dtype=torch.int32)
    y = fake_quantize(
        torch.tensor([[-9.0, -0.26, 0.0, 1.04, 50.0]]), Format.parse("int8:tensor:affine"), scale=scale, zero_point=zero
    )
    assert y[0].tolist() == pytest.approx([-2.8, -0.3, 0.0, 1.0, 22.7], rel=1e-6)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spelling", ["int8:row", "flint4:row", "ovp4:row", "mxfp4", "ovp4-int:tensor", "int8:tensor"])
def test_a_broken_row_comes_out_as_nan_and_breaks_no_other(spelling: str, broken: float) -> None:
    fmt, x = Format.parse(spelling), torch.randn(2, 3, 8)
    x[1, 0] = 0
    clean = fake_quantize(x, fmt)
    x[1, 0, 4] = broken
    y = fake_quantize(x, fmt)
    assert y[1, 0].isnan().all()
    assert y[0].equal(clean[0])
    assert y[1, 1:].equal(clean[1, 1:])
    if fmt.granularity.kind == "tensor":
        static = fake_quantize(x, fmt, scale=torch.tensor([0.2]))
        assert static[1, 0].isnan().all()
        assert int(static.isnan().sum()) == 8


def test_nothing_stays_nothing_and_the_input_is_left_alone() -> None:
    assert fake_quantize(torch.zeros(0, 8), Format.parse("ovp4:row")).shape == (0, 8)
    assert fake_quantize(torch.zeros(2, 0), Format.parse("int8:row")).shape == (2, 0)
    x = torch.randn(3, 8)
    before = x.clone()
    for spelling in ("int8:row", "ovp4:row", "mxfp4"):
        fake_quantize(x, Format.parse(spelling))
    assert x.equal(before)


TOKENWISE = [
    *(s for s in DYNAMIC if ":tensor" not in s),
    "ovp4:g32",
    "ovp4-int:g32",
    "ovp4-i8:row",
    "ant4:g16",
    "ant3:row",
]
TOKENWISE += ["flint4:g16", "nf4:g32:mse", "nvfp4:mse", "mxfp4:mse", "int4:row:affine", "int4:g16:mse", "int2:row:mse"]
TOKENWISE += ["ovp4:row:3sigma:reference", "ovp4:g64", "ovp4-mix:g32"]


@pytest.mark.parametrize("spelling", TOKENWISE)
def test_tokens_do_not_see_each_other(spelling: str) -> None:
    fmt = Format.parse(spelling)
    # Sizes far apart, so that a factor or a kind taken from all of them would show; heavy tails; padding of zeros.
    x = torch.randn(6, 96) * torch.tensor([[1.0], [1e5], [1e-6], [1.0], [0.0], [3.0]])
    x[3] *= torch.exp(2 * torch.randn(96))
    x[5, :7] *= 40
    together = fake_quantize(x, fmt)
    assert together.equal(torch.cat([fake_quantize(row[None], fmt) for row in x]))
    assert together.equal(torch.cat([encode(row[None], fmt).dequantize() for row in x]))
    assert together.equal(fake_quantize(x.flip(0), fmt).flip(0))
    assert together[:4].equal(fake_quantize(x[:4].view(2, 2, 96), fmt).view(4, 96))


@pytest.mark.parametrize("spelling", ["ovp4:row", "ovp4:g128", "ant4:row"])
def test_a_kind_for_each_token(spelling: str) -> None:
    """One row is best as int and one as flint: together each keeps its own."""
    x = torch.randn(2, 256)
    x[1] = torch.distributions.StudentT(2.2).sample((256,))
    kinds = {str(encode(row[None], spelling).format) for row in x}
    assert len(kinds) == 2
    y = fake_quantize(x, Format.parse(spelling))
    for row, got in zip(x, y, strict=True):
        assert got.equal(encode(row[None], spelling).dequantize()[0])
