"""Channels of zeros carry any factor: shortcuts without parameters, as in the ResNets for CIFAR-10 (option A)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_nets import D, Handmade, check_smoothing, conv, lin, regions, report
from torch import nn
from torch.nn import functional as F

OUTSIDE = "× its tensor comes from outside the model"


def zeros(y: torch.Tensor, channels: int) -> torch.Tensor:
    return torch.zeros(len(y), channels, *y.shape[2:], dtype=y.dtype)


SHORTCUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "padded on both sides": lambda y: F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)),
    "padded behind": lambda y: F.pad(y[..., ::2, ::2], (0, 0, 0, 0, 0, 8)),
    "pooled instead of sliced": lambda y: F.pad(F.avg_pool2d(y, 1, 2), (0, 0, 0, 0, 8, 0)),
    "padded, and cut on the other side": lambda y: F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 9, -1)),
    "pixels padded, too": lambda y: F.pad(y[:, :, 1::2, ::2], (0, 0, 0, 1, 4, 4))[:, :, :3],
    "joined with zeros": lambda y: torch.cat([y[:, :, ::2, ::2], zeros(y[:, :, ::2, ::2], 8)], 1),
    "zeros on both sides": lambda y: (lambda x, z: torch.cat((z, x, z), dim=1))(
        y[:, :, ::2, ::2], zeros(y[:, :, ::2, ::2], 4)
    ),
    "joined with a copy's zeros": lambda y: (lambda x: torch.cat([x, torch.zeros_like(x)], 1))(y[:, :, ::2, ::2]),
    "joined with new zeros": lambda y: (lambda x: torch.cat([x, x.new_zeros(x.shape)], -3))(y[:, :, ::2, ::2]),
}


@pytest.mark.parametrize("how", SHORTCUTS)
def test_a_shortcut_without_parameters_is_folded_on_both_sides(how: str) -> None:
    """stem (3 → 8) → block (8 → 12 → 16, stride 2) beside the shortcut → last, which reads both."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x).relu()
        y = m.two(m.one(x).relu())
        return m.last((y + SHORTCUTS[how](x)).relu())

    model = Handmade(body, stem=conv(width=3), one=conv(12, D, stride=2), two=conv(16, 12), last=conv(5, 16))
    expected = {"stem": OUTSIDE, "{one,last}": "the rows of {stem,two}", "two": "the rows of one"}
    check_smoothing(model, [torch.randn(2, 3, 6, 6)], expected)


def test_padded_channels_that_only_a_layer_reads_need_no_source() -> None:
    model = Handmade(lambda m, x: m.b(F.pad(m.a(x).relu(), (0, 0, 0, 0, 3, 1))), a=conv(width=3), b=conv(4, 12))
    check_smoothing(model, [torch.randn(2, 3, 6, 6)], {"a": OUTSIDE, "b": "the rows of a"})
    (_, region) = regions(model, torch.randn(2, 3, 6, 6).double())
    assert region.width == 12 and sorted(region.index["b"].tolist()) == list(range(12))


def test_features_padded_in_a_linear_net_and_a_stream_of_zeros() -> None:
    model = Handmade(lambda m, x: m.b(F.pad(m.a(x).relu(), (0, 4))), a=lin(), b=lin(5, 12))
    check_smoothing(model, [torch.randn(3, D)], {"a": OUTSIDE, "b": "the rows of a"})
    only = Handmade(lambda m, x: m.a(x) + m.b(F.pad(m.a(x), (0, 4))[:, D:]), a=lin(), b=lin(D, 4)).eval()
    assert report(regions(only, torch.randn(3, D)))["b"] == "× its channels are zeros"


def test_shifted_sums_share_one_factor() -> None:
    """Each channel plus its neighbour: legal with the same s for all of them, and for the zeros at the ends."""
    shift = lambda y: F.pad(y, (0, 0, 0, 0, 1, 1))[:, 1:-1] + F.pad(y, (0, 0, 0, 0, 0, 1))[:, 1:]  # noqa: E731
    model = Handmade(lambda m, x: m.b(shift(m.a(x))), a=conv(width=3), b=conv(4))
    check_smoothing(model, [torch.randn(2, 3, 6, 6)], {"a": OUTSIDE, "b": "the rows of a"})
    assert regions(model, torch.randn(2, 3, 6, 6).double())[1].width == 1


def test_the_reason_is_the_operation_that_stops_factors_not_the_last_one() -> None:
    """softmax is where they end; what merely hands on (ReLU, addition, pooling) is not to blame."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.max_pool2d((m.a(x).softmax(1) + 1.0).relu(), 2) * 2.0
        return m.b(F.dropout(y, 0.0))

    model = Handmade(body, a=conv(width=3), b=conv(4)).eval()
    found = report(regions(model, torch.randn(2, 3, 6, 6)))
    assert found["b"] == "× computed by _softmax, through which no factor passes"
    both = Handmade(lambda m, x: m.b((m.a(x) + F.gelu(m.c(x))).relu()), a=conv(width=3), c=conv(width=3), b=conv(4))
    assert report(regions(both, torch.randn(2, 3, 6, 6)))["b"] == "× computed by gelu, through which no factor passes"
    outside = Handmade(lambda m, x: m.b(((x - 0.5) / 0.2).relu()), b=conv(4, 3)).eval()
    assert report(regions(outside, torch.rand(2, 3, 6, 6)))["b"] == OUTSIDE
    embedded = Handmade(lambda m, i: m.b(m.t(i).relu() * 3.0), t=nn.Embedding(9, D), b=lin()).eval()
    assert "computed by embedding" in report(regions(embedded, torch.arange(9)))["b"]
