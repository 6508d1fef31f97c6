"""InstanceNorm beside a layer: per-channel factors are taken out again, if no eps stands under its root."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_nets import D, Handmade, affine, check_smoothing, conv, forced, proved, regions
from torch import nn
from torch.nn import functional as F

OUTSIDE = "× its tensor comes from outside the model"


def beside(norm: nn.Module) -> Handmade:
    """b and a norm read the same tensor."""
    body = lambda m, x: (lambda y: m.b(y) * m.norm(y).abs().mean())(m.a(x).relu())  # noqa: E731
    return Handmade(body, norm=norm, a=conv(width=3), b=conv(4))


@pytest.mark.parametrize("gain", [False, True])
def test_without_eps_it_is_a_reader_that_needs_nothing(gain: bool) -> None:
    model = beside(affine(nn.InstanceNorm2d(D, affine=gain, eps=0.0)))
    check_smoothing(model, [torch.randn(2, 3, 6, 6)], {"a": OUTSIDE, "b": "the rows of a"})


def test_with_eps_it_is_fixed_and_the_proof_says_so_too() -> None:
    model = beside(affine(nn.InstanceNorm2d(D, affine=True))).double().eval()
    x = torch.randn(2, 3, 6, 6).double()
    (_, region) = regions(model, x)
    assert region.reason.endswith("batch_norm in norm, whose eps of 1e-05 does not grow with its input")
    assert proved(model, [forced(model, ["b"], "a")], x) == {"b": "the fold changed the output when tried"}


def test_running_statistics_know_the_scale() -> None:
    norm = affine(nn.InstanceNorm2d(D, affine=True, eps=0.0, track_running_stats=True))
    model = beside(norm).double().eval()
    x = torch.randn(2, 3, 6, 6).double()
    assert "also read by" in regions(model, x)[1].reason
    assert proved(model, [forced(model, ["b"], "a")], x)


def test_factors_that_lie_along_what_is_averaged_are_fixed() -> None:
    """The norm's channels are the tensor's rows of pixels."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.b(y) * F.instance_norm(y.transpose(1, 2), eps=0.0).mean((2, 3), keepdim=True).square().mean()

    model = Handmade(body, a=conv(width=3), b=conv(4)).double().eval()
    assert "also read by batch_norm" in regions(model, torch.randn(2, 3, 6, 6).double())[1].reason
