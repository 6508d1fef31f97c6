"""Every format and policy: what packing and unpacking gives is, bit for bit, what snapping gives without packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evenbits.errors import EvenbitsError
from evenbits.numerics import elements
from evenbits.numerics.elements import PairType
from evenbits.numerics.encode import encode
from evenbits.numerics.metrics import sqnr_db
from evenbits.numerics.ovp import POLICIES, first_illegal, pair_kind
from evenbits.numerics.qtensor import QTensor

INTEGERS = [
    *(f"int{bits}:{grain}" for bits in range(2, 9) for grain in ("tensor", "row", "g16", "g32:mse")),
    *(f"int{bits}:{grain}:affine" for bits in range(2, 9) for grain in ("row", "g32")),
    *(
        "uint4:g64:affine:mse",
        "uint8:tensor:affine",
        "uint4:row:affine:free",
        "int4:g128",
        "int4:row:7.5",
        "int3:axis0",
    ),
    *("int4:row:mse", "int4:tensor:mse", "int8:row:127.5:mse", "int4:row:p99"),
]
TABLES = [
    *(f"{name}:{grain}" for name in ("flint4", "pot4", "nf4", "fp4") for grain in ("tensor", "row", "g16", "g64")),
    *("flint3:row", "flint5:row", "flint6:g32", "flint8:row", "pot3:g16", "pot8:row", "fp4:g32", "fp4:g128:mse"),
    *("fp6_e3m2:row", "fp6_e2m3:g32", "fp8:row", "fp8:tensor", "fp8_e5m2:row", "nf3:row", "nf4:row:mse", "nf4:g64:p99"),
    *("flint4:axis0", "mxfp4", "mxfp4:mse", "nvfp4", "nvfp4:mse"),
]
CHOICES = ["ant4:row", "ant4:tensor", "ant4:g64", "ant3:row", "ant5:g32", "ant8:row"]
PAIRS = [
    *(f"ovp4:{grain}" for grain in ("tensor", "row", "g16", "g32", "g64", "g128", "row:3sigma")),
    *(f"ovp4-{kind}:{grain}" for kind in ("int", "flint", "flint_i8") for grain in ("tensor", "row", "g32")),
    *("ovp4-int:row:minmax", "ovp4-flint:tensor:3sigma", "ovp4-int:g32:p99", "ovp4-mix:g32", "ovp4-mix:g16"),
    *("ovp4-i8:row", "ovp4-i8:g32", "ovp4-mix:g64", "ovp8:row", "ovp8:tensor", "ovp8:g32"),
]
UNSIGNED = ["uint8:row", "uint4:row:mse", "uflint4:row", "upot4:tensor", "ufp4_e3m1:g32"]
EVERY = [*INTEGERS, *TABLES, *CHOICES, *PAIRS]
CASES = [(spelling, policy) for spelling in EVERY for policy in (POLICIES if spelling in PAIRS else (None,))]
SHAPES = [(3, 64), (2, 33), (5, 1), (7,), (2, 3, 18), (2, 160)]


def _unpacked(x: torch.Tensor, encoded: QTensor, policy: str) -> torch.Tensor:
    """x as its stored scales have it, without bytes: only `snap` (integers: plain rounding) on x / scale."""
    fmt = encoded.format
    x_RK = fmt.granularity.matrix(x.float())
    columns = x_RK.shape[1]
    x_RK = torch.nn.functional.pad(x_RK, (0, fmt.stored_columns(columns) - columns))
    scale = fmt.granularity.spread(encoded.scales(), x_RK.shape[1])
    if encoded.zero_point is not None:
        zero = fmt.granularity.spread(encoded.zero_point.double(), columns)
        quotient = x_RK.double() / scale.double() if not fmt.rule.zero_exact else (x_RK / scale).double()
        values = ((quotient.round() + zero).clamp(*fmt.code_range) - zero).float()
    elif isinstance(fmt.dtype, PairType) and fmt.dtype.kind == "mix":
        bits = np.unpackbits(encoded.kinds.numpy(), axis=1, bitorder="little")[:, : encoded.scale.shape[1]]
        flint = fmt.granularity.spread(torch.from_numpy(bits).bool(), x_RK.shape[1])
        values = torch.where(
            flint, *(elements.snap(x_RK / scale, PairType(4, kind), policy) for kind in ("flint", "int"))
        )
    else:
        values = elements.snap(x_RK / scale, fmt.dtype, policy, full_range=fmt.rule.full_range)
    decoded = (values * scale)[:, :columns].clamp(-3.4028234663852886e38, 3.4028234663852886e38)
    if x.dtype != torch.float32:
        decoded = decoded.clamp(-torch.finfo(x.dtype).max, torch.finfo(x.dtype).max)
    return fmt.granularity.unmatrix(decoded, tuple(x.shape)).to(x.dtype)


def _check(x: torch.Tensor, spelling: str, policy: str | None = None) -> QTensor:
    encoded = encode(x, spelling, policy=policy)
    decoded = encoded.dequantize()
    assert decoded.dtype == x.dtype
    assert decoded.shape == x.shape
    assert bool(decoded.isfinite().all())
    assert torch.equal(decoded, _unpacked(x, encoded, policy or "optimal"))
    assert bool((decoded[x == 0] == 0).all())
    assert bool((encoded.scales() > 0).all())
    assert bool(encoded.scales().isfinite().all())
    if isinstance(encoded.format.dtype, PairType):
        assert first_illegal(encoded.packed, pair_kind("int8" if encoded.format.dtype.bits == 8 else "int")) is None
    return encoded


@pytest.mark.parametrize(("spelling", "policy"), CASES)
def test_packed_is_snapped(spelling: str, policy: str | None) -> None:
    for shape in SHAPES:
        x = torch.randn(shape) * torch.exp(torch.randn(shape))  # heavy tails
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            _check(x.to(dtype), spelling, policy)


@pytest.mark.parametrize(("spelling", "policy"), CASES)
def test_packed_is_snapped_on_difficult_numbers(spelling: str, policy: str | None) -> None:
    lone = torch.randn(2, 34) * 1e-2
    lone[1, 7] = -3e4
    some_zeros = torch.randn(3, 34)
    some_zeros[1] = 0
    tiny = torch.randn(2, 34) * 1e-39
    for x in (torch.zeros(2, 34), torch.full((2, 34), -0.3), lone, some_zeros, tiny, torch.randn(2, 34) * 1e37):
        _check(x, spelling, policy)
    for x in (torch.randn(2, 34) * 1e-7, lone):  # denormals of float16
        _check(x.half(), spelling, policy)
    assert encode(torch.zeros(5), spelling, policy=policy).dequantize().tolist() == [0] * 5


@pytest.mark.parametrize("spelling", UNSIGNED)
def test_unsigned_types(spelling: str) -> None:
    for shape in SHAPES:
        _check(torch.rand(shape), spelling)
    with pytest.raises(EvenbitsError, match="cannot hold negative values"):
        encode(torch.tensor([[1.0, 2.0], [3.0, -1e-3]]), spelling)


@pytest.mark.parametrize("spelling", EVERY)
def test_magnitude_does_not_matter(spelling: str) -> None:
    """What is stored in float16, E4M3 or powers of two must serve small and large tensors alike, searched or not."""
    if spelling in ("pot8:row", "ant8:row"):
        return  # a table that reaches 2¹²⁶ leaves no smaller scale
    x = torch.randn(4, 64) * torch.exp(torch.randn(4, 64) / 2)
    plain = sqnr_db(x, encode(x, spelling).dequantize())
    for power in (-90, -60, -20, 20, 60, 90):
        scaled = x * 2.0**power
        # Only rounding of float16 scales (which may get a factor) can differ, and the phase of E4M3 ones.
        tolerance = 0.05 if "affine" not in spelling else 0.2
        assert abs(sqnr_db(scaled, encode(scaled, spelling).dequantize()) - plain) <= tolerance, power


@pytest.mark.parametrize("spelling", EVERY)
def test_groups_of_zeros_do_not_crowd_out_small_ones(spelling: str) -> None:
    x = torch.randn(4, 64) * 2.0**-40
    if spelling.split(":")[1:2] == ["tensor"]:
        return
    with_zeros = torch.cat([x, torch.zeros(1, 64)])
    decoded = encode(with_zeros, spelling).dequantize()
    assert torch.equal(decoded[:4], encode(x, spelling).dequantize()) or spelling in CHOICES + PAIRS
    assert sqnr_db(x, decoded[:4]) >= sqnr_db(x, encode(x, spelling).dequantize()) - 1e-6
    assert not decoded[4].any()


@pytest.mark.parametrize("spelling", EVERY)
def test_float64_is_encoded_like_float32(spelling: str) -> None:
    x = torch.randn(4, 34)
    wide = encode(x.double(), spelling)
    assert wide.dequantize().dtype == torch.float64
    assert abs(sqnr_db(x, wide.dequantize(torch.float32)) - sqnr_db(x, encode(x, spelling).dequantize())) < 0.1


@pytest.mark.parametrize("spelling", ["ovp4:g32", "flint4:row", "ant4:row", "nf4:g64", "mxfp4", "nvfp4", "ovp8:row"])
def test_what_cannot_be_encoded(spelling: str) -> None:
    nan = torch.randn(3, 8)
    nan[1, 2] = float("nan")
    for x, words in (
        (nan, "1 of 24 values are NaN"),
        (torch.tensor([[1.0, float("inf")]]), "1 of 2 values are NaN or infinite"),
        (torch.zeros(0, 4), "without elements"),
        (torch.ones(2, 2, dtype=torch.int8), r"given torch\.int8"),
        (torch.tensor([1e300], dtype=torch.float64), "cannot hold 1e"),
    ):
        with pytest.raises(EvenbitsError, match=words):
            encode(x, spelling)
    with pytest.raises(EvenbitsError, match="'optimal'"):
        encode(torch.ones(2), spelling, policy="optimum")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spelling", ["nvfp4", "mxfp4", "int4:row", "int8:tensor:affine", "nf4:g64", "ant4:row"])
def test_a_policy_is_for_pairs_only(spelling: str, policy: str) -> None:
    with pytest.raises(EvenbitsError, match=f"policy '{policy}' .*{spelling} has no pairs"):
        encode(torch.ones(2, 16), spelling, policy=policy)


@pytest.mark.parametrize(
    "spelling", ["int2:row", "int2:row:mse", "nf4:row", "nf4:g16", "int2:g2:1.5", "ovp4:row", "mxfp4", "nvfp4"]
)
def test_the_largest_numbers_stay_finite(spelling: str) -> None:
    top = torch.finfo(torch.float32).max
    decoded = encode(torch.tensor([[top, -top, 0.0, 1.0]]), spelling).dequantize()
    assert bool(decoded.isfinite().all())
    assert float(decoded[0, 0]) >= top * 0.65
