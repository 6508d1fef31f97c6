"""The search for alpha, sent losses that are made up, so that what it must choose is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from evenbits.algorithms.alpha import CRITERIA, AlphaGrid, search_alpha
from evenbits.algorithms.base import Rebalance
from evenbits.algorithms.smoothquant import smoothquant
from evenbits.errors import EvenbitsError

GRID = AlphaGrid()


def make(alpha: float) -> Rebalance:
    return Rebalance(torch.tensor([alpha], dtype=torch.float64), {"alpha": alpha, "kept": 7.0})


class Ran:
    """A search to its end. tried: every α that was sent a loss, in order; rounds: how many were asked for at a time."""

    def __init__(
        self,
        loss: Callable[[float], Sequence[float]],
        grid: AlphaGrid = GRID,
        criterion: str = "loss",
        untouched: Sequence[float] = (math.inf,),
    ) -> None:
        self.tried: list[tuple[float, float]] = []
        self.rounds: list[int] = []
        search = search_alpha(make, grid, criterion)
        asked = next(search)
        try:
            while True:
                self.rounds.append(len(asked))
                sent = [untouched if c.scale_I is None else loss(float(c.scale_I)) for c in asked]
                pairs = zip(asked, sent, strict=True)
                self.tried += [(float(c.scale_I), sum(row)) for c, row in pairs if c.scale_I is not None]
                asked = search.send(sent)
        except StopIteration as end:
            self.chosen: Rebalance = end.value

    @property
    def alpha(self) -> float:
        return self.chosen.choice["alpha"]


def test_the_default_grid_and_another_one() -> None:
    assert AlphaGrid.parse("auto").values == tuple(round(0.05 * i, 2) for i in range(1, 20))
    assert AlphaGrid.parse("auto:0.3:0.7:0.1").values == (0.3, 0.4, 0.5, 0.6, 0.7)
    assert AlphaGrid.parse("auto:0:1:0.3").values == (0.0, 0.3, 0.6, 0.9)  # the step does not reach the end
    assert AlphaGrid.parse("auto:0:1:0.4").values == (0.0, 0.4, 0.8)
    assert AlphaGrid.parse("auto:0.4:0.4:0.1").values == (0.4,)
    assert AlphaGrid.parse("auto:0:1:1").values == (0.0, 1.0)


@given(low=st.floats(0, 1), high=st.floats(0, 1), step=st.floats(0.001, 1))
def test_a_grid_stays_inside_its_ends_and_goes_as_far_as_it_can(low: float, high: float, step: float) -> None:
    assume(low <= high)
    values = AlphaGrid(low, high, step).checked().values
    assert values[0] == pytest.approx(low, abs=1e-9)
    assert all(b - a == pytest.approx(step, abs=1e-8) for a, b in itertools.pairwise(values))
    assert values[-1] <= high + 1e-8 < values[-1] + step + 1e-6
    assert all(0 <= value <= 1 for value in values)


@pytest.mark.parametrize(
    "text",
    ["", "much", "Auto", "auto:", "auto:0.5", "auto:0.3:0.7", "auto:0.3:0.7:0.1:0.2", "auto:a:b:c", "auto:0.1:0.9:"],
)
def test_what_is_no_grid(text: str) -> None:
    with pytest.raises(EvenbitsError, match=r"'auto' or 'auto:LOW:HIGH:STEP'.*given the string '" + text):
        AlphaGrid.parse(text)


@pytest.mark.parametrize("ends", ["0.7:0.3", "-0.1:0.5", "0:1.1", "nan:1", "0:nan", "0:inf"])
@pytest.mark.parametrize("step", ["0.1", "0", "-0.1", "1e-9", "nan", "inf"])
def test_grids_that_cannot_be_walked(ends: str, step: str) -> None:
    for text in (f"auto:{ends}:{step}", "auto:0:1:" + step.replace("0.1", "0")):
        with pytest.raises(EvenbitsError, match=r"runs from LOW to HIGH inside 0\.\.1"):
            AlphaGrid.parse(text)
    with pytest.raises(EvenbitsError, match=r"runs from LOW to HIGH inside 0\.\.1"):
        smoothquant(torch.ones(2), [torch.ones(2, 2)], alpha=f"auto:{ends}:{step}")


def test_an_unknown_criterion_is_refused_before_anything_is_tried() -> None:
    with pytest.raises(EvenbitsError, match="criterion"):
        next(search_alpha(make, GRID, "median"))


any_loss = st.one_of(st.floats(0, 1e30), st.sampled_from([0.0, math.inf, math.nan]))


@given(losses=st.lists(any_loss, min_size=19, max_size=19), between=st.lists(any_loss, min_size=5, max_size=5))
def test_the_choice_is_never_worse_than_anything_tried(losses: list[float], between: list[float]) -> None:
    assume(any(math.isfinite(loss) for loss in losses))
    known, rest = dict(zip(GRID.values, losses, strict=True)), iter(between)
    ran = Ran(lambda alpha: [known[alpha]] if alpha in known else [next(rest)])
    finite = [loss for _, loss in ran.tried if math.isfinite(loss)]
    got = dict(ran.tried)[ran.alpha]
    assert math.isfinite(got)
    assert got <= min(finite) * (1 + 1e-9)
    assert list(ran.chosen.curve) == sorted(ran.tried) or any(math.isnan(loss) for _, loss in ran.tried)
    assert [alpha for alpha, _ in ran.chosen.curve] == sorted(alpha for alpha, _ in ran.tried)
    assert len(ran.tried) == 24 and ran.rounds == [20, 2, 1, 1, 1]


@given(best=st.floats(0, 1), low=st.floats(0, 0.5), high=st.floats(0.5, 1), step=st.floats(0.01, 0.3))
def test_golden_section_stays_beside_the_best_of_the_grid_and_finds_the_bottom(
    best: float, low: float, high: float, step: float
) -> None:
    grid = AlphaGrid(low, high, step)
    ran = Ran(lambda alpha: [(alpha - best) ** 2 + 1.0], grid)
    coarse = [alpha for alpha, _ in ran.tried[: len(grid.values)]]
    start = min(coarse, key=lambda alpha: (alpha - best) ** 2)
    for alpha, _ in ran.tried[len(coarse) :]:
        assert max(low, start - 1.01 * step) - 1e-9 <= alpha <= min(high, start + 1.01 * step) + 1e-9
    reachable = min(max(best, low), high)
    if abs(reachable - start) <= step:  # five steps leave an interval of 2 · step · 0.618⁴
        assert abs(ran.alpha - reachable) <= 2 * step * 0.6181**3 + 1e-4
    assert low - 1e-9 <= ran.alpha <= high + 1e-9


def test_ties_go_to_the_alpha_nearest_to_a_half() -> None:
    assert Ran(lambda _: [3.0]).alpha == 0.5
    assert Ran(lambda _: [0.0]).alpha == 0.5
    assert Ran(lambda _: [0.0], untouched=[0.0]).alpha == 0.5  # a dead region is no reason to be left out
    assert Ran(lambda alpha: [1.0 if alpha > 0.7 else 2.0], AlphaGrid(0, 1, 0.1)).alpha == pytest.approx(0.71, abs=0.02)
    flat = Ran(lambda alpha: [1.0 + 1e-12 * alpha], criterion="mean")
    assert flat.alpha == 0.5


def test_a_grid_of_one_value_takes_it() -> None:
    ran = Ran(lambda alpha: [alpha], AlphaGrid(0.3, 0.3, 0.1))
    assert ran.alpha == 0.3 and ran.rounds == [2]
    assert ran.chosen.curve == ((0.3, 0.3),)


@given(losses=st.lists(st.lists(st.floats(0, 100), min_size=19, max_size=19), min_size=1, max_size=4))
def test_min_max_and_mean_are_of_the_layers_own_best(losses: list[list[float]]) -> None:
    place = {alpha: index for index, alpha in enumerate(GRID.values)}
    own = []
    for layer in losses:
        least = min(layer)
        good = [alpha for alpha, loss in zip(GRID.values, layer, strict=True) if loss <= least * (1 + 1e-9)]
        own.append(min(good, key=lambda alpha: abs(alpha - 0.5)))
    wanted = {"min": min(own), "max": max(own), "mean": sum(own) / len(own)}
    for criterion, alpha in wanted.items():
        ran = Ran(lambda a: [layer[place[a]] for layer in losses], criterion=criterion, untouched=[0.0] * len(losses))
        assert ran.alpha == pytest.approx(alpha, abs=1e-12)
        assert float(ran.chosen.scale_I) == ran.alpha  # the scale is of the α it names
        assert ran.rounds == [20]
        assert ran.chosen.curve == tuple((a, sum(layer[i] for layer in losses)) for a, i in place.items())


def test_a_sum_and_the_layers_own_best_differ() -> None:
    def loss(alpha: float) -> list[float]:
        return [10 * abs(alpha - 0.2), abs(alpha - 0.8)]

    found = {criterion: Ran(loss, criterion=criterion).alpha for criterion in CRITERIA}
    assert found == pytest.approx({"loss": 0.2, "min": 0.2, "max": 0.8, "mean": 0.5})


def test_leaving_it_alone_is_chosen_when_it_is_best() -> None:
    left = Ran(lambda alpha: [1.0 + abs(alpha - 0.4), 0.5], untouched=[0.9, 0.5])
    assert left.chosen.scale_I is None
    assert left.chosen.choice == {"untouched": pytest.approx(1.4)}
    assert len(left.chosen.curve) == 24  # what was tried can still be drawn
    taken = Ran(lambda alpha: [1.0 + abs(alpha - 0.4), 0.5], untouched=[1.1, 0.5])
    assert taken.alpha == pytest.approx(0.4) and taken.chosen.choice["kept"] == 7.0


def test_leaving_it_alone_is_weighed_against_the_refined_alpha() -> None:
    """Between the α of the grid there is one that beats it."""
    ran = Ran(lambda alpha: [1.0 + abs(alpha - 0.25)], AlphaGrid(0, 1, 0.5), untouched=[1.2])
    assert ran.chosen.scale_I is not None and abs(ran.alpha - 0.25) < 0.2
    assert min(loss for a, loss in ran.tried if a in (0.0, 0.5, 1.0)) == 1.25


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_is_not_finite_is_never_chosen(bad: float, criterion: str) -> None:
    assert Ran(lambda alpha: [bad if alpha < 0.62 else 1.0], criterion=criterion).alpha >= 0.62
    assert Ran(lambda alpha: [bad if alpha > 0.38 else 1.0], criterion=criterion).alpha <= 0.38
    for untouched in (math.nan, math.inf):
        assert Ran(lambda alpha: [1.0], criterion=criterion, untouched=[untouched]).alpha == 0.5


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_finite_is_an_error(bad: float, criterion: str) -> None:
    with pytest.raises(EvenbitsError, match="no alpha of the search gave finite outputs"):
        Ran(lambda alpha: [bad], criterion=criterion, untouched=[1.0])


def test_smoothquant_hands_out_the_search_and_its_candidates_are_its_own_formula() -> None:
    act_I, weight_RI = torch.tensor([16.0, 1.0, 0.0]), torch.tensor([[1.0, -4.0, 2.0]])
    search = smoothquant(act_I, [weight_RI], alpha="auto:0:1:0.25")
    *candidates, untouched = next(search)
    assert untouched.scale_I is None and len(candidates) == 5
    for alpha, candidate in zip((0.0, 0.25, 0.5, 0.75, 1.0), candidates, strict=True):
        assert candidate.scale_I.equal(smoothquant(act_I, [weight_RI], alpha=alpha).scale_I)
