"""Outlier-victim pairs: the alphabet byte by byte, the three policies against a plain search, packing bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.numerics.ovp import (
    POLICIES,
    PairKind,
    decode_table,
    first_illegal,
    legal_bytes,
    nearest_outlier,
    pack_pairs,
    pair_kind,
    snap,
    unpack_pairs,
)
from evenbits.numerics.pair_loss import nearest_normal

KINDS4 = ["int", "flint", "flint_i8"]
NORMAL = {"int": range(8), "flint": (0, 1, 2, 3, 4, 6, 8, 16), "flint_i8": (0, 1, 2, 3, 4, 6, 8, 16)}
OUTLIER = {
    "int": (12, 16, 24, 32, 48, 64, 96),
    "flint": (24, 32, 48, 64, 96, 128, 192),
    "flint_i8": (20, 24, 32, 48, 64, 96, 120),
}
# Nibble tables of the published design: code → value.
INT_NIBBLES = [0, 1, 2, 3, 4, 5, 6, 7, None, -7, -6, -5, -4, -3, -2, -1]
FLINT_NIBBLES = [0, 1, 2, 3, 16, 8, 4, 6, None, -1, -2, -3, -16, -8, -4, -6]


def outlier_nibble(kind: str, code: int) -> int | None:
    if code % 8 == 0:
        return None
    return (-1 if code >= 8 else 1) * OUTLIER[kind][code % 8 - 1]


def meaning(kind: str, byte: int) -> tuple[int, int] | None:
    """What a byte means, from the definition; None if it is illegal."""
    normal = INT_NIBBLES if kind == "int" else FLINT_NIBBLES
    low, high = byte & 15, byte >> 4
    if high == 8:
        value = outlier_nibble(kind, low)
        return None if value is None else (value, 0)
    if low == 8:
        value = outlier_nibble(kind, high)
        return None if value is None else (0, value)
    a, b = normal[low], normal[high]
    assert a is not None
    assert b is not None
    return a, b


@pytest.mark.parametrize("kind", KINDS4)
def test_all_256_bytes(kind: str) -> None:
    table, legal = decode_table(pair_kind(kind)), legal_bytes(pair_kind(kind))
    for byte in range(256):
        expected = meaning(kind, byte)
        assert bool(legal[byte]) == (expected is not None), byte
        assert tuple(table[byte].tolist()) == (expected or (0, 0)), byte
    assert int(legal.sum()) == 253
    assert {byte for byte in range(256) if not legal[byte]} == {0x88, 0x08, 0x80}
    assert len({tuple(table[b].tolist()) for b in range(256) if legal[b]}) == 253  # no pair has two bytes


@pytest.mark.parametrize("kind", KINDS4)
def test_every_legal_pair_survives_packing(kind: str) -> None:
    k = pair_kind(kind)
    bytes_256 = torch.arange(256, dtype=torch.int16).to(torch.uint8)[legal_bytes(k)].reshape(1, -1)
    values = unpack_pairs(bytes_256, k)
    assert torch.equal(pack_pairs(values, k), bytes_256)
    assert torch.equal(snap(values, k), values)


def alphabet(kind: str) -> list[tuple[int, int]]:
    return [pair for byte in range(256) if (pair := meaning(kind, byte)) is not None]


@pytest.mark.parametrize("kind", KINDS4)
@given(data=st.data())
def test_optimal_is_the_nearest_pair_of_the_alphabet(kind: str, data: st.DataObject) -> None:
    numbers = st.floats(-250, 250, width=32)
    u = torch.tensor([[data.draw(numbers), data.draw(numbers)]])
    weights = torch.tensor(data.draw(st.tuples(*[st.sampled_from([0.25, 1.0, 4.0])] * 2)))

    def error(pair: tuple[float, float]) -> float:
        return sum(float(w) * (float(x) - v) ** 2 for w, x, v in zip(weights, u[0], pair, strict=True))

    chosen = snap(u, pair_kind(kind), "optimal", weights)[0].tolist()
    best = min(error(pair) for pair in alphabet(kind))
    assert error((chosen[0], chosen[1])) <= best * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("kind", KINDS4)
def test_policies_of_two_outliers(kind: str) -> None:
    k = pair_kind(kind)
    small, big = OUTLIER[kind][2], OUTLIER[kind][4]
    u = torch.tensor([[small, -big], [big, -small], [big, big]], dtype=torch.float32)
    assert snap(u, k, "reference").tolist() == [[small, 0], [big, 0], [big, 0]]
    assert snap(u, k, "paper").tolist() == [[0, -big], [big, 0], [big, 0]]
    optimal = snap(u, k, "optimal")
    assert optimal.tolist() == [[0, -big], [big, 0], [big, 0]]


@pytest.mark.parametrize("policy", ["paper", "reference"])
@pytest.mark.parametrize("kind", KINDS4)
def test_an_outlier_is_what_is_nearer_to_an_outlier_value(kind: str, policy: str) -> None:
    k = pair_kind(kind)
    edge = (max(NORMAL[kind]) + min(OUTLIER[kind])) / 2
    below, at = torch.tensor([[edge - 0.01, 3.0]]), torch.tensor([[edge, 3.0]])
    assert snap(below, k, policy).tolist() == [[max(NORMAL[kind]), 3]]
    assert snap(at, k, policy).tolist() == [[min(OUTLIER[kind]), 0]]


def test_optimal_keeps_a_valuable_victim() -> None:
    # 10 is past the threshold (9.5), but zeroing 7 would cost more than clipping 10 to 7.
    k = pair_kind("int")
    assert snap(torch.tensor([[10.0, 7.0]]), k, "optimal").tolist() == [[7, 7]]
    assert snap(torch.tensor([[10.0, 7.0]]), k, "reference").tolist() == [[12, 0]]


@pytest.mark.parametrize(("kind", "policy"), list(itertools.product([*KINDS4, "int8"], POLICIES)))
@given(
    seed=st.integers(0, 1000), rows=st.integers(1, 5), pairs=st.integers(1, 20), spread=st.sampled_from([1, 30, 1e5])
)
def test_snapped_equals_packed_then_unpacked(
    kind: str, policy: str, seed: int, rows: int, pairs: int, spread: float
) -> None:
    k = pair_kind(kind)
    u = torch.randn(rows, 2 * pairs, generator=torch.Generator().manual_seed(seed)) * spread
    values = snap(u, k, policy)
    packed = pack_pairs(values, k)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, pairs if k.bits == 4 else 2 * pairs)
    assert torch.equal(unpack_pairs(packed, k), values)
    assert first_illegal(packed, k) is None
    assert float(values.abs().max()) <= k.largest


@pytest.mark.parametrize("kind", [*KINDS4, "int8"])
def test_far_outliers_saturate_and_are_never_flushed_to_zero(kind: str) -> None:
    k = pair_kind(kind)
    u = torch.tensor([[1e9, 0.0], [0.0, -1e9], [3e38, 1.0]])
    assert snap(u, k).tolist() == [[k.largest, 0], [0, -k.largest], [k.largest, 0]]


def test_the_checker_names_the_first_illegal_byte() -> None:
    k = pair_kind("int")
    packed = torch.zeros(3, 4, dtype=torch.uint8)
    packed[1, 2], packed[2, 0] = 0x88, 0x08
    assert first_illegal(packed, k) == (1, 2, b"\x88")
    assert unpack_pairs(packed, k).abs().sum() == 0
    packed[1, 2] = 0
    assert first_illegal(packed, k) == (2, 0, b"\x08")


@pytest.mark.parametrize("kind", KINDS4)
def test_it_names_exactly_the_bytes_that_no_pair_is_written_as(kind: str) -> None:
    k = pair_kind(kind)
    every = torch.arange(256, dtype=torch.uint8).reshape(256, 1)
    refused = [byte for byte in range(256) if first_illegal(every[byte : byte + 1], k) is not None]
    assert refused == [0x08, 0x80, 0x88] == (~legal_bytes(k)).nonzero().flatten().tolist()


def test_illegal_pairs_of_8_bits() -> None:
    """Of the 65536 pairs of bytes, 255 · 255 normal ones and 2 · 128 with an outlier are written; 255 are not."""
    k = pair_kind("int8")
    codes = [sign | code for sign in (0, 0x80) for code in range(1, len(k.outliers) + 1)]
    assert len(codes) == 128
    legal = {(a, b) for a in range(256) for b in range(256) if 0x80 not in (a, b)}
    legal |= {(code, 0x80) for code in codes} | {(0x80, code) for code in codes}
    every = torch.cartesian_prod(torch.arange(256), torch.arange(256)).to(torch.uint8)
    beside_identifier = every[(every == 0x80).any(dim=1)]
    refused = {tuple(pair.tolist()) for pair in beside_identifier if first_illegal(pair[None], k) is not None}
    assert refused == {tuple(pair.tolist()) for pair in every} - legal
    assert len(refused) == 255
    assert first_illegal(every[(every != 0x80).all(dim=1)].reshape(255, -1), k) is None
    row = torch.tensor([[5, 6, 0x80, 1], [5, 6, 0x41, 0x80]], dtype=torch.uint8)
    assert first_illegal(row, k) == (1, 2, b"\x41\x80")  # 65 codes for more than 2^15


def test_the_8_bit_alphabet() -> None:
    k = pair_kind("int8")
    assert (k.normal_max, k.outliers[0], k.outliers[1], k.largest) == (127, 144, 160, 32768)
    assert list(k.outliers[:9]) == [(8 + m) << (e + 4) for e in range(2) for m in range(8)][1:10]


def test_every_4_bit_value_is_exact_in_the_types_engines_use() -> None:
    for kind in KINDS4:
        values = decode_table(pair_kind(kind))
        for dtype in (torch.float8_e4m3fn, torch.float16, torch.bfloat16):
            assert torch.equal(values.to(dtype).float(), values)
    for kind in ("int", "flint_i8"):
        assert float(decode_table(pair_kind(kind)).abs().max()) <= 127


def test_bad_input() -> None:
    k: PairKind = pair_kind("int")
    with pytest.raises(EvenbitsError, match="even number of columns"):
        snap(torch.zeros(1, 3), k)
    with pytest.raises(EvenbitsError, match="optimal"):
        snap(torch.zeros(1, 2), k, "optimum")
    with pytest.raises(EvenbitsError, match="flint_i8"):
        pair_kind("flint_i9")


@pytest.mark.parametrize("kind", [*KINDS4, "int8"])
def test_closed_forms_are_the_nearest_values(kind: str) -> None:
    """Against a scan over all values: outliers with ties to the smaller, normal values with either."""
    k = pair_kind(kind)
    outliers, normals = torch.tensor(k.outliers).float(), torch.tensor(sorted(k.normals)).float()
    middles = (outliers[1:] + outliers[:-1]) / 2
    beside = [torch.nextafter(middles, middles + 1), torch.nextafter(middles, middles - 1)]
    u = torch.cat([torch.linspace(0, 300, 6001), middles, *beside, torch.rand(2000) * 40000, torch.tensor([1e-40])])
    found = nearest_outlier(u, k, out=torch.empty_like(u))
    assert torch.equal(found, outliers[(u[:, None] - outliers).abs().argmin(1)])  # the first of equals
    normal = nearest_normal(u, k, out=torch.empty_like(u), room=torch.empty_like(u))
    assert torch.equal((normal - u).abs(), (u[:, None] - normals).abs().amin(1))
    far = torch.tensor([3.4e38, float("inf")])
    assert nearest_outlier(far, k, out=torch.empty_like(far)).tolist() == [k.largest] * 2
