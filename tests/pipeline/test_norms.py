"""BatchNorm folded by `quantize`: recorded, taken back on any error, and found again by a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import evenbits
from evenbits.errors import CheckpointError, EvenbitsError
from evenbits.graph import batchnorm
from evenbits.nn.folded import FoldedNorm
from evenbits.nn.unfuse import unfuse
from evenbits.pipeline import norms as norms_module
from evenbits.pipeline import prepare as prepare_module
from evenbits.pipeline import quantize as quantize_module


def net() -> nn.Sequential:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, groups=2),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 6), nn.BatchNorm1d(6), nn.Linear(6, 2),
    )  # fmt: skip
    for module in model:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3)
            nn.init.normal_(module.weight)
    return model.eval()


def picture() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def unchanged(model: nn.Module, before: nn.Module) -> None:
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    state = model.state_dict()
    assert list(state) == list(before.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in before.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["rtn", "smoothquant"])
def test_norms_are_folded_and_said_so(method: str) -> None:
    model, reference = net(), net()
    result = evenbits.quantize(model, scheme="W8A8_STATIC", method=method, data=[picture()])
    assert "BatchNorm folded into the layer before it: 3" in result.notes
    assert [index for index, module in enumerate(model) if isinstance(module, FoldedNorm)] == [1, 4, 8]
    with torch.no_grad():
        error = model(picture()) - reference(picture())
    assert error.square().mean() < 1e-3 * reference(picture()).square().mean()


def test_ignored_layers_are_not_folded_into() -> None:
    model, before = net(), net()
    scheme = {"weights": "int8:row", "input_activations": "int8:row", "dynamic": True, "ignore": ["3"]}
    result = evenbits.quantize(model, scheme=scheme, method="rtn", data=[picture()])
    assert "BatchNorm folded into the layer before it: 2" in result.notes
    assert type(model[4]) is nn.BatchNorm2d
    assert torch.equal(model[3].weight, before[3].weight) and torch.equal(model[3].bias, before[3].bias)


def test_without_data_nothing_is_folded() -> None:
    model = net()
    notes = evenbits.quantize(model, method="rtn").notes
    assert notes == ("BatchNorm was not folded: which layer it follows is seen on data, and there is none",)
    assert type(model[1]) is nn.BatchNorm2d


class Wanted(Exception):
    """Not an error of evenbits."""


@pytest.mark.parametrize("where", ["plan_layers", "watch", "balance", "solve", "swap", "_result"])
@pytest.mark.parametrize("error", [Wanted, KeyboardInterrupt, EvenbitsError])
def test_any_error_afterwards_brings_them_back(where: str, error: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error("now")

    model, before = net(), net()
    monkeypatch.setattr(quantize_module if where in ("swap", "_result") else prepare_module, where, fail)
    with pytest.raises(error, match="now"):
        evenbits.quantize(model, scheme="W8A8_STATIC", method="smoothquant", data=[picture()])
    unchanged(model, before)


@pytest.mark.parametrize("place", ["compare", "second fold"])
def test_an_error_while_folding_brings_them_back(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    fold = batchnorm._fold

    def fail(*args: Any) -> Any:
        done.append(1)
        if place == "compare" or len(done) == 2:
            raise Wanted("now")
        return fold(*args)

    model, before = net(), net()
    if place == "compare":
        monkeypatch.setattr(norms_module, "outputs_equal", fail)
    else:
        monkeypatch.setattr(batchnorm, "_fold", fail)
    with pytest.raises(Wanted):
        evenbits.quantize(model, method="rtn", data=[picture()])
    unchanged(model, before)


def test_a_fold_that_changes_the_output_is_taken_back_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = batchnorm._fold

    def wrong(model: Any, *args: Any) -> Any:
        found = fold(model, *args)
        found[0].weight.data.mul_(1.1)
        return found

    model, before = net(), net()
    monkeypatch.setattr(batchnorm, "_fold", wrong)
    result = evenbits.quantize(model, scheme="W8A16", method="rtn", data=[picture()])
    assert "BatchNorm was not folded: the output changed when it was tried" in result.notes
    assert all(torch.equal(model[i].running_mean, before[i].running_mean) for i in (1, 4, 8))
    with torch.no_grad():
        assert (model(picture()) - before(picture())).abs().max() < 0.05 * before(picture()).abs().max()


def test_round_trip_onto_a_fresh_model(tmp_path: Path) -> None:
    model = net()
    evenbits.quantize(model, scheme="W8A8_STATIC", method="smoothquant", data=[picture()])
    evenbits.save(model, tmp_path / "out")
    for target in (net(), copy.deepcopy(model)):
        loaded = evenbits.load(tmp_path / "out", target)
        assert [type(m) for m in loaded] == [type(m) for m in model]
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        with torch.no_grad():
            assert loaded(picture()).equal(model(picture()))


@pytest.mark.parametrize("other", [nn.InstanceNorm2d(8), nn.Identity(), nn.Conv2d(8, 8, 1), nn.Sequential()])
def test_a_checkpoint_that_takes_out_something_else_is_refused(other: nn.Module, tmp_path: Path) -> None:
    model, target = net(), net()
    evenbits.quantize(model, method="rtn", data=[picture()])
    evenbits.save(model, tmp_path / "out")
    target[1] = other
    with pytest.raises(CheckpointError, match="is no BatchNorm that could have been folded"):
        evenbits.load(tmp_path / "out", target)
    assert target[1] is other and type(target[4]) is nn.BatchNorm2d
    with pytest.raises(EvenbitsError, match="is no BatchNorm"):
        unfuse(target, {"1": "batch_norm"})


class Detour(nn.Module):
    """Batches of three read the convolution beside its norm, too; batches of two do not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.norm.running_mean.fill_(3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        z = self.norm(y) if len(x) == 2 else self.norm(y) + y
        return self.last(z.mean((2, 3)))


def test_a_path_that_only_a_later_batch_takes_keeps_the_norm() -> None:
    torch.manual_seed(0)
    model, later = Detour().eval(), torch.randn(3, 3, 6, 6)
    expected = model(later)
    result = evenbits.quantize(model, method="rtn", data=[torch.randn(2, 3, 6, 6), later])
    assert "BatchNorm was not folded: the output changed when it was tried" in result.notes
    assert (model(later) - expected).norm() < 0.05 * expected.norm()


def test_a_batch_that_does_not_fit_is_named() -> None:
    model, before = net(), net()
    with pytest.raises(EvenbitsError, match="could not run calibration batch 1"):
        evenbits.quantize(model, data=[picture(), torch.randn(2, 5, 6, 6)])
    unchanged(model, before)
