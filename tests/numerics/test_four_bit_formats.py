"""Spelling, fitting and storage of the formats that are not plain integers."""

from __future__ import annotations

import pytest
import torch

from evenbits.errors import EvenbitsError
from evenbits.numerics.codebook import Codebook
from evenbits.numerics.elements import PairType, TypeChoice
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format
from evenbits.numerics.granularity import Granularity
from evenbits.numerics.qdtypes import QDtype
from evenbits.numerics.qtensor import QTensor

EVERY = [
    *(
        f"{name}:{grain}"
        for name in ("int4", "flint4", "pot4", "nf4", "fp4", "fp8")
        for grain in ("tensor", "row", "g16")
    ),
    *(
        f"ovp4{kind}:{grain}"
        for kind in ("", "-int", "-flint", "-flint_i8", "-i8")
        for grain in ("tensor", "row", "g32")
    ),
    *(
        "ovp4:row:paper",
        "ovp4-mix:g32:reference",
        "ovp4:row:3sigma",
        "ovp4-int:tensor:3sigma:reference",
        "ovp8:g32:p99.5",
    ),
    *("mxfp4", "mxfp4:mse", "nvfp4", "nvfp4:mse", "ant4:row", "ant3:tensor:minmax", "flint4:axis1", "int4:row:7.5:mse"),
    *("fp6_e3m2:row", "fp8_e5m2:tensor", "flint8:row", "pot8:row", "uflint4:row", "upot4:tensor", "ufp4_e3m1:g32"),
]


@pytest.mark.parametrize("spelling", EVERY)
def test_spelling_and_parse_are_inverse(spelling: str) -> None:
    fmt = Format.parse(spelling)
    assert Format.parse(str(fmt)) == fmt
    stored = encode(torch.rand(3, 48), spelling).format
    assert Format.parse(str(stored)) == stored
    assert not isinstance(stored.dtype, TypeChoice)
    if isinstance(stored.dtype, PairType):
        assert not stored.dtype.is_choice


@pytest.mark.parametrize(
    ("spelling", "stored"),
    [
        ("flint4:row:mse", "flint4:row"),
        ("flint4:row:minmax", "flint4:row:minmax"),
        ("int4:row:minmax", "int4:row"),
        ("nf4:channel", "nf4:row"),
        ("ovp4:token", "ovp4:row"),
        ("ovp4-int:row:mse", "ovp4-int:row"),
        ("mxfp4:minmax", "mxfp4"),
        ("nvfp4:mse", "nvfp4:mse"),
        ("ovp8:g32:p99.50", "ovp8:g32:p99.5"),
    ],
)
def test_one_spelling_is_stored(spelling: str, stored: str) -> None:
    assert str(Format.parse(spelling)) == stored


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("ovp5:row", "Did you mean 'ovp"),
        ("ovp8-int:row", "8-bit pairs have one kind"),
        ("ovp4-mix:row", "needs groups"),
        ("ovp4:axis0", "pairs run along the last dimension"),
        ("ovp4:row:affine", "only integer types have affine formats"),
        ("flint4:row:7.5", "unknown option '7.5'"),
        ("flint4:row:3sigma", "'3sigma' is for pairs"),
        ("mxfp4:g16", "unknown option 'g16'"),
        ("nvfp4:mse:minmax", "contradict"),
        ("abfloat4_b2:row", "has no zero"),
        ("upot8:row", "beyond float32"),
        ("fp5:row", "spell it out: fp5_e1m3, fp5_e2m2, fp5_e3m1"),
    ],
)
def test_formats_that_do_not_exist(spelling: str, words: str) -> None:
    with pytest.raises(EvenbitsError) as caught:
        Format.parse(spelling)
    assert words in str(caught.value)


def test_groups_of_pairs_are_even() -> None:
    assert str(Format.parse("ovp4:g128").fitted((3, 5))) == "ovp4:g6"
    assert str(Format.parse("ovp4:g128").fitted((3, 40))) == "ovp4:g40"
    assert str(Format.parse("ovp8:g16").fitted((3, 40))) == "ovp8:g16"
    assert str(Format.parse("mxfp4").fitted((3, 5))) == "mxfp4"
    for shape in ((3, 40), (3, 5), (33,)):
        with pytest.raises(EvenbitsError, match="pairs need groups of an even size"):
            Format.parse("ovp4:g33").fitted(shape)
    # A group that shrinks to its row changes how its scale is stored, and the format that is recorded says so.
    encoded = encode(torch.randn(3, 40), "ovp4-int:g128")
    assert (str(encoded.format), encoded.scale.dtype) == ("ovp4-int:g40", torch.float8_e4m3fn)
    assert encode(torch.tensor(2.5), "ovp4:row").dequantize().shape == ()


@pytest.mark.parametrize(
    ("spelling", "storage"),
    [
        *[(f"int{bits}:row", "float16") for bits in range(2, 8)],
        *[("int8:row", "float32"), ("int8:g32", "float32"), ("int4:tensor", "float32"), ("ovp4:tensor", "float32")],
        *[("int4:g16", "float16"), ("uint4:g16:affine", "float16"), ("uint4:row:affine:free", "float32")],
        *[("ovp4:row", "float16"), ("ovp4:g64", "float16"), ("ovp4:g62", "e4m3"), ("ovp4:g32", "e4m3")],
        *[("flint4:axis0", "float16"), ("nf4:g64", "float16"), ("fp8:g32", "e4m3"), ("mxfp4", "e8m0")],
        *[("nvfp4", "e4m3"), ("ovp8:g16", "e4m3")],
    ],
)
def test_how_scales_are_stored(spelling: str, storage: str) -> None:
    assert Format.parse(spelling).storage == storage


def test_cached_tables_survive_a_foreign_default_device() -> None:
    fmt = Format.parse("ovp4-int:row")
    with torch.device("meta"):
        QTensor.empty(fmt, (4, 6), global_scale=False).dequantize()
        book = Codebook.parse("fp6_e3m2")
        assert book.quantize(torch.zeros(2, device="cpu")).device.type == "cpu"
    assert encode(torch.randn(4, 6), fmt).dequantize().device.type == "cpu"
    assert encode(torch.randn(4, 6), "fp6_e3m2:row").dequantize().device.type == "cpu"


def test_elements_are_what_the_format_names() -> None:
    assert Format.parse("int4:row") == Format(QDtype(4, True), Granularity("row"))
    assert Format.parse("ovp4-flint_i8:row").dtype == PairType(4, "flint_i8")
