"""Matrices that belong to no layer (a router's weight under F.linear): compensated if a matrix is all they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evenbits.graph.folding import Fold, multiplied_inputs, prove
from evenbits.graph.regions import Region, find_regions
from evenbits.graph.trace import trace
from evenbits.nn.layout import layout_of

D = 8


class Routed(nn.Module):
    """A norm, a layer, and a router whose weight is a bare parameter."""

    def __init__(self, read: Callable[[Any, torch.Tensor], Any], rows: int = 5) -> None:
        super().__init__()
        self.norm, self.proj, self.other = nn.LayerNorm(D), nn.Linear(D, 6), nn.LayerNorm(D)
        self.weight, self.turned = nn.Parameter(torch.randn(rows, D)), nn.Parameter(torch.randn(D, rows))
        self.bias = nn.Parameter(torch.randn(rows))
        self.read = read

    def forward(self, x: torch.Tensor) -> tuple[Any, torch.Tensor]:
        y = self.norm(x)
        return self.read(self, y), self.proj(y)


def found(model: nn.Module, x: torch.Tensor) -> tuple[list[Region], Callable[[], Any]]:
    model = model.double().eval()
    layouts = {n: layout for n, m in model.named_modules() if (layout := layout_of(m)) is not None}
    widths = {name: layout.in_channels for name, layout in layouts.items()}
    run = lambda: model(x.double())  # noqa: E731
    with torch.no_grad():
        return find_regions(trace(model, run, layouts), widths), run


READ: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str, int]] = {
    "linear": (lambda m, y: F.linear(y, m.weight), "weight", 1),
    "with a bias": (lambda m, y: F.linear(y, m.weight, m.bias), "weight", 1),
    "flattened": (lambda m, y: F.linear(y.reshape(-1, D), m.weight, m.bias), "weight", 1),
    "converted": (lambda m, y: F.linear(y.float(), m.weight.float()), "weight", 1),
    "transposed by hand": (lambda m, y: y @ m.weight.transpose(0, 1), "weight", 1),
    "permuted": (lambda m, y: y @ m.weight.permute(1, 0), "weight", 1),
    "twice turned": (lambda m, y: F.linear(y, m.weight.t().t().clone()), "weight", 1),
    "used twice": (lambda m, y: F.linear(y, m.weight) + F.linear(2 * y, m.weight), "weight", 1),
    "stored the other way": (lambda m, y: y @ m.turned, "turned", 0),
}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("way", READ)
def test_its_columns_are_multiplied_and_nothing_changes(way: str, batched: bool) -> None:
    read, name, dim = READ[way]
    x = torch.randn(2, 3, D) if batched else torch.randn(4, D)
    model = Routed(read)
    (region,), run = found(model, x)
    assert region.layers == ("proj",) and not region.reason, region.reason
    assert set(region.matrices) == {name} and region.matrices[name][1] == dim
    with torch.no_grad():
        assert prove(model, [run], [region], narrowest=torch.float32 if way == "converted" else torch.float64) == {}
        scale = torch.logspace(-1, 1, region.width, dtype=torch.float64)
        before, weight = run(), model.get_parameter(name).clone()
        fold = Fold(model, region)
        fold.apply(scale)
        factor = scale[region.matrices[name][0]].unsqueeze(1 - dim)
        torch.testing.assert_close(model.get_parameter(name), weight * factor)
        with multiplied_inputs(model, region, scale):
            tolerance = 1e-5 if way == "converted" else 1e-12
            torch.testing.assert_close(run(), before, rtol=tolerance, atol=tolerance)
        fold.undo()
    assert torch.equal(model.get_parameter(name), weight)


REFUSED: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str]] = {
    "its numbers too": (lambda m, y: F.linear(y, m.weight) * m.weight.sum(), "weight is also read by sum"),
    "turned first": (lambda m, y: F.linear(y, m.weight) * m.weight.t().abs().sum(), "weight is also read by abs"),
    "normalised": (lambda m, y: F.linear(y, m.weight / m.weight.norm(dim=1, keepdim=True)), "left factor of mm"),
    "sliced": (lambda m, y: F.linear(y, m.weight[:3]), "left factor of mm"),
    "as a lookup": (lambda m, y: F.linear(y, m.weight) + F.embedding(torch.tensor(1), m.weight).sum(), "embedding"),
    "of another tensor": (
        lambda m, y: (F.linear(y, m.weight), F.linear(torch.ones(1, D, dtype=y.dtype), m.weight)),
        "some of its channels are not scaled by anything that can be changed",
    ),
}


@pytest.mark.parametrize("way", REFUSED)
def test_read_in_any_other_way_it_blocks_the_fold(way: str) -> None:
    read, reason = REFUSED[way]
    (region,), _ = found(Routed(read), torch.randn(2, 3, D))
    assert not region.parts
    assert reason in region.reason


def test_read_both_ways_round_it_blocks_the_fold() -> None:
    (region,), _ = found(Routed(lambda m, y: y @ m.weight + y @ m.weight.t(), rows=D), torch.randn(3, D))
    assert not region.parts and "weight is also read the other way round" in region.reason


def test_two_norms_under_one_matrix_are_one_region() -> None:
    model = Routed(lambda m, y: F.linear(y, m.weight) + F.linear(m.other(y.detach() * 0 + 1), m.weight))
    (region,), run = found(model, torch.randn(3, D))
    # The second norm reads the first one's output, which fixes it.
    assert not region.parts

    class Two(Routed):
        def forward(self, x: torch.Tensor) -> Any:
            a, b = self.norm(x), self.other(x)
            return F.linear(a, self.weight), F.linear(b, self.weight), self.proj(a)

    model = Two(lambda m, y: y)
    (region,), run = found(model, torch.randn(3, D))
    assert {part.source.name for part in region.parts} == {"norm.weight", "norm.bias", "other.weight", "other.bias"}
    with torch.no_grad():
        assert prove(model, [run], [region]) == {}


def test_a_wrong_column_is_caught_by_the_proof() -> None:
    model = Routed(READ["linear"][0])
    (region,), run = found(model, torch.randn(3, D))
    region.matrices["weight"][0].copy_(region.matrices["weight"][0].roll(1))
    with torch.no_grad():
        assert prove(model, [run], [region]) == {region.name: "the fold changed the output when tried"}


def test_rows_that_are_none_keep_their_channels() -> None:
    """An expert nothing was routed to is called with no rows: it still reads the norm's channels."""

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b, self.down = nn.LayerNorm(D), nn.Linear(D, 6), nn.Linear(D, 6), nn.Linear(3, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            none = torch.where(torch.zeros(len(y), dtype=torch.bool))[0]
            gate, up = self.b(y[none]).chunk(2, dim=-1)
            return self.a(y).sum() + self.down(torch.sigmoid(gate) * up).sum()

    by_name = {region.layers: region for region in found(Sparse(), torch.randn(4, D))[0]}
    assert by_name["b", "a"].into == "norm"
    assert by_name[("down",)].into == "the rows of b"
    (part,) = by_name[("down",)].parts
    assert part.index_C.tolist() == [-1, -1, -1, 0, 1, 2]
