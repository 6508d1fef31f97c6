"""Candidates at one budget: bits that are true, the finest granularity that fits, and reasons where none does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format
from evenbits.pipeline.candidates import TOLERANCE, candidates_for, fit, true_bits

FAMILIES = ("int4:g*:mse", "int4:g*:7.5:mse", "flint4:g*", "nf4:g*:mse", "ovp4:g*", "ovp4-mix:g*", "int8:g*", "ant4:g*")
SIZES = (16, 32, 64, 128, 256, 512, 1024)


@given(
    spelling=st.sampled_from(
        ["int4:row:mse", "int4:g32", "int4:g64:affine", "nf4:g16", "nf4:g64", "ovp4-int:g32", "ovp4-flint:row",
         "ovp4-mix:g16", "flint4:g48", "mxfp4", "nvfp4", "int8:row", "int8:tensor", "ovp8:g32"]
    ),
    rows=st.integers(1, 9),
    columns=st.integers(2, 150),
)  # fmt: skip
def test_bits_are_those_of_the_encoded_tensor(spelling: str, rows: int, columns: int) -> None:
    encoded = encode(torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)), spelling)
    factor = 0 if encoded.global_scale is None or encoded.scale.dtype != torch.float16 else 32
    told = true_bits(Format.parse(spelling), (rows, columns))
    assert told == pytest.approx(encoded.bits_per_element - factor / (rows * columns), abs=1e-12)


@pytest.mark.parametrize("spelling", ["ovp4:g32", "ovp4-i8:row", "ant4:row", "ant4:g32"])
def test_a_choice_costs_at_most_what_is_told(spelling: str) -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(16, 96, generator=generator) ** (1 + 2 * (seed % 2))  # of both members' taste
        assert encode(x, spelling).bits_per_element <= true_bits(Format.parse(spelling), (16, 96)) + 1e-9


@pytest.mark.parametrize(
    ("candidate", "columns", "budget", "expected", "bits"),
    [
        ("int4:g*:mse", 384, 4.25, "int4:g64:mse", 4.25),
        ("int4:g*:7.5:mse", 384, 4.5, "int4:g32:7.5:mse", 4.5),
        ("nf4:g*:mse", 384, 4.25, "nf4:g32:mse", 4.25),  # E4M3 for 32 costs what float16 costs for 64, and is finer
        ("nf4:g*:mse", 384, 4.2, "nf4:g128:mse", 4.125),
        ("ovp4:g*", 384, 4.25, "ovp4:g32", 4.25),
        ("ovp4:g*", 384, 4.5, "ovp4:g16", 4.5),
        ("ovp4-mix:g*", 512, 4.3, "ovp4-mix:g32", 4.281),
        ("ovp4:g*", 64, 4.25, "ovp4:g32", 4.25),
        ("int4:g*", 64, 4.25, "int4:row", 4.25),  # a group as wide as the row is the row
        ("nf4:g*", 16, 4.5, "nf4:g16", 4.5),  # unless its scale takes fewer bits
        ("nf4:g*", 16, 5.0, "nf4:row", 5.0),
        ("ovp4:row", 384, 4.25, "ovp4:row", 4.042),
        ("int4:g*", 2048, 4.0, "int4:row", 4.008),  # inside the tolerance
        ("int4:g*", 2048, 4.01, "int4:g1024", 4.016),
        ("int4:g*", 2048, 99.0, "int4:g16", 5.0),
    ],
)
def test_the_most_bits_that_fit(candidate: str, columns: int, budget: float, expected: str, bits: float) -> None:
    found = fit(candidate, (4096, columns), budget)
    assert str(found.format) == expected and found.bits == pytest.approx(bits, abs=2e-3) and not found.reason


@given(
    candidate=st.sampled_from(FAMILIES),
    rows=st.integers(1, 400),
    columns=st.integers(1, 1200),
    budget=st.floats(4.0, 9.0),
)
def test_nothing_finer_would_have_fitted(candidate: str, rows: int, columns: int, budget: float) -> None:
    found = fit(candidate, (rows, columns), budget)
    offered = {
        size: true_bits(Format.parse(candidate.replace("g*", f"g{size}")), (rows, columns))
        for size in SIZES
        if size < columns
    }
    if found.format is None:
        assert min([*offered.values(), found.bits]) > budget + TOLERANCE
        assert found.reason == f"takes {found.bits:.3f} bits or more on rows of {columns}"
        return
    assert found.bits <= budget + TOLERANCE
    assert found.bits == true_bits(found.format, (rows, columns))
    assert all(bits <= found.bits for bits in offered.values() if bits <= budget + TOLERANCE)


@pytest.mark.parametrize("name", ["ovp4:row", "nf4:g*:mse", "mxfp4", "int8:row"])
def test_narrow_rows_cannot_have_four_bits(name: str) -> None:
    found = fit(name, (32, 9), 4.25)
    assert found.format is None and found.reason.startswith("takes ") and found.reason.endswith("rows of 9")


def test_a_factor_that_matters_moves_a_tiny_layer_to_larger_groups() -> None:
    assert str(fit("ovp4:g*", (2, 384), 4.25).format) == "ovp4:g64"


def test_the_defaults() -> None:
    floats = candidates_for(None, None)
    assert len(set(floats)) == len(floats) == 6 and "ovp4:row" in floats
    integers = candidates_for(None, Format.parse("int8:row"))
    assert set(integers) - set(floats) == {"int4:row:7.5:mse", "ovp4-i8:row"}  # multiplied in integers with int8 inputs
    assert candidates_for(None, Format.parse("ovp4:row")) == floats
    for name in (*floats, *integers):
        assert fit(name, (384, 384), 4.25).format is not None
    assert candidates_for(["int4:row"], None) == ("int4:row",)


@pytest.mark.parametrize(
    ("given_names", "words"),
    [
        (["int4:g*:mse", "ovp5:g*"], "'ovp5'"),
        (["int4:gx"], "unknown granularity 'gx'"),
        (["nf4:g*:affine"], "affine"),
        (["int4"], "TYPE:GRANULARITY"),
        (["int4:g*", "ovp4:row", "int4:g*"], "'int4:g*' is named twice"),
        (["int4:axis1"], "another axis"),
        ([], "no candidate"),
        ("int4:g*", "must be a list"),
        (4, "must be a list"),
        ([4], "is spelled as a format"),
    ],
)
def test_wrong_candidates_are_named(given_names: object, words: str) -> None:
    with pytest.raises(EvenbitsError) as caught:
        candidates_for(given_names, None)  # type: ignore[arg-type]
    assert words in str(caught.value)
