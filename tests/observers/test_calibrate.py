"""Watching layers while a model runs: what is seen, and that nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evenbits.errors import EvenbitsError
from evenbits.observers.calibrate import channel_ranges, first_tensor, watching


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True))

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(self.conv(x_NCHW).movedim(1, -1))
        return y


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_ranges_of_named_layers_over_all_batches() -> None:
    model, batches = Net(), [torch.randn(2, 3, 4, 4) for _ in range(3)]
    dims = {"conv": -3, "inner.0": -1}

    def run_all() -> None:
        for batch in batches:
            model(batch)

    ranges = channel_ranges(model, dims, run_all)
    everything = torch.cat(batches)
    assert list(ranges) == ["conv", "inner.0"]
    assert ranges["conv"].hi.equal(everything.amax((0, 2, 3)))
    expected = model.conv(everything)
    assert ranges["inner.0"].lo.tolist() == pytest.approx(expected.amin((0, 2, 3)).tolist(), rel=1e-5)
    assert _hooks(model) == 0


def test_watching_gives_input_and_output_each_time() -> None:
    model, seen = Net(), []
    with watching(model, ["inner.0"], lambda name, x, y: seen.append((name, x.clone(), y.clone()))):
        for _ in range(2):
            model(torch.randn(1, 3, 2, 2))
        assert _hooks(model) == 1
    model(torch.randn(1, 3, 2, 2))
    assert [name for name, _, _ in seen] == ["inner.0", "inner.0"]
    for _, x, y in seen:
        assert y.equal(model.inner[0](x))  # what the layer gave, before ReLU wrote over it
    assert _hooks(model) == 0


def test_hooks_are_gone_after_an_exception() -> None:
    model = Net()

    def explode() -> None:
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        channel_ranges(model, {"conv": -3}, explode)
    assert _hooks(model) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_name_the_layer(bad: float) -> None:
    model, x = Net(), torch.zeros(1, 3, 2, 2)
    x[0, 1, 0, 0] = bad
    with pytest.raises(EvenbitsError, match="layer conv: NaN or infinite values in the input"):
        channel_ranges(model, {"conv": -3, "inner.0": -1}, lambda: model(x))
    assert _hooks(model) == 0


def test_changing_widths_name_the_layer() -> None:
    model = nn.Sequential(nn.Identity())

    def run_all() -> None:
        model(torch.ones(1, 3))
        model(torch.ones(1, 4))

    with pytest.raises(EvenbitsError, match="layer 0: 4 channels after 3"):
        channel_ranges(model, {"0": -1}, run_all)


def test_a_layer_that_never_runs_has_seen_nothing() -> None:
    model = Net()
    ranges = channel_ranges(model, {"conv": -3, "inner.0": -1}, lambda: model.conv(torch.ones(1, 3, 2, 2)))
    assert ranges["conv"].seen
    assert not ranges["inner.0"].seen


def test_positional_and_keyword_arguments() -> None:
    x, z = torch.ones(1), torch.zeros(1)
    assert first_tensor((x, z), {}) is x
    assert first_tensor((None, 3), {"flag": True, "input": z}) is z
    with pytest.raises(EvenbitsError, match="without a tensor"):
        first_tensor((1,), {"x": None})
    model, seen = nn.Sequential(nn.Linear(2, 2)), []
    with watching(model, ["0"], lambda name, x, y: seen.append(x)):
        model[0](input=torch.ones(1, 2))
    assert seen[0].tolist() == [[1, 1]]


def test_a_shared_layer_is_seen_under_both_calls() -> None:
    linear = nn.Linear(3, 3)
    model = nn.Sequential(linear, linear)
    x = torch.randn(4, 3)
    ranges = channel_ranges(model, {"0": -1}, lambda: model(x))
    both = torch.cat([x, linear(x)])
    assert ranges["0"].hi.tolist() == both.amax(0).tolist()
