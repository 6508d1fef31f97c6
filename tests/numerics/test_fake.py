"""Activations on their way into a layer: what encoding and decoding would make of them.

For every format and policy, what comes out is bit for bit what a decoder that shares no code with the library makes of
the packed bytes (stranger.py; of table types, the library's tables are its only loan: test_codebook.py has them typed
in). With a calibrated scale nothing is packed at all, and the same must come out.
"""

from __future__ import annotations

import pytest
import stranger
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_encode import CASES, UNSIGNED

from evenbits.errors import EvenbitsError
from evenbits.numerics.codebook import Codebook
from evenbits.numerics.elements import PairType
from evenbits.numerics.encode import encode
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor

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


def _entry(encoded: QTensor) -> dict[str, object]:
    """A tensor as docs/ovp-vectors.json writes one, for the decoder that does not know the library."""
    granularity = encoded.format.granularity
    plain = {"group": granularity.size, "tensor": "tensor"}
    return {
        "format": str(encoded.format),
        "shape": list(granularity.matrix_shape(encoded.shape)),
        "group": plain.get(granularity.kind, "row"),
        "bytes": [bytes(row).hex() for row in encoded.packed.tolist()],
        "scale_type": encoded.format.storage,
        "scale": bytes(encoded.scale.flatten().view(torch.uint8).tolist()).hex(),
        "factor": None if encoded.global_scale is None else float(encoded.global_scale),
        "kinds": None if encoded.kinds is None else [bytes(row).hex() for row in encoded.kinds.tolist()],
        "zero_points": None if encoded.zero_point is None else encoded.zero_point.flatten().tolist(),
    }


def _table(fmt: Format) -> list[float] | None:
    """What each code stands for; None for pairs."""
    if isinstance(fmt.dtype, PairType):
        return None
    if isinstance(fmt.dtype, Codebook):
        return [stranger.float32(value) for value in fmt.dtype.values]
    half, full = 1 << (fmt.dtype.bits - 1), 1 << fmt.dtype.bits
    return [float(code - full if fmt.dtype.signed and code >= half else code) for code in range(full)]


def _decoded(encoded: QTensor) -> torch.Tensor:
    """What the stranger reads from the bytes, in the tensor's shape and type."""
    found = torch.tensor(stranger.decode(_entry(encoded), _table(encoded.format)), dtype=torch.float64).float()
    found = encoded.format.granularity.unmatrix(found, encoded.shape)
    if encoded.dtype in (torch.float16, torch.bfloat16):
        found = found.clamp(-torch.finfo(encoded.dtype).max, torch.finfo(encoded.dtype).max)
    return found.to(encoded.dtype)


@st.composite
def _tensors(draw: st.DrawFn, *, negative: bool = True) -> torch.Tensor:
    """[R, K] with heavy tails, zeros, maybe a row of nothing else, of any magnitude, in three types."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, columns, generator=generator) * torch.randn(rows, columns, generator=generator).exp()
    x[torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.9]))] = 0
    if draw(st.booleans()):
        x[0] = 0
    x = (x if negative else x.abs()) * 2.0 ** draw(st.sampled_from([0, 0, -8, 6, -30]))
    return x.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))


def _check(x: torch.Tensor, spelling: str, policy: str | None) -> None:
    fmt = Format.parse(spelling) if policy is None else Format.parse(spelling).with_policy(policy)
    encoded = encode(x, fmt)
    expected = _decoded(encoded)
    assert expected.equal(encoded.dequantize())
    if fmt.granularity.kind != "tensor":  # of activations every row is encoded by itself
        assert torch.cat([_decoded(encode(row[None], fmt)) for row in x]).equal(fake_quantize(x, fmt))
    else:
        assert expected.equal(fake_quantize(x, fmt))
    if encoded.scale.shape == (1,) and encoded.format.granularity.kind == "tensor":
        static = fake_quantize(x, encoded.format, scale=encoded.scales(), zero_point=encoded.zero_point)
        assert expected.equal(static)
    x[-1, -1] = torch.nan
    with pytest.raises(EvenbitsError, match=r"1 of \d+ values are NaN"):
        encode(x, fmt)


@pytest.mark.parametrize(("spelling", "policy"), [*CASES, *((spelling, None) for spelling in UNSIGNED)])
@settings(max_examples=3)
@given(data=st.data())
def test_fake_is_what_a_stranger_reads_from_the_bytes(spelling: str, policy: str | None, data: st.DataObject) -> None:
    _check(data.draw(_tensors(negative=spelling not in UNSIGNED)), spelling, policy)


@pytest.mark.slow
@pytest.mark.parametrize(("spelling", "policy"), CASES)
@settings(max_examples=10)
@given(x=_tensors())
def test_fake_is_what_a_stranger_reads_at_length(spelling: str, policy: str | None, x: torch.Tensor) -> None:
    _check(x, spelling, policy)


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
