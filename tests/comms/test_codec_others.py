"""Casts, signs, rotations, tables and low rank: what each file claims of its own."""

from __future__ import annotations

import math

import pytest
import torch

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.codecs.hadamard import matrix
from evenbits.comms.codecs.lowrank import LowRank
from evenbits.errors import EvenbitsError
from evenbits.numerics.metrics import sqnr_db


def through(spec: str, x: torch.Tensor) -> torch.Tensor:
    codec = get(spec)
    return codec.decode(codec.encode(x), Meta.of(x))


def test_raw_is_bit_identical() -> None:
    x = torch.tensor([math.nan, -0.0, math.inf, 1e-45, 3.0])
    assert through("raw", x).view(torch.int32).equal(x.view(torch.int32))


def test_casts_saturate_within_the_type_that_receives_them() -> None:
    assert through("fp16", torch.tensor([1e6, -1e6])).tolist() == [65504, -65504]
    assert through("fp16", torch.tensor([1e6], dtype=torch.bfloat16)).isfinite().all()
    assert through("bf16", torch.tensor([65504.0], dtype=torch.float16)).tolist() == [65504]
    assert through("bf16", torch.tensor([1e300], dtype=torch.float64)).tolist() == [torch.finfo(torch.bfloat16).max]


@pytest.mark.parametrize("magnitude", [1e-30, 1e-5, 1.0, 1e20])
def test_float8_serves_every_magnitude(magnitude: float) -> None:
    x = torch.randn(4096)
    assert sqnr_db(x, through("fp8", x * magnitude) / magnitude) > 30.5
    assert (x * 1e-5).to(torch.float8_e4m3fn).float().abs().max() == 0  # what a plain cast makes of a gradient


@pytest.mark.parametrize("top", [1.0, 447.9, 448.0, 448.1, 480.0, 511.9, 512.0])
def test_float8_does_not_saturate_at_the_top(top: float) -> None:
    assert through("fp8", torch.tensor([top, -top])).tolist() == pytest.approx([top, -top], rel=1 / 16)


def test_an_exponent_that_no_encoder_writes_is_refused() -> None:
    payload = get("fp8").encode(torch.ones(3))
    payload[:2] = torch.tensor([1000], dtype=torch.int16).view(torch.uint8)
    with pytest.raises(EvenbitsError, match="exponent 1000"):
        get("fp8").decode(payload, Meta((3,), torch.float32))


def test_a_sign_has_the_mean_magnitude_and_zeros_cancel() -> None:
    x = torch.tensor([2.0, -1.0, 0.0, 0.0, 0.0, 0.0, 3.0, -2.0])
    assert through("sign", x).tolist() == [1, -1, 1, -1, 1, -1, 1, -1]
    assert through("sign:g2", x).tolist() == [1.5, -1.5, 0, 0, 0, 0, 2.5, -2.5]
    assert get("int1:tensor").encode(x).equal(get("sign").encode(x))
    assert len(get("int1:g128").encode(torch.ones(1024))) == 128 + 16
    huge = torch.full((1000,), 3e38)
    assert through("sign", huge).tolist() == pytest.approx(huge.tolist(), rel=1e-5)


@pytest.mark.parametrize("size", [2, 4, 128, 1024])
def test_the_rotation_is_its_own_inverse_and_sylvester_s(size: int) -> None:
    rotation = matrix(size, torch.device("cpu"))
    torch.testing.assert_close(rotation @ rotation, torch.eye(size), rtol=0, atol=1e-5)
    signs = [[(-1) ** bin(i & j).count("1") for j in range(8)] for i in range(size)]
    torch.testing.assert_close(rotation[:, :8] * math.sqrt(size), torch.tensor(signs).float()[:, : min(8, size)])


def test_a_rotation_spreads_outliers_and_nothing_else() -> None:
    tails = torch.distributions.StudentT(3.0).sample((1 << 15,))
    assert sqnr_db(tails, through("hadamard+int4:g128", tails)) > sqnr_db(tails, through("int4:g128", tails)) + 3
    relu = torch.randn(1 << 15).relu()
    assert sqnr_db(relu, through("hadamard+uint4:g128:affine", relu)) < sqnr_db(relu, through("uint4:g128", relu))


def test_a_rotation_fits_the_groups_of_the_codec_behind_it() -> None:
    meta = Meta((1000,), torch.float32)
    assert get("hadamard+int4:g64").payload_bytes(meta) == 16 * (32 + 2)
    assert get("hadamard64+int4:g64").spec == "hadamard+int4:g64"
    assert get("hadamard+int4:g100").payload_bytes(meta) == get("int4:g100").payload_bytes(
        Meta((8, 128), torch.float32)
    )
    assert get("hadamard32+fp8").payload_bytes(meta) == 2 + 1024
    with pytest.raises(EvenbitsError, match="beyond 1e"):
        get("hadamard+int4:g64").encode(torch.tensor([1e37]))


@pytest.mark.parametrize(("bits", "decibels"), [(1, 4.40), (2, 9.30), (3, 14.62), (4, 20.22), (5, 26.01)])
def test_lloyd_reaches_max_s_table_of_a_normal_density(bits: int, decibels: float) -> None:
    """J. Max, 1960, table I: distortion .3634, .1175, .03454, .009497, .002499."""
    x = torch.randn(1 << 18)
    assert sqnr_db(x, through(f"lloyd{bits}:free", x)) == pytest.approx(decibels, abs=0.12)


def test_a_table_with_zero_costs_little_and_keeps_it() -> None:
    x = torch.randn(1 << 14)
    x[::2] = 0
    assert not bool(through("lloyd4", x)[::2].any())
    assert sqnr_db(x, through("lloyd4", x)) > sqnr_db(x, through("lloyd4:free", x)) - 1
    few = torch.tensor([0.5, 1.0, -2.0, 0.0]).repeat(5)
    torch.testing.assert_close(through("lloyd2", few), few)


def test_no_scalar_code_beats_lloyd_at_equal_bits() -> None:
    x = torch.randn(1 << 16) * torch.exp(torch.randn(1 << 16))
    best = sqnr_db(x, through("lloyd4:free", x))
    for spec in ("multi2x4", "multi2x4:cuberoot", "multi2x4:dp", "int4:tensor", "uint4:tensor:affine:free"):
        assert sqnr_db(x, through(spec, x)) < best + 0.1


def test_a_matrix_of_the_rank_comes_back() -> None:
    x = torch.randn(60, 3) @ torch.randn(3, 80)
    assert sqnr_db(x, through("lowrank3", x)) > 100
    assert sqnr_db(x, through("lowrank2", x)) < 20
    tiny = x * 1e-30
    assert sqnr_db(tiny.double(), through("lowrank3", tiny).double()) > 100


def test_the_matrix_is_cut_where_the_factors_are_smallest() -> None:
    codec = get("lowrank2")
    assert isinstance(codec, LowRank)
    for shape, expected in {
        (64, 32, 3, 3): (64, 288),
        (8, 128, 384): (1024, 384),
        (10, 10): (10, 10),
    }.items():
        meta = Meta(shape, torch.float32)
        assert codec.matrix_shape(meta) == expected
        assert codec.payload_bytes(meta) == 8 * sum(expected)
    for shape in ((100,), (2, 3), ()):
        x = torch.randn(shape)
        assert codec.is_plain(Meta.of(x)) and through("lowrank2", x).equal(x)


def test_a_warm_start_converges_to_the_best_rank() -> None:
    x = torch.randn(100, 80)
    codec, meta = get("lowrank4"), Meta.of(x)
    assert isinstance(codec, LowRank)
    u, s, v = torch.linalg.svd(x)
    best = sqnr_db(x, u[:, :4] * s[:4] @ v[:4])
    start, reached = None, []
    for _ in range(150):
        payload = codec.encode_from(x, start)
        start = codec.right_factor(payload, meta)
        reached.append(sqnr_db(x, codec.decode(payload, meta)))
    assert reached[0] < best - 0.1
    assert reached[-1] == pytest.approx(best, abs=0.02)
    assert codec.encode(x).equal(codec.encode_from(x, None))
    with pytest.raises(EvenbitsError, match=r"starts from float32 \[80, 4\]"):
        codec.encode_from(x, torch.zeros(80, 3))
    with pytest.raises(EvenbitsError, match="travels as float32"):
        codec.right_factor(codec.encode(torch.ones(5)), Meta((5,), torch.float32))
