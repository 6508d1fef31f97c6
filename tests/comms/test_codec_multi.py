"""Multi-partition codes against the original procedure written out chunk by chunk, and its cuts against brute force."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
import torch

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.codecs.histogram import cube_root, histogram, least_error
from evenbits.comms.codecs.multi import Multi
from evenbits.errors import EvenbitsError
from evenbits.numerics.metrics import sqnr_db


def _original(x: torch.Tensor, bits: int, parts: int) -> torch.Tensor:
    """Sort descending, chunk, min/max grid of each chunk, and back to where the elements came from."""
    values, order = x.flatten().sort(descending=True)
    decoded = []
    for chunk in values.chunk(parts):
        lo, step = chunk.min(), (chunk.max() - chunk.min()) / (2**bits - 1)
        decoded.append(lo + ((chunk - lo) / step).round() * step if step > 0 else chunk)
    made = torch.empty_like(values)
    made[order] = torch.cat(decoded)
    return made.view(x.shape)


@pytest.mark.parametrize(("bits", "parts"), [(8, 8), (4, 16), (2, 4), (1, 2), (8, 64), (6, 4), (8, 1)])
@pytest.mark.parametrize("size", [5, 64, 1000])
def test_the_sorted_form_is_the_original(bits: int, parts: int, size: int) -> None:
    x = torch.randn(size) * torch.exp(torch.randn(size))
    codec = get(f"multi{bits}x{parts}")
    torch.testing.assert_close(
        codec.decode(codec.encode(x), Meta.of(x)), _original(x, bits, parts), rtol=1e-5, atol=1e-5
    )


def test_pruned_and_partitioned_as_the_original_does() -> None:
    x = torch.randn(4, 64)
    codec = get("top0.5+multi8x8")
    y = codec.decode(codec.encode(x), Meta.of(x))
    kept = x.flatten().abs().topk(128).indices.sort().values
    expected = torch.zeros(256)
    expected[kept] = _original(x.flatten()[kept], 8, 8)
    torch.testing.assert_close(y.flatten(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "parts", "true"), [(8, 8, 11), (4, 16, 8), (8, 64, 14), (6, 4, 8), (8, 1, 8)])
def test_the_real_bits_have_the_part_in_them(bits: int, parts: int, true: int) -> None:
    size = 1 << 16
    codec, meta = get(f"multi{bits}x{parts}"), Meta((size,), torch.float32)
    assert codec.payload_bytes(meta) == true * size // 8 + 8 * parts


def test_decoding_is_one_table() -> None:
    codec = get("multi2x4")
    assert isinstance(codec, Multi)
    grids = torch.tensor([[3.0, 1.0], [1.0, 0.5], [-1.0, 0.25], [-4.0, 0.75]])
    table = codec.table(grids)
    assert table.tolist() == [3, 4, 5, 6, 1, 1.5, 2, 2.5, -1, -0.75, -0.5, -0.25, -4, -3.25, -2.5, -1.75]
    payload = torch.cat([grids.view(-1).view(torch.uint8), torch.tensor([0x21, 0xF7], dtype=torch.uint8)])
    assert codec.decode(payload, Meta((4,), torch.float32)).tolist() == [4, 5, 2.5, -1.75]


def _cost(found: torch.Tensor, cuts: tuple[int, ...]) -> float:
    """Σ P w² of sorted elements cut at places in the order."""
    places = [0, *cuts, len(found)]
    parts = [found[a:b] for a, b in pairwise(places) if a < b]
    return sum(len(part) * float(part[-1] - part[0]) ** 2 for part in parts)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_dynamic_programming_finds_the_best_cut_there_is(seed: int, parts: int) -> None:
    """Twelve elements in bins of their own: all cuts can be tried."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(12, generator=generator) ** 3 + 0.05).cumsum(dim=0)[torch.randperm(12, generator=generator)] - 1
    found = histogram(x, 512)
    assert int(found.counts_B.max()) == 1
    part_n = least_error(found, parts)[found.bins_n.long()]
    ordered = x.double().sort().values
    best = min(_cost(ordered, cuts) for cuts in combinations(range(13), parts - 1))
    chosen = sum(
        int((part_n == part).sum()) * float(x[part_n == part].double().max() - x[part_n == part].double().min()) ** 2
        for part in part_n.unique()
    )
    assert chosen == pytest.approx(best, rel=1e-9)


def test_bins_hold_what_they_say() -> None:
    x = torch.randn(5000) * torch.exp(2 * torch.randn(5000))
    found = histogram(x, 64)
    assert int(found.counts_B.sum()) == 5000
    for b in range(64):
        inside = x[found.bins_n == b]
        assert len(inside) == int(found.counts_B[b])
        if len(inside):
            assert (float(inside.min()), float(inside.max())) == (float(found.least_B[b]), float(found.most_B[b]))
    used = found.counts_B > 0
    assert bool((found.most_B[used][:-1] <= found.least_B[used][1:]).all())


def test_the_cube_root_rule_cuts_where_its_formula_says() -> None:
    """Of a normal density f^(1/3) is a normal density √3 as wide: its quartiles are the edges of four parts."""
    x = torch.randn(1 << 18)
    found = histogram(x, 2048)
    part_n = cube_root(found, 4)[found.bins_n.long()]
    edges = [float(x[part_n == part].max()) for part in range(3)]
    quartile = 0.6744898 * math.sqrt(3)
    assert edges == pytest.approx([-quartile, 0, quartile], abs=0.08)


@pytest.mark.parametrize("rate", [(2, 4), (6, 4)])
def test_the_cuts_beat_the_sort_on_tails(rate: tuple[int, int]) -> None:
    x = torch.randn(1 << 16) * torch.exp(torch.randn(1 << 16))
    name = f"multi{rate[0]}x{rate[1]}"
    found = {}
    for cut in ("", ":cuberoot", ":dp"):
        codec = get(name + cut)
        found[cut] = sqnr_db(x, codec.decode(codec.encode(x), Meta.of(x)))
    assert found[":cuberoot"] > found[""] + 6
    assert found[":dp"] > found[""] + 6


@pytest.mark.parametrize("cut", ["cuberoot", "dp"])
@pytest.mark.parametrize("rate", ["1x2", "1x1", "2x4", "8x8"])
def test_zero_and_its_neighbours_are_not_moved_by_one_amount(cut: str, rate: str) -> None:
    x = torch.randn(3000)
    x[::2] = 0
    codec = get(f"multi{rate}:{cut}")
    y = codec.decode(codec.encode(x), Meta.of(x))
    assert not bool(y[::2].any())


def test_a_grid_that_no_encoder_writes_is_refused() -> None:
    codec, meta = get("multi4x2"), Meta((8,), torch.float32)
    payload = codec.encode(torch.randn(8))
    for value in (math.nan, math.inf, -1.0):
        damaged = payload.clone()
        damaged[4:8] = torch.tensor([value]).view(torch.uint8)
        with pytest.raises(EvenbitsError, match="grid is not finite"):
            codec.decode(damaged, meta)
