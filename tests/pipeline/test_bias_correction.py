"""Bias correction: the mean error of every output is gone, what varies stays, and nothing else of a layer changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import evenbits
from evenbits.errors import EvenbitsError


def _linear() -> tuple[nn.Module, list[torch.Tensor]]:
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 6))
    return model, [torch.randn(12, 24) + 2 for _ in range(3)]  # inputs with means


def _convolutions() -> tuple[nn.Module, list[torch.Tensor]]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2)
    )
    return model, [torch.randn(4, 3, 9, 7) + 1 for _ in range(2)]


def _smoothed() -> tuple[nn.Module, list[torch.Tensor]]:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 5))  # nothing behind it that would fold into its rows
    nn.init.normal_(model[0].bias)  # type: ignore[arg-type]
    return model, [torch.randn(5, 7, 16) * torch.linspace(0.1, 9, 16) for _ in range(3)]


def _errors(model: nn.Module, quantized: nn.Module, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Error of the first quantized layer, whose input is the float model's own: name → [O, everything else]."""
    name = next(n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    axis = -1 if isinstance(model.get_submodule(name), nn.Linear) else 1
    kept: dict[str, list[torch.Tensor]] = {"float": [], "quantized": []}
    for which, net in (("float", model), ("quantized", quantized)):
        hook = net.get_submodule(name).register_forward_hook(lambda _m, _x, y, to=kept[which]: to.append(y))
        with torch.no_grad():
            for batch in batches:
                net(batch)
        hook.remove()
    error = torch.cat([(b - a).movedim(axis, 0).flatten(1) for a, b in zip(*kept.values(), strict=True)], dim=1)
    return {"error": error, "signal": torch.cat([a.flatten() for a in kept["float"]])}


@pytest.mark.parametrize(
    ("make", "scheme", "method"),
    [
        (_linear, {"weights": "int3:row"}, "rtn"),
        (_linear, "W4A4_OVP", "olive"),
        (_convolutions, {"weights": "int3:row", "input_activations": "int6:tensor", "dynamic": False}, "rtn"),
        (_smoothed, "W8A8_STATIC", "smoothquant"),
    ],
)
def test_the_mean_error_of_every_output_is_gone(make: Callable[[], Any], scheme: Any, method: str) -> None:
    torch.manual_seed(3)
    model, batches = make()
    state = model.state_dict()
    found = {}
    for corrected in (False, True):
        fresh, _ = make()
        fresh.load_state_dict(state)
        result = evenbits.quantize(fresh, scheme=scheme, method=method, data=batches, bias_correction=corrected)
        found[corrected] = _errors(model, fresh, batches)["error"], result
    (before, plain), (after, better) = found[False], found[True]
    assert float(before.mean(dim=1).abs().max()) > 0
    assert float(after.mean(dim=1).abs().max()) < 0.02 * float(before.mean(dim=1).abs().max()) + 1e-6
    torch.testing.assert_close(after.std(dim=1), before.std(dim=1), rtol=1e-4, atol=1e-6)
    for row, other in zip(plain.layers, better.layers, strict=True):
        assert (row.format, row.weight_bytes, row.sqnr_db) == (other.format, other.weight_bytes, other.sqnr_db)
        if row.output_sqnr_db is not None and other.output_sqnr_db is not None:
            assert other.output_sqnr_db >= row.output_sqnr_db - 1e-3  # measured after the correction


def test_layers_without_a_bias_stay_as_they_are_and_say_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(8, 4))
    x = torch.randn(9, 16) + 1
    result = evenbits.quantize(model, scheme={"weights": "int3:row"}, method="rtn", data=[x], bias_correction=True)
    assert model[0].bias is None
    assert [row.reason for row in result.layers] == ["no bias to correct", ""]


def test_nothing_to_correct_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    before = model[0].weight
    with pytest.raises(EvenbitsError, match="no quantized layer has a bias"):
        evenbits.quantize(
            model, scheme={"weights": "int3:row"}, method="rtn", data=[torch.randn(9, 16)], bias_correction=True
        )
    assert model[0].weight is before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias_correction": True}, "bias correction measures on calibration data"),
        ({"bias_correction": 1}, "true or false"),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str) -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    before = model[0].weight
    with pytest.raises(EvenbitsError, match=words):
        evenbits.quantize(model, scheme={"weights": "int3:row"}, method="rtn", **options)
    assert model[0].weight is before
