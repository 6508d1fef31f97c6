"""One s per region: shared statistics, what is folded, what is multiplied, what is an error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import evenbits
from evenbits.algorithms.base import Rebalance
from evenbits.errors import EvenbitsError
from evenbits.pipeline import balance as balance_module
from evenbits.pipeline.balance import Balanced, balance
from evenbits.pipeline.batches import Batches
from evenbits.pipeline.methods import Methods
from evenbits.pipeline.plan import LayerPlan, plan_layers
from evenbits.pipeline.watch import Watched, watch
from evenbits.schemes.scheme import resolve

D = 8


class Pair(nn.Module):
    """q and k read one norm; o reads their product, which has q's rows for factors, or more if it is squashed."""

    def __init__(self, residual: bool = False, squashed: bool = False) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.o = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.residual, self.squashed = residual, squashed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        product = self.q(h) * self.k(h)
        y = self.o(torch.tanh(product) if self.squashed else product)
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
    return balance(model, plans, seen, resolve("W8A8"), methods)


def test_s_is_the_papers_formula_over_all_readers_and_all_batches() -> None:
    model = Pair()
    data = [torch.randn(3, D), torch.randn(5, D) * 2]
    found = balanced(model, data, alpha=0.3)
    h = torch.cat([model.norm(x) for x in data]).detach().double()
    weights = torch.cat([model.q.weight, model.k.weight]).detach().double()
    expected = h.abs().amax(0) ** 0.3 / weights.abs().amax(0) ** 0.7
    assert torch.allclose(found.scales["q"].double(), expected, rtol=1e-5)
    assert torch.equal(found.scales["q"], found.scales["k"])
    assert [row.alpha for row in found.rows] == [0.3, 0.3]


def test_a_region_is_folded_once_and_the_other_multiplied() -> None:
    found = balanced(Pair(squashed=True), [torch.randn(3, D)])
    assert len(found.folds) == 1 and found.multiplied == {"o"} and not found.row_factors
    assert [(row.name, row.status) for row in found.rows] == [("{q,k}", "folded"), ("o", "multiplied")]
    assert "tanh" in found.rows[1].reason


def test_a_product_is_folded_into_the_rows_of_one_factor() -> None:
    found = balanced(Pair(), [torch.randn(3, D)])
    assert len(found.folds) == 2 and not found.multiplied
    assert [row.reason for row in found.rows] == ["into norm", "into the rows of q"]
    assert torch.allclose(found.row_factors["q"] * found.scales["o"], torch.ones(D, dtype=torch.float64))
    assert set(found.row_factors) == {"q"}


def test_a_residual_that_is_returned_makes_it_a_multiply() -> None:
    found = balanced(Pair(residual=True), [torch.randn(3, D)])
    assert len(found.folds) == 1 and found.multiplied == {"q", "k"}
    assert found.rows[0].reason == "its tensor is an output of the model"


def test_what_a_balanced_layer_delivers_sees_and_returns() -> None:
    """o reads q·k, whose s is folded into q's rows: q returns its output over s, o sees its input over s."""
    found = balanced(Pair(), [torch.randn(3, D)])
    x, s = torch.randn(3, D), found.scales["o"]
    assert torch.equal(found.delivered("o", x), x / s) and torch.equal(found.seen("o", x), x / s)
    assert torch.allclose(found.returned("q", x), x / s)
    assert torch.equal(found.returned("k", x), x)
    squashed = balanced(Pair(squashed=True), [torch.randn(3, D)])
    assert torch.equal(squashed.delivered("o", x), x) and torch.equal(squashed.returned("q", x), x)
    assert torch.equal(squashed.seen("o", x), x / squashed.scales["o"])


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
    assert [row.status for row in found.rows] == ["multiplied", "folded"]
    assert found.multiplied == {"q", "k"} and found.rows[0].reason == "the fold changed the output when tried"


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
    found = balance(model, plans, seen, resolve("W8A8"), methods)
    assert found == Balanced(layouts=found.layouts) and set(found.layouts) == {"q", "k", "o"}


def test_nothing_to_smooth_is_an_error_that_says_why() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(D, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(EvenbitsError, match=r"no region was smoothed. a: did not run on the calibration data"):
        balanced(Idle(), [torch.randn(3, D)])


def codes(rows: int, columns: int) -> torch.Tensor:
    """Whole numbers with a 127 in each row: int8 with one scale a row, or for all, holds them exactly."""
    found = torch.randint(-100, 101, (rows, columns)).float()
    found[torch.arange(rows), torch.arange(rows) % columns] = 127.0
    return found


def test_a_search_that_finds_nothing_to_gain_says_so_and_a_number_smooths_all_the_same() -> None:
    for scheme in ("W8A8", "W8A8_STATIC"):
        model = nn.Sequential(nn.Linear(D, 5, bias=False))
        model[0].weight.data = codes(5, D)
        data = [codes(32, D)]
        found = evenbits.quantize(copy.deepcopy(model), scheme=scheme, method="smoothquant", alpha="auto", data=data)
        assert [row.status for row in found.regions] == ["skipped"]
        assert any("found nothing to gain" in note and "each of 1 regions" in note for note in found.notes)
        fixed = evenbits.quantize(model, scheme=scheme, method="smoothquant", alpha=0.5, data=data)
        assert fixed.regions[0].status == "multiplied" and not any("nothing" in note for note in fixed.notes)


def test_regions_none_of_which_is_smoothed_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that leaves every region alone without having searched."""
    monkeypatch.setattr(balance_module, "decide", lambda *_: Rebalance(None, {}))
    with pytest.raises(EvenbitsError, match=r"no region was smoothed\. \{q,k\}: the method left it alone"):
        balanced(Pair(), [torch.randn(3, D)])


def test_convolutions_share_one_s_with_the_layer_that_reads_their_mean() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.gate = nn.Conv2d(3, D, 3), nn.Conv2d(D, 4, 1, groups=2), nn.Linear(D, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.a(x))
            return self.b(y) * torch.sigmoid(self.gate(y.mean((2, 3))))[..., None, None]

    model, data = Net(), [torch.randn(2, 3, 6, 6) for _ in range(2)]
    found = balanced(model, data, alpha=0.4)
    y = torch.cat([torch.relu(model.a(x)) for x in data]).detach().double()
    absmax = torch.maximum(y.amax((0, 2, 3)), y.mean((2, 3)).amax(0))
    grouped = model.b.weight.detach().double().view(2, 2, 4).abs().amax(1).flatten()
    weights = torch.maximum(grouped, model.gate.weight.detach().double().abs().amax(0))
    expected = absmax**0.4 / weights**0.6
    for name in ("b", "gate"):
        assert torch.allclose(found.scales[name].double(), expected, rtol=1e-5)
    assert found.rows[1].reason == "into the rows of a"


class Idle(nn.Module):
    """q reads the norm; so does k, if it is there, but nothing reaches it. k's columns are as large as q's."""

    def __init__(self, idle: bool) -> None:
        super().__init__()
        self.norm, self.q = nn.LayerNorm(D), nn.Linear(D, D)
        self.k = nn.Linear(D, D) if idle else None
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-1, 1, D))
            self.q.weight.copy_(torch.randn(D, D, generator=torch.Generator().manual_seed(2)))
            if self.k is not None:
                self.k.weight.copy_(self.q.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        y = self.q(h)
        return y if self.k is None else y + self.k(h[:0]).sum()


def test_a_layer_that_nothing_reached_has_no_alpha_of_its_own() -> None:
    data = [torch.randn(32, D, generator=torch.Generator().manual_seed(3))]
    for criterion in ("min", "max", "mean"):
        alone, beside = (
            balanced(Idle(idle), data, alpha="auto", criterion=criterion).rows[0] for idle in (False, True)
        )
        assert beside.layers == ("q", "k") and alone.layers == ("q",)
        assert alone.alpha == beside.alpha != 0.5


def test_a_block_that_is_a_layer_is_measured_by_the_layer_that_replaces_it() -> None:
    generator = torch.Generator().manual_seed(4)
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
    data = [torch.randn(32, D, generator=generator) * torch.logspace(-2, 2, D)]
    for row in balanced(model, data, alpha="auto", scope="block").rows:
        losses = [loss for _, loss in row.curve]
        assert min(losses) > 0 and len(set(losses)) > 1


def test_an_order_of_channels_is_for_linear_layers_and_every_convolution_has_a_line() -> None:
    model = nn.Sequential(nn.Conv2d(3, D, 3), nn.Flatten(), nn.Linear(D * 4, D))
    methods = Methods.parse("repair+olive", {})
    plans, seen = watched(model, [torch.randn(2, 3, 4, 4)], methods)
    rows = {row.name: row for row in balance(model, plans, seen, resolve("W8A8"), methods).rows}
    assert rows.keys() == {"0", "2"}
    assert rows["0"].status == "skipped"
    assert rows["0"].reason.startswith(
        "an order of channels is for linear layers: a convolution's pairs are kernel pos"
    )
