"""The one step that changes a model: everything, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from evenbits.graph.folding import Fold
from evenbits.graph.regions import Part, Region
from evenbits.graph.variables import Source
from evenbits.pipeline import swap as module
from evenbits.pipeline.swap import swap

D = 8


def net() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 4))


def folds(model: nn.Module) -> list[tuple[Fold, torch.Tensor]]:
    every = torch.arange(D)

    def region(i: int) -> Region:
        parts = tuple(Part(Source(f"{i}.{name}", False, 0.0, 1, D), every) for name in ("weight", "bias"))
        return Region((f"{i + 1}",), D, {f"{i + 1}": every}, {}, parts)

    return [(Fold(model, region(i)), torch.rand(D) + 0.5) for i in (0, 2)]


def snapshot(model: nn.Module) -> Any:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, list(model.children())


def unchanged(model: nn.Module, before: Any) -> bool:
    state, children = before
    now = model.state_dict()
    same = now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)
    return same and all(a is b for a, b in zip(model.children(), children, strict=True))


def test_the_swap_stays_when_the_block_ends_well() -> None:
    model = net()
    before = snapshot(model)
    new = nn.Linear(D, D)
    (first, scale), second = folds(model)
    with swap(model, {"1": new}, [(first, scale), second]):
        assert model[1] is new
    assert model[1] is new
    assert torch.allclose(model[0].weight * scale, before[0]["0.weight"])


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt("no"), SystemExit("no")], ids=repr)
def test_an_error_in_the_block_takes_it_back(error: BaseException) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(type(error)), swap(model, {"1": nn.Identity(), "3": nn.Identity()}, folds(model)):
        assert not unchanged(model, before)
        raise error
    assert unchanged(model, before)


def test_an_error_while_folding_takes_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before = snapshot(model)
    made = folds(model)

    def fail(_: torch.Tensor) -> None:
        model[2].weight.data.zero_()  # after half of the work
        raise RuntimeError("half-way")

    original = made[1][0].apply
    monkeypatch.setattr(made[1][0], "apply", lambda scale, without: (original(scale, without=without), fail(scale)))
    with pytest.raises(RuntimeError, match="half-way"), swap(model, {"1": nn.Identity()}, made):
        pytest.fail("the block must not run")
    assert unchanged(model, before)


def test_an_error_while_replacing_takes_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: nn.Module, __: Mapping[str, nn.Module]) -> Any:
        raise RuntimeError("half-way")

    monkeypatch.setattr(module, "replace_modules", fail)
    model = net()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="half-way"), swap(model, {"1": nn.Identity()}, folds(model)):
        pytest.fail("the block must not run")
    assert unchanged(model, before)


def test_an_unknown_layer_takes_it_back() -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(AttributeError), swap(model, {"1": nn.Identity(), "nowhere": nn.Identity()}, folds(model)):
        pytest.fail("the block must not run")
    assert unchanged(model, before)


def test_a_module_in_two_places_is_replaced_in_both_and_put_back_in_both() -> None:
    model = nn.ModuleDict({"a": nn.Linear(D, D)})
    model["b"] = nn.Sequential(model["a"], model["a"])
    old, new = model["a"], nn.Identity()
    with pytest.raises(RuntimeError), swap(model, {"a": new}, []):
        assert model["a"] is new and model["b"][0] is new and model["b"][1] is new
        raise RuntimeError
    assert model["a"] is old and model["b"][0] is old and model["b"][1] is old
