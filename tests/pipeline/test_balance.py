"""One s per region: shared statistics, what is folded, what is multiplied, what is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from evenbits.errors import EvenbitsError
from evenbits.pipeline.balance import Balanced, balance
from evenbits.pipeline.batches import Batches
from evenbits.pipeline.methods import Methods
from evenbits.pipeline.plan import LayerPlan, plan_layers
from evenbits.pipeline.watch import Watched, watch
from evenbits.schemes.scheme import resolve

D = 8


class Pair(nn.Module):
    """q and k read one norm; o reads their product."""

    def __init__(self, residual: bool = False) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.o = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        y = self.o(self.q(h) * self.k(h))
        return y + h if self.residual else y


def watched(model: nn.Module, data: Any, methods: Methods) -> tuple[list[LayerPlan], Watched]:
    model.eval()
    scheme = resolve("W8A8")
    plans, seen = watch(model, plan_layers(model, scheme), Batches(model, data, progress=False), scheme, methods)
    assert seen is not None
    return [plan for plan in plans if not plan.reason], seen


def balanced(model: nn.Module, data: Any, **options: Any) -> Balanced:
    methods = Methods.parse("smoothquant", options)
    plans, seen = watched(model, data, methods)
    return balance(model, plans, seen, methods)


def test_s_is_the_papers_formula_over_all_readers_and_all_batches() -> None:
    model = Pair()
    data = [torch.randn(3, D), torch.randn(5, D) * 2]
    found = balanced(model, data, alpha=0.3)
    h = torch.cat([model.norm(x) for x in data]).detach().double()
    weights = torch.cat([model.q.weight, model.k.weight]).detach().double()
    expected = h.abs().amax(0) ** 0.3 / weights.abs().amax(0) ** 0.7
    assert torch.allclose(found.scales["q"].double(), expected, rtol=1e-5)
    assert found.scales["q"] is found.scales["k"]
    assert [row.alpha for row in found.rows] == [0.3, 0.3]


def test_a_region_is_folded_once_and_the_other_multiplied() -> None:
    found = balanced(Pair(), [torch.randn(3, D)])
    assert len(found.folds) == 1 and found.multiplied == {"o"}
    assert [(row.name, row.status) for row in found.rows] == [("{q,k}", "folded"), ("o", "multiplied")]


def test_a_residual_makes_it_a_multiply() -> None:
    found = balanced(Pair(residual=True), [torch.randn(3, D)])
    assert not found.folds and found.multiplied == {"q", "k", "o"}
    assert "add" in found.rows[0].reason


def test_balancing_changes_nothing_yet() -> None:
    model = Pair()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    balanced(model, [torch.randn(3, D)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_dead_channel_is_left_alone() -> None:
    model = Pair()
    model.norm.weight.data[2], model.norm.bias.data[2] = 0.0, 0.0
    model.q.weight.data[:, 5], model.k.weight.data[:, 5] = 0.0, 0.0
    scale = balanced(model, [torch.randn(3, D)]).scales["q"]
    assert scale[2] == 1 and scale[5] == 1 and torch.isfinite(scale).all() and (scale > 0).all()


def test_a_refuted_fold_is_multiplied_with_the_proofs_reason() -> None:
    class Hidden(Pair):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            return self.o(self.q(h) * self.k(h)) + torch.from_numpy(h.numpy().copy())

    found = balanced(Hidden(), [torch.randn(3, D)])
    assert not found.folds
    assert found.rows[0].status == "multiplied" and found.rows[0].reason


def test_a_path_that_only_a_later_batch_takes_is_multiplied() -> None:
    class Sometimes(Pair):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            y = self.o(self.q(h) * self.k(h))
            return y if x.mean() > 0 else y + h

    data = [torch.randn(3, D) + 3, torch.randn(3, D) - 3]
    found = balanced(Sometimes(), data)
    assert found.rows[0].status == "multiplied" and "changed the output" in found.rows[0].reason
    assert balanced(Sometimes(), data[:1]).rows[0].status == "folded"


def test_without_a_balance_method_nothing_is_done() -> None:
    model = Pair()
    methods = Methods.parse("rtn", {})
    plans, seen = watched(model, [torch.randn(3, D)], methods)
    assert balance(model, plans, seen, methods) == Balanced()


def test_nothing_to_smooth_is_an_error_that_says_why() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    with pytest.raises(EvenbitsError, match=r"no region was smoothed.*0: convolutions are not smoothed"):
        balanced(model, [torch.randn(1, 2, 4, 4)])
