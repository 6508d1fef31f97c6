"""Nets written by dice: hundreds of small programs of layers, norms, gains, views, writes in place and gates.

The rules alone are on trial: every region they would fold is folded with random s, without asking the proof, and the
float64 output must stay as it is. (The proof would catch what they miss; nothing should be left for it.) All sizes are
4, so that a factor along the wrong dimension fits everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_nets import HandRMSNorm, affine, proved, regions, relative_error, smooth
from torch import nn
from torch.nn import functional as F

C = 4


def last(module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Applies a module of tokens to a map."""
    return module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(C, C, 3, padding=1),
    "point": lambda: nn.Conv2d(C, C, 1, bias=False),
    "grouped": lambda: nn.Conv2d(C, C, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(C, C, 3, padding=1, groups=C),
    "transposed": lambda: nn.ConvTranspose2d(C, C, 3, padding=1, groups=2),
    "linear": lambda: nn.Linear(C, C),
    "bn": lambda: affine(nn.BatchNorm2d(C)),
    "gn": lambda: affine(nn.GroupNorm(2, C)),
    "ln": lambda: affine(nn.LayerNorm(C)),
    "rms": lambda: affine(nn.RMSNorm(C)),
    "offset": lambda: HandRMSNorm(1.0, width=C),
}
TOKENS = ("linear", "ln", "rms", "offset")

ONE: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "relu": lambda g, x: x.relu(),
    "relu_": lambda g, x: x.relu_(),
    "leaky": lambda g, x: F.leaky_relu(x, 0.2),
    "relu6": lambda g, x: F.relu6(x),
    "gelu": lambda g, x: F.gelu(x),
    "sigmoid": lambda g, x: x.sigmoid(),
    "softmax": lambda g, x: x.softmax(1),
    "pool": lambda g, x: F.avg_pool2d(x, 3, 1, 1),
    "max": lambda g, x: F.max_pool2d(x, 3, 1, 1),
    "mean": lambda g, x: x.mean((2, 3), keepdim=True),
    "channel mean": lambda g, x: x.mean(1, keepdim=True) + 0 * x,
    "up and down": lambda g, x: F.avg_pool2d(F.interpolate(x, scale_factor=2), 2),
    "plus": lambda g, x: x + 1.0,
    "plus_": lambda g, x: x.add_(0.5),
    "twice": lambda g, x: x * 2.0,
    "halved_": lambda g, x: x.div_(2.0),
    "negated": lambda g, x: -x,
    "gain": lambda g, x: x * g.view(1, C, 1, 1),
    "gain_": lambda g, x: x.mul_(g.view(1, C, 1, 1)),
    "offset gain": lambda g, x: (1 + g)[:, None, None] * x,
    "bias": lambda g, x: x + g.view(C, 1, 1),
    "row gain": lambda g, x: x * g.view(C, 1),
    "turned": lambda g, x: x.transpose(1, 2),
    "turned picture": lambda g, x: x.transpose(2, 3),
    "rolled": lambda g, x: x.roll(1, 1),
    "flipped": lambda g, x: x.flip(1, 2),
    "halves swapped": lambda g, x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "half gated": lambda g, x: (lambda a, b: torch.cat([a * b.sigmoid(), b], 1))(*x.chunk(2, 1)),
    "half twice": lambda g, x: x[:, :2].repeat(1, 2, 1, 1),
    "half repeated": lambda g, x: x[:, 1::2].repeat_interleave(2, 1),
    "half written": lambda g, x: (x[:, :2].mul_(3.0), x)[1],
    "half zeroed": lambda g, x: (x[:, 2:].zero_(), x)[1],
    "tokens": lambda g, x: x.flatten(2).transpose(1, 2).reshape(x.shape),
    "flat and back": lambda g, x: x.flatten(1).view(x.shape),
    "square map": lambda g, x: x * x,
    "attended": lambda g, x: (x @ x.transpose(2, 3)).softmax(-1) @ x,
    "masked": lambda g, x: x.masked_fill(torch.eye(C).bool(), 0.0),
    "one channel": lambda g, x: x[:, :1].expand(-1, C, -1, -1).contiguous(),
    "padded": lambda g, x: F.pad(x, (0, 0, 0, 0, 1, 0))[:, :C],
    "copied": lambda g, x: x.clone().contiguous(memory_format=torch.channels_last),
    "viewed and written": lambda g, x: (lambda v: (x.mul_(2.0), v.view(x.shape))[1])(x.reshape(-1)),
}
TWO: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": lambda a, b: a + b,
    "add_": lambda a, b: a.clone().add_(b),
    "really add_": lambda a, b: a.add_(b.clone()),
    "really mul_": lambda a, b: a.mul_(b.clone()),
    "half add_": lambda a, b: (a[:, :2].add_(b[:, 2:].clone()), a)[1],
    "view of both": lambda a, b: (lambda v: (a.mul_(2.0), a.relu_(), v.view(a.shape) + b)[2])(a.view_as(a)),
    "subtract": lambda a, b: a - 2 * b,
    "mul": lambda a, b: a * b,
    "mul_": lambda a, b: a.clone().mul_(b),
    "gate": lambda a, b: a * b.sigmoid(),
    "divide": lambda a, b: a / (b.abs() + 1.0),
    "matrix": lambda a, b: a.softmax(-1) @ b,
    "left matrix": lambda a, b: a @ b.softmax(-1),
    "half each": lambda a, b: torch.cat([a[:, :2] + 0 * b[:, :2], b[:, 2:] + 0 * a[:, 2:]], 1),
    "larger": lambda a, b: torch.maximum(a, b),
    "picked": lambda a, b: torch.where(b > 0, a, b),
}


class Random(nn.Module):
    """A program over a few maps [N, 4, 4, 4], drawn from a seed. Layers and gains may be used again."""

    def __init__(self, seed: int, length: int) -> None:
        super().__init__()
        dice = random.Random(seed)
        self.layers, self.steps = nn.ModuleList(), []
        self.gains = nn.ParameterList([nn.Parameter(torch.rand(C) + 0.5) for _ in range(2)])
        for _ in range(length):
            kind = dice.choices(("layer", "one", "two"), (5, 5, 2))[0]
            name = dice.choice(list({"layer": LAYERS, "one": ONE, "two": TWO}[kind]))
            which = dice.randrange(len(self.layers)) if self.layers and dice.random() < 0.15 else len(self.layers)
            if kind == "layer" and which == len(self.layers):
                self.layers.append(LAYERS[name]())
            # Mostly what came last; sometimes one of the maps before.
            reads = [0 if dice.random() < 0.7 else dice.randrange(4) for _ in range(2)]
            self.steps.append((kind, name, which, reads, dice.randrange(2)))
        self.layers.append(nn.Conv2d(C, C, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [x.clone(), x.tanh()]
        for kind, name, which, reads, gain in self.steps:
            a, b = (maps[-1 - (back % len(maps))] for back in reads)
            if kind == "layer":
                layer = self.layers[which]
                tokens = isinstance(layer, (nn.Linear, nn.LayerNorm, nn.RMSNorm, HandRMSNorm))
                maps.append(last(layer, a) if tokens else layer(a))
            elif kind == "one":
                maps.append(ONE[name](self.gains[gain], a))
            else:
                maps.append(TWO[name](a, b))
            if maps[-1].shape != x.shape:
                maps[-1] = maps[-1].expand(x.shape) + 0.0
        return self.layers[-1](maps[-1]).tanh()


def rules_hold(seed: int, length: int) -> tuple[int, int]:
    """How many regions there are and how many are folded; fails if the folds change the output."""
    torch.manual_seed(seed)
    model = Random(seed, length).double().eval()
    x = torch.randn(2, C, C, C).double()
    with torch.no_grad():
        before = model(x)
        assert torch.isfinite(before).all()
        found = regions(model, x)
        smooth(model, found, {})
        error = relative_error(before, model(x))
    assert error < 1e-9, (seed, length, error, [(r.name, r.into or r.reason) for r in found], model.steps)
    return len(found), sum(bool(region.parts) for region in found)


@pytest.mark.parametrize("length", [3, 6, 12])
def test_no_random_net_is_folded_wrongly_by_the_rules_alone(length: int) -> None:
    counts = torch.tensor([rules_hold(1000 * length + seed, length) for seed in range(100)])
    regions_found, folded = counts.sum(0).tolist()
    assert regions_found > 150 and folded > 50  # not all is refused


def test_the_proof_refuses_no_fold_of_a_random_net() -> None:
    for seed in range(40):
        torch.manual_seed(seed)
        model, x = Random(seed, 8).double().eval(), torch.randn(2, C, C, C).double()
        assert proved(model, regions(model, x), x) == {}, seed
