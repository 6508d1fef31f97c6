"""Replacing modules everywhere they stand, and taking it back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evenbits.nn.replace import replace_modules


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.block = nn.Sequential(nn.ReLU(), self.first, nn.Linear(2, 2))
        self.items = nn.ModuleDict({"shared": self.block, "none": nn.Identity()})
        self.nothing = None
        self.register_module("empty", None)


def test_replaced_wherever_it_is_shared_and_restored() -> None:
    model = Net()
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    before = {name: model.get_submodule(name) for name in names}
    new = nn.Identity()
    restore = replace_modules(model, {"first": new})
    assert model.first is new
    assert model.block[1] is new
    assert model.items["shared"][1] is new
    assert model.block[2] is before["block.2"]
    restore()
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == names
    assert all(model.get_submodule(name) is module for name, module in before.items())


def test_several_at_once_and_in_the_same_order() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    new = {"0": nn.Identity(), "2": nn.Tanh()}
    restore = replace_modules(model, new)
    assert [type(child) for child in model] == [nn.Identity, nn.ReLU, nn.Tanh]
    assert [name for name, _ in model.named_children()] == ["0", "1", "2"]
    assert model(torch.ones(1)).shape == (1,)
    restore()
    assert [type(child) for child in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_a_name_that_does_not_exist_changes_nothing() -> None:
    model = Net()
    before = model.first
    with pytest.raises(AttributeError):
        replace_modules(model, {"first": nn.Identity(), "frist": nn.Identity()})
    assert model.first is before


def test_nothing_to_replace() -> None:
    model = Net()
    before = list(model.modules())
    replace_modules(model, {})()
    assert list(model.modules()) == before
