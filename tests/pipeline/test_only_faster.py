"""Asked before conversion: which layers gain. Speeds are put in by hand here; one test times for real."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import evenbits
from evenbits.errors import EvenbitsError
from evenbits.kernels.probe import Shape, Speed
from evenbits.nn.base import QuantizedLayer
from evenbits.pipeline import only_faster as module


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.up, self.down, self.again = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 32)
        self.back = nn.ConvTranspose2d(3, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.back(x)).flatten(2).transpose(1, 2)
        return self.again(self.down(self.up(x).relu()))


DATA = [torch.randn(2, 3, 7, 7) for _ in range(3)]


def speed(ratio: float) -> Speed:
    return Speed(ratio * 1e-4, 1e-4, ratio, ratio * 0.9, ratio * 1.1, 9, 1, "CPU")


@pytest.fixture
def slow_down(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Layers with 32 inputs lose; whatever was probed."""
    asked: list[Shape] = []

    def pretend(shapes: Any, build: Any, *, seconds: float) -> dict[Shape, Speed]:
        asked.extend(shapes)
        for shape in shapes:
            assert build(shape)(torch.randn(shape.input)).shape[0] == shape.input[0]  # the deployed layer runs
        return {shape: speed(0.5 if shape.weight[1] == 32 else 3.0) for shape in shapes}

    monkeypatch.setattr(module, "probe", pretend)
    return asked


def test_losers_stay_float_with_the_reason(slow_down: list[Shape]) -> None:
    model = Net()
    result = evenbits.quantize(model, method="rtn", data=DATA, only_faster=True)
    row = next(row for row in result.layers if row.name == "down")
    assert row.status == "float" and "slower quantized on this machine: 0.50x of float" in row.reason
    assert isinstance(model.down, nn.Linear) and isinstance(model.up, QuantizedLayer)
    assert any(note.startswith("warning:") and "0.50x: down" in note and "stay float" in note for note in result.notes)


def test_without_the_flag_losers_are_named_and_quantized(slow_down: list[Shape]) -> None:
    model = Net()
    result = evenbits.quantize(model, method="rtn", data=DATA, probe=True)
    assert isinstance(model.down, QuantizedLayer)
    assert any("0.50x: down" in note and "only_faster" in note for note in result.notes)
    assert any("back" in note and "not measured" in note for note in result.notes)


def test_each_different_shape_is_probed_once_with_its_own_rows(slow_down: list[Shape]) -> None:
    evenbits.quantize(Net(), method="rtn", data=DATA, probe=True)
    linear = [(shape.weight, shape.input) for shape in slow_down if shape.kind == "Linear"]
    assert linear == [((32, 8), (32, 8)), ((8, 32), (32, 32))]  # 2 pictures of 4×4 tokens; `again` is as `up`
    (conv,) = (shape for shape in slow_down if shape.kind == "Conv2d")
    assert conv.input == (2, 3, 8, 8) and conv.stride == (2, 2) and conv.padding == (1, 1)


@pytest.mark.parametrize("scheme", ["W8A8_STATIC", "W4A8_OVP", "W8A16", "W4A4", "W4A16_OVP_G32"])
def test_the_layer_that_is_timed_has_the_formats_of_the_scheme(slow_down: list[Shape], scheme: str) -> None:
    model = Net()
    evenbits.quantize(model, scheme=scheme, data=DATA, probe=True, **({"method": "rtn"} if "8A8" in scheme else {}))
    assert slow_down and isinstance(model.up, QuantizedLayer)


def test_every_shape_is_told_before_anything_is_converted(
    slow_down: list[Shape], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from evenbits.pipeline import prepare

    told: list[str] = []

    def solve(*_: Any, **__: Any) -> Any:
        told.append(capsys.readouterr().err)
        raise EvenbitsError("enough")

    monkeypatch.setattr(prepare, "solve", solve)
    with pytest.raises(EvenbitsError, match="enough"):
        evenbits.quantize(Net(), method="rtn", data=DATA, probe=True, progress=True)
    assert "probe, first batch: up and 1 more: Linear 32×8 on 32×8: 300 µs in float, 100 µs quantized, 3.00x" in told[0]
    assert "warning: slower quantized" in told[0]


def test_a_model_that_writes_is_probed_with_one_token_too(slow_down: list[Shape]) -> None:
    net = Net()
    net.can_generate = lambda: True  # type: ignore[assignment]
    result = evenbits.quantize(net, method="rtn", data=DATA, probe=True)
    assert [(row.work, row.shape, row.layers) for row in result.probe if "Linear" in row.shape] == [
        ("first batch", "Linear 32×8 on 32×8", ("up", "again")),
        ("first batch", "Linear 8×32 on 32×32", ("down",)),
        ("one token", "Linear 32×8 on 1×8", ("up", "again")),
        ("one token", "Linear 8×32 on 1×32", ("down",)),
    ]
    assert any(
        "one token at a time, 2 of 3 layers are faster" in note and "slower: down" in note for note in result.notes
    )
    assert result.to_json()["probe"][0]["ratio"] == 3.0


def test_nothing_is_probed_unless_asked_and_nothing_changes(slow_down: list[Shape]) -> None:
    models = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict())
    seeds = []
    for model, asked in zip(models, (False, True), strict=True):
        torch.manual_seed(5)
        evenbits.quantize(model, method="rtn", data=DATA, probe=asked)
        seeds.append(torch.randn(3))
        assert bool(slow_down) == asked
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(*seeds)


def test_all_losers_is_an_error_and_the_model_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "probe", lambda shapes, build, *, seconds: {shape: speed(0.5) for shape in shapes})
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with pytest.raises(EvenbitsError, match="slower quantized"):
        evenbits.quantize(model, method="rtn", data=[torch.randn(2, 8)], only_faster=True)
    assert isinstance(model[0], nn.Linear)


def test_it_needs_data() -> None:
    with pytest.raises(EvenbitsError, match="first batch"):
        evenbits.quantize(Net(), method="rtn", probe=True)


def test_real_times_are_told() -> None:
    result = evenbits.quantize(
        nn.Sequential(nn.Linear(256, 512), nn.ReLU()), method="rtn", data=[torch.randn(16, 256)], probe=True
    )
    assert any("of 1 layers are faster quantized" in note for note in result.notes)
