"""Convergence: every snapshot equals a calibration of its own on that many samples of that order."""

from __future__ import annotations

import copy
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

import evenbits
from evenbits.errors import EvenbitsError
from evenbits.observers.snapshots import random_orders
from evenbits.pipeline.convergence import Convergence, samples_of
from evenbits.pipeline.diagnose import diagnose

D, SIZES = 12, (3, 6, 20)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(self.norm(x) * x.abs().amax(-1, keepdim=True))))


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.randn(20, D, generator=generator).pow(3).split(6))  # 6, 6, 6, 2


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def scored(net: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(60, D, generator=torch.Generator().manual_seed(9)).pow(3)
    with torch.no_grad():
        return [(x, net(x).argmax(1))]


@pytest.fixture(scope="module")
def found(net: nn.Module, scored: Any) -> Convergence:
    diagnosis = diagnose(
        net, scheme="W8A8_STATIC", data=batches(), sizes=SIZES, orders=2, seed=7, task="classification",
        evaluation=scored,
    )  # fmt: skip
    assert diagnosis.convergence is not None
    return diagnosis.convergence


def subset(order: int, size: int) -> list[torch.Tensor]:
    """The samples that an order puts first."""
    places = random_orders(20, 2, 7)[order]
    x = torch.cat(batches())
    return [x[[sample for sample in range(20) if places[sample] < size]]]


def inputs(net: nn.Module, data: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Per-channel max |x| of every layer's input, from a forward of its own."""
    with torch.no_grad():
        h = net.norm(data[0]) * data[0].abs().amax(-1, keepdim=True)
        return {"up": h.abs().amax(0), "down": torch.tanh(net.up(h)).abs().amax(0)}


def smoothing(net: nn.Module, absmax: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: (a / net.get_submodule(n).weight.detach().abs().amax(0)).sqrt() for n, a in absmax.items()}


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_snapshots_are_separate_runs(net: nn.Module, found: Convergence, order: int, size: int) -> None:
    few, all_of = inputs(net, subset(order, size)), inputs(net, subset(order, 20))
    s, s_all = smoothing(net, few), smoothing(net, all_of)
    expected = {
        "absmax": [abs(float(few[n].max() / all_of[n].max()) - 1) for n in few],
        "channel absmax": [float((few[n] / all_of[n] - 1).abs().mean()) for n in few],
        "s": [float((s[n] / s_all[n] - 1).abs().mean()) for n in few],
        "static scale": [abs(float((few[n] / s[n]).max() / (all_of[n] / s_all[n]).max()) - 1) for n in few],
    }
    rows = {row.statistic: row for row in found.changes if (row.order, row.size) == (order, size)}
    assert set(rows) == set(expected)
    for statistic, changes in expected.items():
        assert rows[statistic].median == pytest.approx(median(changes), abs=1e-6)
        assert rows[statistic].max == pytest.approx(max(changes), abs=1e-6)
        if max(changes) > 1e-6:
            assert rows[statistic].worst == ["up", "down"][changes.index(max(changes))]
        if size == 20:
            assert rows[statistic].max == 0


def test_the_change_per_doubling(net: nn.Module, found: Convergence) -> None:
    before, after = (inputs(net, subset(0, size)) for size in SIZES[:2])
    steps = [abs(float(before[n].max() / after[n].max()) - 1) for n in after]  # 3 to 6 is one doubling
    row = next(r for r in found.changes if (r.statistic, r.order, r.size) == ("absmax", 0, 6))
    assert row.doubling_median == pytest.approx(median(steps), abs=1e-6)
    assert row.doubling_max == pytest.approx(max(steps), abs=1e-6)
    assert all(r.doubling_median is None for r in found.changes if r.size == 3)


def test_scores_are_those_of_models_calibrated_on_that_many_samples(
    net: nn.Module, scored: Any, found: Convergence
) -> None:
    assert found.metric == "accuracy" and found.float_metric == 1.0
    assert len(found.scores) == 2 * 2 + 1  # at the largest size the orders are one set
    for score in found.scores:
        quantized = copy.deepcopy(net)
        evenbits.quantize(quantized, scheme="W8A8_STATIC", data=subset(score.order, score.size))
        expected = evenbits.evaluate(quantized, task="classification", data=scored)
        assert score.metric == expected.metrics["accuracy"]
        assert (score.against_largest is None) == (score.size == 20)


def test_batches_make_no_difference_and_orders_do(net: nn.Module, found: Convergence) -> None:
    again = diagnose(net, scheme="W8A8_STATIC", data=torch.cat(batches()).split(1), sizes=SIZES, orders=2, seed=7)
    assert again.convergence is not None and len(again.convergence.changes) == len(found.changes)
    for row, other in zip(found.changes, again.convergence.changes, strict=True):
        assert (row.statistic, row.order, row.size, row.worst) == (
            other.statistic,
            other.order,
            other.size,
            other.worst,
        )
        assert row.median == pytest.approx(other.median, rel=1e-4, abs=1e-6)
    medians = [row.median for row in found.changes if (row.statistic, row.size) == ("channel absmax", 3)]
    assert medians[0] != medians[1]


def test_only_the_first_samples_are_used(net: nn.Module) -> None:
    loud = [*batches(), torch.full((4, D), 1e4)]
    found = diagnose(net, method="rtn", data=loud, sizes=SIZES, orders=1).convergence
    plain = diagnose(net, method="rtn", data=batches(), sizes=SIZES, orders=1).convergence
    assert found is not None and plain is not None and found.changes == plain.changes


def test_when_it_is_settled(net: nn.Module) -> None:
    same = [torch.ones(1, D).cumsum(1)] * 9
    found = diagnose(net, data=same, sizes=(1, 3, 9)).convergence
    assert found is not None and [found.settled_at(s) for s in ("absmax", "s", "static scale")] == [1, 1, 1]
    growing = [torch.ones(1, D).cumsum(1) * 2.0**index for index in range(9)]
    found = diagnose(net, data=growing, sizes=(1, 3, 8), orders=4).convergence
    assert found is not None and found.settled_at("absmax") is None


def test_too_few_samples_of_an_iterable_are_refused(net: nn.Module) -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter(batches())

    with pytest.raises(EvenbitsError, match="20 samples and the sizes go to 21"):
        diagnose(net, data=Stream(), sizes=(5, 21))


def test_batches_are_cut_into_samples() -> None:
    mask = torch.ones(2, 4)
    parts = list(samples_of([{"x": torch.arange(6).view(3, 2), "mask": mask, "word": "a"}, (torch.zeros(1, 2), 5)]))
    assert [p["x"].tolist() for p in parts[:3]] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert all(p["mask"] is mask and p["word"] == "a" for p in parts[:3])
    assert len(parts) == 4 and parts[3][1] == 5


def test_second_moments_are_taken_at_each_size_too(net: nn.Module, scored: Any) -> None:
    """OliVe weighs errors by E[x²]; a model calibrated on 3 samples uses those of 3."""
    found = diagnose(
        net, scheme="W4A8_OVP", data=batches(), sizes=(3, 20), orders=1, seed=7, task="classification",
        evaluation=scored,
    ).convergence  # fmt: skip
    assert found is not None
    quantized = copy.deepcopy(net)
    evenbits.quantize(quantized, scheme="W4A8_OVP", data=subset(0, 3))
    expected = evenbits.evaluate(quantized, task="classification", data=scored)
    assert found.scores[0].metric == expected.metrics["accuracy"]
