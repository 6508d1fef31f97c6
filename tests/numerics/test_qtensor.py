"""Encoding whole tensors against an oracle of numpy loops: every format, shape and float type; true bits; refusals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from evenbits.errors import EvenbitsError
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor

NAN, INF = float("nan"), float("inf")


def _group_of(spelling: str, index: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    word = spelling.split(":")[1]
    if word == "tensor":
        return ()
    if word.startswith("axis"):
        return (index[int(word[4:])],)
    return index[:-1] if word == "row" else (*index[:-1], index[-1] // int(word[1:]))


def _in_float16(scales: list[np.float32]) -> list[np.float32]:
    """Positive scales as float16 has them, times a power of two if one lies outside 2⁻¹³ … 2¹⁵."""
    largest = float(max(scales))
    fine = min(scales) >= 2.0**-13 and largest <= 2.0**15
    factor = np.float32(1.0 if fine else 2.0 ** (math.floor(math.log2(largest)) - 10))
    return [np.float32(np.float16(scale / factor)) * factor for scale in scales]


def _oracle(x: np.ndarray, spelling: str) -> np.ndarray:
    """Encode and decode, group by group, in float64 around the scales as they are stored."""
    dtype, _, *options = spelling.split(":")
    bits, signed = int(dtype[-1]), not dtype.startswith("u")
    top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    bottom = -(2 ** (bits - 1)) if signed else 0
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for index in itertools.product(*map(range, x.shape)):
        groups.setdefault(_group_of(spelling, index, x.shape), []).append(index)
    lows, highs, scales = [], [], []
    half = [option for option in options if option.endswith(".5")]
    for members in groups.values():
        values = np.array([x[index] for index in members], np.float64)
        low, high = values.min(), values.max()
        if "affine" in options:
            low, high = (low, high) if "free" in options else (min(low, 0), max(high, 0))
            scale = np.float32((high - low) / (top - bottom)) or np.float32(abs(high))  # a constant is its own scale
        else:
            scale = np.float32(max(-low, high) / (float(half[0]) if half else top))
        lows, highs, scales = [*lows, low], [*highs, high], [*scales, scale]
    if bits < 8 and "tensor" not in spelling and "free" not in options:
        scales = _in_float16(scales)
    if "affine" not in options:
        bottom = bottom if half or not signed else -top
    out = np.empty(x.shape, np.float64)
    for members, low, scale in zip(groups.values(), lows, scales, strict=True):
        values = np.array([x[index] for index in members], np.float64)
        zero = bottom - np.rint(low / np.float64(scale)) if "affine" in options else 0.0
        codes = np.clip(np.rint(np.float32(values) / scale) + zero, bottom, top)
        for index, code in zip(members, codes, strict=True):
            out[index] = np.float32(np.float32(code - zero) * scale)
    return out


SPELLINGS = [
    *(f"int{bits}:row" for bits in range(2, 9)),
    *(f"uint{bits}:tensor:affine" for bits in range(2, 9)),
    *("int8:tensor", "int8:g3", "int4:g3", "int4:g2:affine", "int8:row:127.5", "int4:g4:7.5", "uint8:row:affine:free"),
    *("int8:axis0", "int8:axis-1", "int4:axis1:affine", "int3:g1", "int8:g128"),
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("shape", [(4, 7), (3, 1), (1, 9), (2, 3, 5), (2, 2, 2, 3)])
def test_decodes_what_the_oracle_decodes(spelling: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[-1])
    decoded = encode(x, spelling).dequantize()
    assert decoded.shape == x.shape
    assert decoded.tolist() == _oracle(x.numpy(), spelling).tolist()


@pytest.mark.parametrize(
    "spelling", ["int8:row", "int4:g128", "uint8:tensor:affine", "int3:tensor", "int8:row:mse", "int4:g1"]
)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-40, -1e-40])
def test_scalars_and_single_numbers(spelling: str, value: float) -> None:
    for x in (torch.tensor(value), torch.tensor([value])):
        encoded = encode(x, spelling)
        decoded = encoded.dequantize()
        assert decoded.shape == x.shape
        rounding = 2**-22 if encoded.scale.dtype == torch.float32 else 2**-11  # half a step of float16
        assert abs(float(decoded) - value) <= max(abs(value) * rounding, 2.0**-127)


@pytest.mark.parametrize("spelling", ["int8:row", "int8:axis0", "int8:tensor", "int8:g4"])
def test_a_vector_is_one_row(spelling: str) -> None:
    x = torch.randn(9)
    encoded = encode(x, spelling)
    assert encoded.scale.shape == {"row": (1, 1), "axis0": (9, 1), "tensor": (1,), "g4": (1, 3)}[spelling[5:]]
    assert (
        encoded.dequantize().tolist()
        == _oracle(x.view(1, 9).numpy() if spelling != "int8:axis0" else x.numpy(), spelling).reshape(-1).tolist()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "spelling", ["int8:row", "int4:g4", "uint8:tensor:affine", "int8:axis1", "uint4:row:affine:free"]
)
def test_float_types(dtype: torch.dtype, spelling: str) -> None:
    x = torch.randn(6, 10).to(dtype)
    encoded = encode(x, spelling)
    assert encoded.scale.dtype == (torch.float16 if spelling == "int4:g4" else torch.float32)
    assert encoded.dtype == dtype
    assert encoded.dequantize().dtype == dtype
    exact = encoded.dequantize(torch.float64)
    assert exact.tolist() == _oracle(x.float().numpy(), spelling).tolist() or dtype == torch.float64
    assert encoded.dequantize().equal(exact.to(dtype))
    # Half a step, and where the stored scale is float16, the top code (7) of a scale that was rounded down.
    spread = (exact - x.double()).abs().max() / encoded.scale.max()
    assert float(spread) <= 0.5 + (7 * 2**-11 if encoded.scale.dtype == torch.float16 else 1e-4)


@pytest.mark.parametrize("spelling", ["int8:row", "int4:g3", "int8:tensor:affine", "int8:axis0"])
def test_memory_layout_does_not_matter(spelling: str) -> None:
    base = torch.randn(5, 4, 6)
    for view in (base.permute(2, 0, 1), base[:, ::2], base[..., 1:5], base.flip(0), base[:1].expand(3, 4, 6)):
        one, other = encode(view, spelling), encode(view.contiguous(), spelling)
        assert one.packed.is_contiguous()
        assert one.packed.equal(other.packed)
        assert one.scale.equal(other.scale)
        assert one.dequantize().equal(other.dequantize())


def test_the_input_is_left_alone() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    before = x.detach().clone()
    encoded = encode(x, "int8:row:mse")
    assert x.detach().equal(before)
    assert not encoded.scale.requires_grad
    assert not encoded.dequantize().requires_grad
    assert encode(x, "int8:row:mse").packed.equal(encoded.packed)


@given(
    x=arrays(
        np.float32,
        array_shapes(min_dims=0, max_dims=3, max_side=6),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    spelling=st.sampled_from(
        ["int8:row", "int4:g4", "int8:tensor:127.5", "uint8:row:affine", "int2:tensor", "int5:g2:affine"]
    ),
)
def test_error_is_at_most_half_a_step_and_zero_is_exact(x: np.ndarray, spelling: str) -> None:
    encoded = encode(torch.from_numpy(np.array(x)), spelling)
    granularity = encoded.format.granularity
    columns = granularity.matrix_shape(encoded.shape)[1]
    step_RK = granularity.spread(encoded.scales(), columns).double().numpy()
    decoded = granularity.matrix(encoded.dequantize()).double().numpy()
    given_RK = x.astype(np.float64).reshape(decoded.shape)
    # A float16 scale may be rounded down by 2⁻¹¹: the outermost code, at most 31, then falls that much short.
    short = 2**-14 if encoded.scale.dtype == torch.float32 else 31 * 2**-11
    assert (np.abs(decoded - given_RK) <= step_RK * (0.5 + short)).all()
    assert (decoded[given_RK == 0] == 0).all()


@pytest.mark.parametrize(
    "spelling", ["int8:row", "int4:g3", "uint8:row:affine", "int8:row:mse", "int8:row:p90", "uint4:row"]
)
def test_rows_of_zeros_stay_zeros(spelling: str) -> None:
    x = torch.rand(3, 7)
    x[1] = 0
    encoded = encode(x, spelling)
    assert encoded.dequantize()[1].tolist() == [0] * 7
    assert (encoded.scale > 0).all()
    assert torch.isfinite(encoded.scale).all()


@pytest.mark.parametrize("value", [1.0, -1.0, 0.1, -7e-3, 12345.678])
def test_constant_rows(value: float) -> None:
    x = torch.full((2, 5), value)
    for spelling in ("int8:row", "int4:tensor", "int8:row:affine", "uint8:row:affine:free"):
        assert encode(x, spelling).dequantize() == pytest.approx(x, rel=1e-6)
    exact = np.float32(np.float16(np.float32(abs(value)) / np.float32(7))) * np.float32(7)
    if abs(value) > 1e-2:  # below, a factor comes in
        assert encode(x, "int4:row").dequantize().abs().tolist() == np.full((2, 5), exact).tolist()
    assert encode(x, "int4:row").dequantize() == pytest.approx(x, rel=2**-11)
    assert encode(x, "uint8:row:affine:free").dequantize().equal(x)


def test_denormals_neither_vanish_into_nan_nor_divide_by_zero() -> None:
    x = torch.tensor([[1e-45, -1e-45, 0.0], [1e-40, 5e-41, 0.0], [1e-36, -5e-37, 0.0]])
    for spelling in ("int8:row", "int8:row:affine", "uint8:row:affine:free", "int4:tensor", "int8:row:mse"):
        encoded = encode(x, spelling)
        assert (encoded.scale >= torch.finfo(torch.float32).tiny).all()
        assert ((encoded.dequantize() - x).abs() <= encoded.scale.view(-1, 1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "spelling", ["int8:tensor", "int8:tensor:127.5", "uint8:tensor:affine", "int8:row:affine:free", "int2:g2:1.5"]
)
def test_the_largest_numbers_decode_to_finite_ones(dtype: torch.dtype, spelling: str) -> None:
    top = torch.finfo(dtype).max
    for low in (-top, 0.0):
        x = torch.tensor([low, top, 0.0], dtype=dtype)
        encoded = encode(x, spelling)
        decoded = encoded.dequantize()
        assert torch.isfinite(decoded).all()
        assert ((decoded.double() - x.double()).abs() <= encoded.scales().max().double() * (0.5 + 2**-7)).all()


def test_a_lone_negative_outlier_sets_the_scale() -> None:
    x = torch.rand(4, 32)
    x[2, 5] = -1000.0
    encoded = encode(x, "int8:row")
    assert float(encoded.scale[2]) == float(np.float32(1000) / np.float32(127))
    assert int(encoded.codes()[2, 5]) == -127
    assert encoded.codes()[2].count_nonzero() == 1
    assert float(encoded.scale[1]) < 1 / 127


def test_group_format_is_recorded_as_it_applied() -> None:
    encoded = encode(torch.randn(3, 40), "int4:g128")
    assert str(encoded.format) == "int4:g40"
    assert encoded.scale.shape == (3, 1)
    assert str(encode(torch.randn(3, 40), "int4:g16").format) == "int4:g16"
    assert str(encode(torch.randn(3, 40, 2), "int4:axis-2").format) == "int4:axis1"


@pytest.mark.parametrize(
    ("shape", "spelling", "code_bytes", "scale_bytes", "zero_bytes"),
    [
        ((3, 5), "int8:row", 15, 12, 0),
        ((3, 5), "int4:row", 9, 6, 0),  # 5 nibbles: 3 bytes a row
        ((3, 5), "int3:row", 6, 6, 0),  # 15 bits: 2 bytes a row
        ((3, 5), "int2:g2", 6, 18, 0),  # 10 bits: 2 bytes a row; 3 groups a row, the last of one
        ((3, 5), "uint8:tensor:affine", 15, 4, 1),
        ((3, 5), "int4:g2:affine", 9, 18, 9),
        ((3, 5), "int4:row:affine:free", 9, 12, 12),
        ((3, 5), "uint8:row:affine:free", 15, 12, 12),  # int32 zero points
        ((2, 3, 4), "int7:axis1", 3 * 7, 6, 0),
        ((), "int4:g128", 1, 2, 0),
        ((64, 256), "int4:g128", 64 * 128, 64 * 2 * 2, 0),
    ],
)
def test_bits_are_counted_from_the_bytes_there_are(
    shape: tuple[int, ...], spelling: str, code_bytes: int, scale_bytes: int, zero_bytes: int
) -> None:
    encoded = encode(torch.rand(shape) + 0.5, spelling)  # no scale needs a factor
    stored = [t for t in (encoded.packed, encoded.scale, encoded.zero_point) if t is not None]
    measured = [len(t.numpy().tobytes()) for t in stored]
    assert measured == [code_bytes, scale_bytes, zero_bytes][: len(measured)]
    assert encoded.nbytes == code_bytes + scale_bytes + zero_bytes
    # Memory holds no more (a single row may keep the few bytes of the last, partly filled word).
    assert sum(t.untyped_storage().nbytes() for t in stored) <= encoded.nbytes + (
        8 if encoded.packed.shape[0] == 1 else 0
    )
    assert encoded.bits_per_element == 8 * encoded.nbytes / max(1, math.prod(shape))


def test_documented_bits_of_common_formats() -> None:
    assert encode(torch.randn(8, 384), "int8:row").bits_per_element == 8 + 32 / 384
    assert encode(torch.randn(8, 256), "int4:g128").bits_per_element == 4.125


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [("int8:row:affine", torch.int8), ("uint4:row:affine", torch.uint8), ("int4:row:affine:free", torch.int32)],
)
def test_zero_points_are_as_wide_as_they_need(spelling: str, dtype: torch.dtype) -> None:
    zero_point = encode(torch.randn(4, 8) + 3, spelling).zero_point
    assert zero_point is not None
    assert zero_point.dtype == dtype


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.tensor([1.0, NAN]), "1 of 2 values are NaN or infinite"),
        (torch.tensor([[INF, 1.0], [-INF, NAN]]), "3 of 4 values"),
        (torch.tensor([NAN], dtype=torch.bfloat16), "1 of 1 values"),
        (torch.zeros(0), r"without elements .* given shape \[0\]"),
        (torch.zeros(3, 0), r"given shape \[3, 0\]"),
        (torch.tensor([1, 2]), "given torch.int64"),
        (torch.tensor([True]), "given torch.bool"),
        (torch.ones(2, dtype=torch.complex64), "given torch.complex64"),
        (torch.ones(2).to(torch.float8_e4m3fn), "given torch.float8_e4m3fn"),
        ([1.0, 2.0], "given list"),
        (np.ones(2), "given ndarray"),
        (torch.tensor([1e300, 1.0], dtype=torch.float64), "cannot hold 1e"),
    ],
)
def test_refused(x: object, words: str) -> None:
    for spelling in ("int8:tensor", "int4:g128", "uint8:row:affine:mse"):
        with pytest.raises(EvenbitsError, match=words):
            encode(x, spelling)  # type: ignore[arg-type]


def test_negative_values_in_an_unsigned_symmetric_format() -> None:
    with pytest.raises(EvenbitsError, match="cannot hold negative values"):
        encode(torch.tensor([[1.0, 2.0], [-1.0, 2.0]]), "uint8:row")


@pytest.mark.parametrize("axis", [2, -3])
def test_axis_that_does_not_exist(axis: int) -> None:
    with pytest.raises(EvenbitsError, match=f"axis{axis} does not exist"):
        encode(torch.ones(2, 2), f"int8:axis{axis}")


def _parts(encoded: QTensor) -> dict[str, object]:
    return {name: getattr(encoded, name) for name in ("packed", "scale", "zero_point", "format", "shape", "dtype")}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"packed": torch.zeros(3, 3, dtype=torch.uint8)}, r"must be torch.uint8 \[3, 4\]; given torch.uint8 \[3, 3\]"),
        ({"packed": torch.zeros(3, 4, dtype=torch.int8)}, "given torch.int8"),
        ({"scale": torch.ones(3, 1).half()}, r"must be torch.float16 \[3, 2\]; given torch.float16 \[3, 1\]"),
        ({"scale": torch.ones(3, 2)}, r"must be torch.float16 \[3, 2\]; given torch.float32 \[3, 2\]"),
        ({"zero_point": torch.ones(3, 2, dtype=torch.int8)}, "has no zero point"),
        ({"global_scale": torch.ones(3)}, r"the factor of .* must be torch.float32 \[1\]; given torch.float32 \[3\]"),
        ({"global_scale": torch.ones(1).half()}, "given torch.float16"),
        ({"kinds": torch.ones(3, 1, dtype=torch.uint8)}, "no bits that say the kind"),
        ({"shape": (3, 9)}, r"must be torch.uint8 \[3, 5\]"),
        ({"format": Format.parse("int4:g3")}, "scales of a int4:g3"),
        ({"format": Format.parse("int8:g4")}, "codes of a int8:g4"),
    ],
)
def test_parts_that_do_not_belong_together(change: dict[str, object], words: str) -> None:
    parts = _parts(encode(torch.randn(3, 8), "int4:g4"))
    assert QTensor(**parts).nbytes == 24  # type: ignore[arg-type]
    with pytest.raises(EvenbitsError, match=words):
        QTensor(**parts | change)  # type: ignore[arg-type]
