"""Index sets against Python's own bit strings, and the largest elements against a full sort."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.codecs.indexset import IndexSet
from evenbits.comms.codecs.topk import largest
from evenbits.errors import EvenbitsError


def _rice(indices: list[int], low: int) -> tuple[str, str]:
    """Low bits and unary halves as strings of 0 and 1, in the order of the stream."""
    gaps = [b - a - 1 for a, b in zip([-1, *indices[:-1]], indices, strict=True)]
    lows = "".join(format(gap % 2**low, f"0{low}b")[::-1] for gap in gaps) if low and low < 8 else ""
    return lows, "".join("0" * (gap >> low) + "1" for gap in gaps)


def _bits(data: torch.Tensor) -> str:
    return "".join(format(byte, "08b")[::-1] for byte in data.tolist())


@given(st.integers(1, 400), st.data())
def test_a_set_comes_back_in_the_stated_room(size: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, size))
    indices = sorted(data.draw(st.permutations(range(size)))[:kept])
    mask = torch.zeros(size, dtype=torch.bool)
    mask[indices] = True
    for rice in (-1, 0, 1, 3, 7):
        written, used = IndexSet(size, kept, rice).write(mask, mask.nonzero().squeeze(1))
        assert written.numel() == IndexSet(size, kept, rice).nbytes
        assert used <= 8 * written.numel()
        assert IndexSet(size, kept, rice).read(written).equal(mask)
        if rice >= 0:
            lows, unary = _rice(indices, rice)
            stream = _bits(written)
            place = 8 * math.ceil(kept * rice / 8)
            assert stream.startswith(lows) and stream[place : place + len(unary)] == unary
            assert "1" not in stream[place + len(unary) :]
            assert used == len(lows) + len(unary)


@given(st.integers(1, 1 << 40), st.data())
def test_the_shortest_way_is_no_longer_than_a_list_of_indices(size: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, size))
    way = IndexSet.of(size, kept)
    others = [IndexSet(size, kept, rice).nbytes for rice in range(-1, 42)]
    assert way.nbytes == min(others)
    if size <= 1 << 31:
        assert way.nbytes <= 4 * kept + 1


@pytest.mark.parametrize(("share", "room"), [(0.5, 1.0), (0.3, 0.95), (0.1, 0.52), (0.05, 0.32), (0.01, 0.091)])
def test_room_and_use_per_element(share: float, room: float) -> None:
    size = 1 << 18
    mask = largest(torch.rand(size), round(share * size))
    way = IndexSet.of(size, round(share * size))
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    _, used = way.write(mask, mask.nonzero().squeeze(1))
    assert 8 * way.nbytes / size <= room + 1e-3
    assert entropy - 0.01 <= used / size <= min(1.0, entropy * 1.08)


@given(st.integers(1, 3000), st.integers(0, 99), st.sampled_from([1, 3, 100000]), st.data())
def test_the_largest_are_those_of_a_stable_sort(size: int, seed: int, values: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, size))
    x = torch.randint(0, values, (size,), generator=torch.Generator().manual_seed(seed)).float()
    expected = torch.zeros(size, dtype=torch.bool)
    expected[x.sort(descending=True, stable=True).indices[:kept]] = True
    assert largest(x, kept).equal(expected)


@pytest.mark.parametrize("make", ["gauss", "ties", "sorted", "periodic", "zeros"])
def test_the_bracket_of_a_sample_is_never_trusted(make: str) -> None:
    """Sizes beyond the sampling limit, with orders that make the sample say something wrong."""
    size = 1 << 16
    x = {
        "gauss": lambda: torch.randn(size).abs(),
        "ties": lambda: torch.randn(size).mul(2).round().abs(),
        "sorted": lambda: torch.arange(size).float(),
        "periodic": lambda: (torch.arange(size) % 64 == 0).float() * 9 + torch.rand(size),
        "zeros": lambda: torch.zeros(size),
    }[make]()
    for kept in (1, 2, 100, size // 10, size // 2, size - 1, size):
        expected = torch.zeros(size, dtype=torch.bool)
        expected[x.sort(descending=True, stable=True).indices[:kept]] = True
        assert largest(x, kept).equal(expected)


@given(st.sampled_from(["0.1", "0.3", "0.7", "0.01", "0.123456789", "1", ".5"]), st.integers(0, 10**9))
def test_the_count_is_exact_where_floating_point_is_not(ratio: str, size: int) -> None:
    codec = get(f"top{ratio}+raw")
    exact = math.ceil(Fraction(ratio) * size)
    assert codec.payload_bytes_on(Meta((size,), torch.float32), exact) == 4 * exact
    with pytest.raises(EvenbitsError, match="fewer than 2"):
        codec.payload_bytes(Meta((1 << 31,), torch.float32))
    if size:
        head = 12 + IndexSet.of(size, exact).nbytes
        assert codec.payload_bytes(Meta((size,), torch.float32)) == head + 4 * exact
    assert get(codec.spec).spec == codec.spec


@pytest.mark.parametrize("inner", ["int8:g128", "raw", "multi4x4"])
def test_the_way_back_needs_no_indices_and_counts_zeros(inner: str) -> None:
    codec, x = get(f"top0.2+{inner}"), torch.randn(6, 50)
    payload, meta = codec.encode(x), Meta.of(x)
    mask = codec.mask_of(payload, meta)
    assert mask is not None
    gradient = torch.randn(6, 50) * (torch.rand(6, 50) > 0.5)
    back = codec.encode(gradient, mask=mask)
    assert back.numel() == codec.payload_bytes_on(meta, 60) == get(inner).payload_bytes(Meta((60,), torch.float32))
    y = codec.decode(back, meta, mask=mask)
    assert not bool(y[~mask].any())
    assert y[mask].equal(get(inner).decode(get(inner).encode(gradient[mask]), Meta((60,), torch.float32)))
    with pytest.raises(EvenbitsError, match="bool mask of that shape"):
        codec.encode(gradient, mask=mask.flatten())
    with pytest.raises(EvenbitsError, match="bytes"):
        codec.decode(back[:-1], meta, mask=mask)


def test_codecs_without_an_index_set_say_so() -> None:
    codec, meta = get("int8:g128"), Meta((5,), torch.float32)
    assert not codec.keeps_mask
    assert codec.mask_of(codec.encode(torch.ones(5)), meta) is None
    with pytest.raises(EvenbitsError, match="does not code on a mask"):
        codec.payload_bytes_on(meta, 3)


@pytest.mark.parametrize(
    "spec", ["raw", "fp8", "int8:g128", "sign", "mxfp4", "multi4x4", "lloyd4", "lowrank1", "hadamard+top0.5+raw"]
)
def test_a_mask_is_never_ignored(spec: str) -> None:
    codec, x = get(spec), torch.randn(5, 5)
    with pytest.raises(EvenbitsError, match="does not code on a mask"):
        codec.encode(x, mask=x > 0)
    with pytest.raises(EvenbitsError, match="does not code on a mask"):
        codec.decode(codec.encode(x), Meta.of(x), mask=x > 0)


def test_true_bits_count_the_used_part_of_the_index_set() -> None:
    codec, x = get("top0.05+int8:g128"), torch.zeros(20000)
    x[:1000] = torch.randn(1000)
    payload, meta = codec.encode(x), Meta.of(x)
    # The kept elements lie together at the front: all gaps are zero and take one bit beside their low ones.
    way = IndexSet.of(20000, 1000)
    expected = 8 * 12 + 1000 * (way.rice + 1) + 8 * (1000 + 2 * 8)
    assert codec.true_bits(payload, meta) * 20000 == pytest.approx(expected)
    assert codec.true_bits(payload, meta) < 8 * len(payload) / 20000


def test_damaged_index_sets_are_refused() -> None:
    codec, x = get("top0.1+raw"), torch.randn(5000)
    payload, meta = codec.encode(x), Meta.of(x)
    nbytes = IndexSet.of(5000, 500).nbytes
    for change in (lambda p: p[:4].zero_(), lambda p: p[4:8].zero_(), lambda p: p[8:12].fill_(127)):
        damaged = payload.clone()
        change(damaged)
        with pytest.raises(EvenbitsError, match="header"):
            codec.decode(damaged, meta)
    for value in (0, 255):
        damaged = payload.clone()
        damaged[12 : 12 + nbytes] = value
        with pytest.raises(EvenbitsError, match="foreign or damaged"):
            codec.decode(damaged, meta)
