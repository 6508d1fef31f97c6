"""Factors through attention, fused projections, residuals, concatenations and shared modules, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_nets import D, Handmade, affine, check_smoothing, conv, lin, proved, regions
from torch import nn
from torch.nn import functional as F

OUTSIDE = "× its tensor comes from outside the model"
HEADS, KV, SIZE = 4, 2, 3


def heads(y: torch.Tensor, count: int) -> torch.Tensor:
    """[N, T, count · SIZE] → [N, count, T, SIZE]."""
    return y.view(*y.shape[:2], count, SIZE).transpose(1, 2)


def joined(y: torch.Tensor) -> torch.Tensor:
    return y.transpose(1, 2).flatten(2)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) / SIZE**0.5).softmax(-1) @ v


def expanded(y: torch.Tensor) -> torch.Tensor:
    """As Hugging Face's repeat_kv has it."""
    n, h, t, d = y.shape
    return y[:, :, None].expand(n, h, HEADS // KV, t, d).reshape(n, HEADS, t, d)


def einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.einsum("nhqd,nhkd->nhqk", q, k).softmax(-1)
    return torch.einsum("nhqk,nhkd->nhqd", weights, v)


repeated = lambda y: y.repeat_interleave(HEADS // KV, 1)  # noqa: E731
ATTENTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "repeat_interleave": lambda q, k, v: by_hand(q, repeated(k), repeated(v)),
    "expand and reshape": lambda q, k, v: by_hand(q, expanded(k), expanded(v)),
    "SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, repeated(k), repeated(v)),
    "SDPA, causal, expanded": lambda q, k, v: F.scaled_dot_product_attention(
        q, expanded(k), expanded(v), is_causal=True
    ),
    "SDPA, enable_gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "einsum": lambda q, k, v: einsum(q, repeated(k), repeated(v)),
}


class Attention(nn.Module):
    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.norm = affine(nn.RMSNorm(D))
        self.q, self.k, self.v = lin(HEADS * SIZE), lin(KV * SIZE), lin(KV * SIZE)
        self.o, self.attend = lin(D, HEADS * SIZE), attend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.o(joined(self.attend(heads(self.q(h), HEADS), heads(self.k(h), KV), heads(self.v(h), KV))))


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_grouped_query_attention_repeats_the_factors_of_v_for_o(kind: str) -> None:
    model = Attention(ATTENTIONS[kind])
    check_smoothing(model, [torch.randn(2, 5, D)], {"{q,k,v}": "norm", "o": "the rows of v"})
    region = regions(model, torch.randn(2, 5, D).double())[1]
    kv = torch.arange(KV * SIZE).view(KV, SIZE)
    assert region.width == KV * SIZE
    assert region.index["o"].tolist() == kv.repeat_interleave(HEADS // KV, 0).flatten().tolist()


@pytest.mark.parametrize("wrong", ["repeated in the other order", "shifted"])
def test_a_wrong_repeat_of_the_heads_is_refuted(wrong: str) -> None:
    model, x = Attention(ATTENTIONS["SDPA"]).eval(), torch.randn(2, 5, D)
    _, region = regions(model, x)
    assert not proved(model, [region], x)
    index = torch.arange(KV * SIZE).repeat(HEADS // KV) if wrong.startswith("rep") else region.index["o"].roll(1)
    region.index["o"].copy_(index)
    assert proved(model, [region], x) == {"o": "the fold changed the output when tried"}


FUSED: dict[str, Callable[[torch.Tensor], Any]] = {
    "chunk": lambda y: [heads(part, HEADS) for part in y.chunk(3, -1)],
    "split": lambda y: [heads(part, HEADS) for part in y.split(HEADS * SIZE, -1)],
    "slices": lambda y: [heads(y[..., i * HEADS * SIZE : (i + 1) * HEADS * SIZE], HEADS) for i in range(3)],
    "narrow": lambda y: [heads(y.narrow(-1, i * HEADS * SIZE, HEADS * SIZE), HEADS) for i in range(3)],
    "view and select": lambda y: [y.view(*y.shape[:2], 3, HEADS, SIZE)[:, :, i].transpose(1, 2) for i in range(3)],
    "reshape, permute, unbind": lambda y: y.reshape(*y.shape[:2], 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0),
    "interleaved by head": lambda y: [
        y.view(*y.shape[:2], HEADS, 3, SIZE)[..., i, :].transpose(1, 2) for i in range(3)
    ],
}


@pytest.mark.parametrize("kind", FUSED)
def test_a_fused_projection_is_folded_into_the_rows_of_its_values(kind: str) -> None:
    body = lambda m, x: m.o(joined(by_hand(*FUSED[kind](m.qkv(m.norm(x))))))  # noqa: E731
    model = Handmade(body, norm=affine(nn.LayerNorm(D)), qkv=lin(3 * HEADS * SIZE), o=lin(D, HEADS * SIZE))
    x = torch.randn(2, 5, D)
    rows = regions(model, x)[1].parts[0].index_C
    whole = torch.arange(3 * HEADS * SIZE)
    values = whole >= 2 * HEADS * SIZE if kind != "interleaved by head" else whole // SIZE % 3 == 2
    assert torch.equal(rows >= 0, values)
    check_smoothing(model, [x], {"qkv": "norm", "o": "the rows of qkv"})


def test_queries_and_keys_that_are_normed_are_sources_of_nothing() -> None:
    """Qwen3: the inputs of q and k are smoothed, their outputs go through norms of their own."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.norm(x)
        q, k = m.qn(heads(m.q(h), HEADS)), m.kn(heads(m.k(h), HEADS))
        return m.o(joined(F.scaled_dot_product_attention(q, k, heads(m.v(h), HEADS))))

    wide = {name: lin(HEADS * SIZE) for name in "qkv"}
    norms = {"norm": affine(nn.RMSNorm(D)), "qn": affine(nn.RMSNorm(SIZE)), "kn": affine(nn.RMSNorm(SIZE))}
    model = Handmade(body, **norms, **wide, o=lin(D, HEADS * SIZE))
    check_smoothing(model, [torch.randn(2, 5, D)], {"{q,k,v}": "norm", "o": "the rows of v"})


def test_values_read_by_two_attentions_and_two_outputs_are_one_region() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.norm(x)
        v = m.v(h)
        return m.o((h @ h.mT).softmax(-1) @ v) + m.p((h @ h.mT).sigmoid() @ v)

    model = Handmade(body, norm=affine(nn.RMSNorm(D)), v=lin(), o=lin(), p=lin())
    check_smoothing(model, [torch.randn(2, 5, D)], {"v": "× it is the left factor of bmm", "{o,p}": "the rows of v"})


@pytest.mark.parametrize("inplace", [False, True])
def test_a_residual_stream_is_one_region(inplace: bool) -> None:
    """Stem, two residual blocks without norms, head: who writes to the stream is a source, who reads it a reader."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.stem(x).relu()
        for one, two in ((m.a1, m.a2), (m.b1, m.b2)):
            y = two(one(h).relu())
            h = h.add_(y) if inplace else h + y
        return m.head(h.relu().mean((2, 3)))

    model = Handmade(body, stem=conv(width=3), a1=conv(), a2=conv(), b1=conv(), b2=conv(groups=2), head=lin(4))
    stream = "the rows of {stem,a2,b2}"
    expected = {"stem": OUTSIDE, "{a1,b1,head}": stream, "a2": "the rows of a1", "b2": "the rows of b1"}
    if inplace:
        # The reader of the stream before it was written shares its memory: the same factors all the same.
        assert regions(model, torch.randn(1, 3, 5, 5))[1].parts
    check_smoothing(model, [torch.randn(2, 3, 5, 5)], expected)


def test_a_residual_stream_that_begins_outside_is_multiplied_and_its_branches_are_folded() -> None:
    body = lambda m, x: (lambda h: m.head(h + m.two(m.one(h).relu())))(x * 2.0)  # noqa: E731
    model = Handmade(body, one=lin(12), two=lin(D, 12), head=lin(4))
    expected = {
        "one": OUTSIDE,
        "two": "the rows of one",
        "head": "× computed by add, through which no factor passes",
    }
    check_smoothing(model, [torch.randn(3, D)], expected)


def test_a_stream_normed_in_place_of_its_residual_is_one_region() -> None:
    """Post-norm (BERT): the norm's output is read by layers and added to what comes after."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.n1(x)
        return m.head(m.n2(h + m.down(F.gelu(m.up(h)))))

    norms = {"n1": affine(nn.LayerNorm(D)), "n2": affine(nn.LayerNorm(D))}
    model = Handmade(body, **norms, up=lin(12), down=lin(D, 12), head=lin(4))
    expected = {"up": "× its tensor is also read by layer_norm in n2", "down": "× computed by gelu", "head": "n2"}
    check_smoothing(model, [torch.randn(3, D)], expected)


@pytest.mark.parametrize("second", ["both free", "one from outside", "the same twice"])
def test_a_concatenation_is_folded_into_all_that_is_joined(second: str) -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        a = m.a(x).relu()
        other = {"both free": lambda: m.b(x).relu(), "one from outside": lambda: x, "the same twice": lambda: a}[second]
        return m.c(torch.cat([a, other()], 1))

    sizes = {"both free": 4, "one from outside": 3, "the same twice": D}
    layers = {"b": conv(4, 3)} if second == "both free" else {}
    model = Handmade(body, a=conv(width=3), **layers, c=conv(5, D + sizes[second]))
    expected = {
        "both free": {"{a,b}": OUTSIDE, "c": "the rows of {a,b}"},
        "one from outside": {"a": OUTSIDE, "c": "× some of its channels are not scaled by"},
        "the same twice": {"a": OUTSIDE, "c": "the rows of a"},
    }[second]
    check_smoothing(model, [torch.randn(2, 3, 5, 5)], expected)


def test_parts_of_a_map_read_by_different_layers_are_regions_of_their_own() -> None:
    """A split without overlap: two regions fold into different rows of one layer."""
    body = lambda m, x: (lambda y: m.b(y[:, :4]) + m.c(y.narrow(1, 4, 4)))(m.a(x).relu())  # noqa: E731
    model = Handmade(body, a=conv(width=3), b=conv(4, 4), c=conv(4, 4))
    found = regions(model, torch.randn(2, 3, 5, 5))
    assert [region.parts[0].index_C.tolist() for region in found[1:]] == [
        [0, 1, 2, 3] + [-1] * 4,
        [-1] * 4 + [0, 1, 2, 3],
    ]
    check_smoothing(model, [torch.randn(2, 3, 5, 5)], {"a": OUTSIDE, "b": "the rows of a", "c": "the rows of a"})


def test_squeeze_and_excitation_reads_the_map_through_its_mean() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x).relu()
        gate = torch.sigmoid(m.up(m.down(y.mean((2, 3), keepdim=True)).relu()))
        return m.b(y * gate)

    model = Handmade(body, a=conv(width=3), down=conv(2, kernel=1), up=conv(D, 2, kernel=1), b=conv(4))
    expected = {"a": OUTSIDE, "{down,b}": "the rows of a", "up": "the rows of down"}
    check_smoothing(model, [torch.randn(2, 3, 5, 5)], expected)


def test_a_block_that_runs_twice_is_one_block() -> None:
    """ALBERT: one set of layers for every depth."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = affine(nn.LayerNorm(D)), lin(12), lin(D, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(self.norm(x)).relu())

    model = Handmade(lambda m, x: m.again(m.block(m.block(x))), block=Block())
    model.again = model.block
    check_smoothing(model, [torch.randn(3, D)], {"block.up": "block.norm", "block.down": "the rows of block.up"})


def test_experts_the_router_and_a_shared_expert_read_one_norm() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.norm(x)
        chosen = m.router(h).softmax(-1)
        y = m.shared(h.relu())
        for number, expert in enumerate(m.experts):
            rows = torch.where(chosen.argmax(-1) == number)[0]
            y = y.index_add(0, rows, expert(h[rows]) * chosen[rows, number, None])
        return y

    experts = nn.ModuleList([nn.Sequential(lin(12), nn.ReLU(), lin(D, 12)) for _ in range(3)])
    model = Handmade(body, norm=affine(nn.RMSNorm(D)), router=lin(3), experts=experts, shared=lin())
    inner = {f"experts.{i}.2": f"the rows of experts.{i}.0" for i in range(3)}
    expected = {"router,shared,experts.0.0,experts.1.0,experts.2.0": "norm", **inner}
    check_smoothing(model, [torch.randn(64, D)], expected)
