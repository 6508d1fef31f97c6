"""Paths through which nothing may be folded: the rules multiply and say why; past the rules the proof refutes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_nets import D, Handmade, affine, check_smoothing, conv, forced, layouts, lin, proved, regions, report
from torch import nn
from torch.nn import functional as F

from evenbits.graph.regions import Part, Region, find_regions
from evenbits.graph.trace import trace
from evenbits.graph.variables import Source
from evenbits.pipeline.plan import plan_layers
from evenbits.schemes.scheme import Scheme

OUTSIDE = "× its tensor comes from outside the model"


def written(y: torch.Tensor) -> torch.Tensor:
    y[:, 1] = 1.0
    return y


CURVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ReLU6": F.relu6,
    "ReLU6 in place": lambda y: F.relu6(y, inplace=True),
    "Hardtanh": F.hardtanh,
    "clamp": lambda y: y.clamp(max=1.0),
    "GELU": F.gelu,
    "SiLU": F.silu,
    "SiLU in place": lambda y: F.silu(y, inplace=True),
    "SiLU by hand": lambda y: y * torch.sigmoid(y),
    "Hardswish": F.hardswish,
    "ELU": F.elu,
    "SELU": F.selu,
    "softplus": F.softplus,
    "Mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softmax": lambda y: y.softmax(1),
    "square": lambda y: y * y,
    "square by hand": lambda y: y * (y + 0.0),
    "power": lambda y: y**2,
    "square root": lambda y: (y.abs() + 1e-3).sqrt(),
    "reciprocal": lambda y: 1.0 / (y.abs() + 1e-3),
    "divided by itself": lambda y: y / y.abs().amax((2, 3), keepdim=True),
    "divided by its mean": lambda y: (y + 0.0) / (y.abs().mean((2, 3), keepdim=True)),
    "unit length": lambda y: F.normalize(y, dim=1),
    "a number added": lambda y: y + 1.0,
    "a number subtracted": lambda y: 1.0 - y,
    "a map added": lambda y: y + torch.arange(36.0).view(6, 6),
    "LayerNorm without a gain": lambda y: F.layer_norm(y.transpose(1, 3), [D]).transpose(1, 3),
    "GroupNorm without a gain": lambda y: F.group_norm(y, 2),
    "BatchNorm without a gain": lambda y: F.batch_norm(y, torch.ones(D).double(), torch.ones(D).double()),
    "local response": lambda y: F.local_response_norm(y, 2),
    "pooling over channels": lambda y: F.avg_pool2d(y.transpose(1, 3), 3, 1, 1).transpose(1, 3),
    "mean over channels": lambda y: y.mean(1, keepdim=True).expand(-1, D, -1, -1),
    "maximum over channels": lambda y: y.amax(1, keepdim=True) + 0 * y,
    "mean of all": lambda y: y.mean() * torch.ones_like(y),
    "sum over no dimension": lambda y: y.sum(dim=[]) * torch.ones_like(y),
    "padding with ones": lambda y: F.pad(y, (1, 1), value=1.0),
    "channels padded with ones": lambda y: F.pad(y, (0, 0, 0, 0, 1, 0), value=1.0)[:, :D],
    "channels of ones before": lambda y: torch.cat([torch.ones_like(y[:, :1]), y[:, 1:]], 1),
    "zeros that were written to": lambda y: torch.cat([torch.zeros_like(y[:, :1]).add_(1.0), y[:, 1:]], 1),
    "zeros that were written to in part": lambda y: torch.cat([written(torch.zeros_like(y[:, :2])), y[:, 2:]], 1),
    "channels and rows swapped": lambda y: F.interpolate(y.transpose(1, 2), (2 * D, 6)).transpose(1, 2)[:, 3 : 3 + D],
    "where": lambda y: torch.where(y > 0.1, y, 0.05 * torch.ones_like(y)),
    "masked fill": lambda y: y.masked_fill(y < 0.3, 0.3),
    "threshold": lambda y: F.threshold(y, 0.3, 0.0),
    "hard shrink": lambda y: F.hardshrink(y, 0.3),
    "sorted channels": lambda y: y.sort(1).values,
    "top channels": lambda y: y.topk(D, 1).values,
    "whole numbers": lambda y: (y * 3).to(torch.int64).double(),
    "rounded": lambda y: (y * 3).round(),
    "sign": lambda y: y.sign() + 0.1,
    "cumulated channels": lambda y: y.cumsum(1),
    "numpy": lambda y: torch.from_numpy(y.detach().numpy().copy()).tanh(),
    "complex": lambda y: torch.fft.rfft2(y, dim=(1, 2)).real.repeat(1, 1, 2, 1)[:, :, :6],
}


@pytest.mark.parametrize("case", CURVES)
def test_what_does_not_commute_with_factors_is_multiplied(case: str) -> None:
    model = Handmade(lambda m, x: m.b(CURVES[case](m.a(x) * 2.0)), a=conv(width=3), b=conv(4))
    check_smoothing(model, [torch.randn(2, 3, 6, 6) * 3], {"a": OUTSIDE, "b": "×"})


@pytest.mark.parametrize("case", CURVES)
def test_a_fold_forced_through_it_is_refuted(case: str) -> None:
    model = Handmade(lambda m, x: m.b(CURVES[case](m.a(x) * 2.0)), a=conv(width=3), b=conv(4)).double().eval()
    failed = proved(model, [forced(model, ["b"], "a")], torch.randn(2, 3, 6, 6).double() * 3)
    assert failed == {"b": "the fold changed the output when tried"}


READERS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], str]] = {
    "LayerNorm": (lambda m, y: F.layer_norm(y.movedim(1, -1), [D]).mean(), "also read by layer_norm in the model"),
    "GroupNorm": (lambda m, y: m.norm(y).mean(), "also read by group_norm in norm"),
    "RMS by hand": (lambda m, y: y.pow(2).mean(), "also read by pow"),
    "softmax": (lambda m, y: y.softmax(1).amax(), "also read by _softmax"),
    "SiLU": (lambda m, y: F.silu(y).mean(), "also read by silu"),
    "a shape with figures": (lambda m, y: torch.histc(y, 4).amax(), "also read by histc"),
    "a branch in Python": (lambda m, y: 1.0 if y.mean() > 0 else 2.0, "also read by mean"),
    "an index": (lambda m, y: y.argmax(1).double().mean(), "also read by argmax"),
    "embedding": (lambda m, y: m.table(y[:, 0].long()).mean(), "also read by _to_copy"),
    "scatter": (lambda m, y: torch.zeros_like(y).scatter(1, torch.zeros_like(y).long(), y).amax(), "read by scatter"),
    "a copy into a buffer": (lambda m, y: torch.zeros(2, D, 9, 9).double()[:, :, :6, :6].copy_(y).mean(), "by copy"),
}


@pytest.mark.parametrize("case", READERS)
def test_a_reader_beside_the_layer_is_named(case: str) -> None:
    other, reason = READERS[case]
    body = lambda m, x: (lambda y: m.b(y) * other(m, y))(m.a(x).relu())  # noqa: E731
    parts = {"norm": affine(nn.GroupNorm(2, D)), "table": nn.Embedding(50, 3)}
    model = Handmade(body, a=conv(width=3), **parts, b=conv(4))
    x = torch.randn(2, 3, 6, 6).double()
    (_, region) = regions(model.double(), x)
    assert not region.parts and reason in region.reason, region.reason
    if case not in ("an index", "a branch in Python", "embedding"):  # powers of two may leave these as they are
        assert proved(model, [forced(model, ["b"], "a")], x)


def test_a_value_that_the_model_returns_or_keeps_is_multiplied() -> None:
    def keeps(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.kept = {"deep": [m.a(x).relu()]}
        return m.b(m.kept["deep"][0])

    for body in (
        keeps,
        lambda m, x: (lambda y: (m.b(y), y))(m.a(x).relu()),
        lambda m, x: (lambda y: (m.b(y), y[:, :2].detach()))(m.a(x)),
        lambda m, x: (lambda y: {"logits": m.b(y), "pooled": y.mean((2, 3))})(m.a(x)),
        lambda m, x: (lambda y: (m.b(y), y.mT.contiguous()))(m.a(x)),
    ):
        model = Handmade(body, a=conv(width=3), b=conv(4))
        check_smoothing(model, [torch.randn(2, 3, 6, 6)], {"a": OUTSIDE, "b": "× its tensor is an output of the model"})


def test_tied_weights_are_refused_by_name_and_fold_nothing() -> None:
    body = lambda m, x: m.head(m.mid(m.a(x).relu()).relu())  # noqa: E731
    model = Handmade(body, a=lin(), mid=lin(), head=lin()).eval()
    model.head.weight = model.mid.weight
    plans = {plan.name: plan for plan in plan_layers(model, Scheme(weights="int8:row"))}
    assert plans["mid"].reason == "its weight is tied to head.weight"
    assert plans["head"].reason == "its weight is tied to mid.weight"
    known = {name: plan.layout for name, plan in plans.items() if plan.layout is not None}
    assert list(known) == ["a"]
    x = torch.randn(3, D)
    (region,) = find_regions(trace(model, lambda: model(x), known), {"a": D})
    assert region.reason == "its tensor comes from outside the model"
    # Forced all the same: rows of one weight are the other's, too.
    assert proved(model, [forced(model, ["head"], "mid")], x)
    assert proved(model, [forced(model, ["mid"], "a")], x) == {}


def test_a_tied_bias_is_divided_for_both_and_refuted() -> None:
    body = lambda m, x: (m.b(m.a(x).relu()), m.c(x))  # noqa: E731
    model = Handmade(body, a=lin(), b=lin(), c=lin()).eval()
    model.c.bias = model.a.bias
    x = torch.randn(3, D)
    found = [region for region in regions(model, x) if region.layers == ("b",)]
    assert all(not region.parts for region in found) or proved(model, found, x)
    assert proved(model, [forced(model, ["b"], "a")], x)


def test_an_embedding_tied_to_the_head_leaves_the_last_norm_foldable_only_if_nobody_else_reads_it() -> None:
    body = lambda m, i: m.head(m.norm(m.mid(m.embed(i))))  # noqa: E731
    model = Handmade(body, embed=nn.Embedding(9, D), mid=lin(), norm=affine(nn.RMSNorm(D)), head=lin(9, bias=False))
    model.head.weight = model.embed.weight
    known = {name: layout for name, layout in layouts(model).items() if name != "head"}
    ids = torch.arange(9)
    found = find_regions(trace(model.eval(), lambda: model(ids), known), {"mid": D})
    assert report(found) == {"mid": "× computed by embedding, through which no factor passes"}
    assert proved(model, [forced(model, ["head"], "norm.weight")], ids) == {}  # legal, if head were not an embedding


def test_an_expert_to_which_nothing_is_routed_prevents_the_fold_though_the_proof_sees_nothing() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([lin(), lin()])

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return self.experts[0](h)

    model = Handmade(lambda m, x: m.mixture(m.norm(x)), norm=affine(nn.RMSNorm(D)), mixture=Mixture())
    x = torch.randn(3, D)
    (region,) = regions(model, x)
    assert region.reason == "mixture.experts.1, which did not run, may read it"
    assert proved(model, [forced(model, ["mixture.experts.0"], "norm.weight")], x) == {}


def test_a_block_that_is_left_out_prevents_folds_of_what_it_could_read_and_of_nothing_else() -> None:
    """Early exit: the second block did not run, so its norm is unseen, but it may read the stream."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = affine(nn.RMSNorm(D)), lin(12), lin(D, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(self.norm(x)).relu())

    body = lambda m, x: m.head(m.one(m.stem(x)))  # noqa: E731
    model = Handmade(body, stem=lin(), one=Block(), two=Block(), head=lin())
    expected = {
        "stem": OUTSIDE,
        "one.up": "one.norm",
        "one.down": "the rows of one.up",
        "head": "× its tensor is also read by",
    }
    check_smoothing(model, [torch.randn(3, D)], expected)


def test_a_parameter_that_multiplies_twice_is_no_source() -> None:
    gain = nn.Parameter(torch.rand(D) + 0.5)
    for body in (
        lambda m, x: m.b(m.gain * F.normalize(x) * m.gain),
        lambda m, x: m.b(F.normalize(x) * (m.gain * m.gain)),
        lambda m, x: m.b(F.normalize(x) * m.gain.exp()),
        lambda m, x: m.b(F.normalize(x) * (1 + 2 * m.gain)),
        lambda m, x: m.b(F.normalize(x) * (1 + m.gain)) + F.normalize(x) * m.gain,
        lambda m, x: m.b(F.normalize(x) * (1 + m.gain)) + (m.gain + 0.5).relu(),
        lambda m, x: m.b(F.normalize(x) * (1 + m.gain)) + m.gain.chunk(2)[1].repeat(2),
        lambda m, x: m.b(F.normalize(x) * (1 + m.gain)) + m.gain[:1].exp(),
        lambda m, x: m.b(F.normalize(x) * (1 + m.gain)) + 0.1 * F.linear(x, torch.eye(D).to(x), m.gain),
        lambda m, x: m.b((x.clone().mul_(m.gain) + x).tanh() * m.gain),
        lambda m, x: m.b(F.normalize(x) * m.gain) + (x / m.gain),
    ):
        model = Handmade(body, gain=nn.Parameter(gain.detach().clone()), b=lin())
        check_smoothing(model, [torch.randn(3, D)], {"b": "×"})
        fresh = Handmade(body, gain=gain, b=lin()).eval()
        assert proved(fresh, [forced(fresh, ["b"], "gain")], torch.randn(3, D))


def test_operations_that_change_shapes_in_place_or_types_or_leave_nothing_are_survived() -> None:
    for body in (
        lambda m, x: m.b(m.a(x).unsqueeze_(0).squeeze_(0)),
        lambda m, x: m.b(m.a(x).t_().t_()),
        lambda m, x: m.b(m.a(x).view(torch.int32).view(torch.float64)),
        lambda m, x: m.b(torch.cat([m.a(x), m.a(x[:0])])),
        lambda m, x: m.b(m.a(x)[:0].sum() + m.a(x)),
        lambda m, x: m.b(torch.mul(m.a(x), 2.0, out=torch.empty(3, D).double())),
        lambda m, x: m.b(m.a(x[:0])).sum() + m.b(m.a(x)),
    ):
        model = Handmade(body, a=lin(), b=lin()).double().eval()
        x = torch.randn(3, D).double()
        found = regions(model, x)
        assert found[-1].layers == ("b",) and (found[-1].parts or found[-1].reason)
        assert proved(model, found, x) == {}


def test_a_region_that_forgets_a_reader_or_mixes_its_channels_up_is_refuted() -> None:
    body = lambda m, x: (lambda y: (m.b(y), m.c(y)))(m.a(x).relu())  # noqa: E731
    model, x = Handmade(body, a=conv(width=4, groups=2), b=conv(4, groups=2), c=conv(4)).eval(), torch.randn(1, 4, 5, 5)
    (_, region) = regions(model, x)
    assert proved(model, [region], x) == {}
    every = torch.arange(D)
    right, wrong = Part(Source("a", True, 0.0, 1, D), every), Part(Source("a", True, 0.0, 1, D), every.roll(4))
    both = dict.fromkeys(("b", "c"), every)
    for layers, index, part, compensated in (
        (("b",), {"b": every}, right, {}),
        (("b",), {"b": every}, right, {"c": every.flip(0)}),
        (("b", "c"), both, wrong, {}),
        (("b", "c"), {"b": every, "c": every.view(2, 4).t().flatten()}, right, {}),
    ):
        fold = Region(layers, D, index, layouts(model), (part,), compensated)
        assert proved(model, [fold], x), (layers, compensated)
    assert proved(model, [Region(("b",), D, {"b": every}, layouts(model), (right,), {"c": every})], x) == {}
