"""Schemes with overrides, from the float model to the folder and back: layers have the formats that were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import evenbits
from evenbits.checkpoints.describe import describe
from evenbits.errors import EvenbitsError
from evenbits.nn.base import QuantizedLayer
from evenbits.nn.qat import QATLayer
from evenbits.pipeline.methods import default_method
from evenbits.pipeline.qat import prepare_qat
from evenbits.schemes.scheme import resolve

D = 32
SCHEME: dict[str, Any] = {
    "weights": "int4:g16:mse",
    "overrides": {
        "c": {"weights": "int8:row", "input_activations": "int8:tensor", "dynamic": False},
        "a": {"weights": "ovp4:g16", "input_activations": "ovp4:tensor", "dynamic": False},
        "blocks.*": {"weights": "ant4:row", "input_activations": "int8:row"},
        "head": {"weights": "nf4:g16:mse"},
    },
}
EXPECTED = {
    "c": ("int8:row", "int8:tensor static"),
    "a": ("ovp4-", "ovp4-"),
    "b": ("int4:g16:mse", "float"),
    "blocks.0": (("int4:row:mse", "flint4:row", "pot4:row"), "int8:row dynamic"),
    "head": ("nf4:g16:mse", "float"),
}


class Net(nn.Module):
    """A layer for every override and one (b) for the scheme's own formats."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.LayerNorm(D)
        self.a, self.b, self.blocks = nn.Linear(D, D), nn.Linear(D, D), nn.ModuleList([nn.Linear(D, D)])
        self.head = nn.Linear(D, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.c(x.reshape(-1, 1, 4, 8)).mean(1).reshape(x.shape)
        x = torch.relu(self.a(self.norm(x)))
        return self.head(self.blocks[0](torch.relu(self.b(x))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, D, generator=generator) for _ in range(3)]


def layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def test_every_layer_gets_the_formats_that_were_written() -> None:
    model = net()
    result = evenbits.quantize(model, scheme=SCHEME, data=batches())
    assert result.method == "by_format"
    assert {row.name for row in result.quantized} == set(EXPECTED)
    for row in result.quantized:
        weights, inputs = EXPECTED[row.name]
        assert row.format.startswith(weights), row
        assert row.input_format.startswith(inputs), row
        assert row.output_sqnr_db is not None and row.output_sqnr_db > 5
    built = layers(model)
    assert built["c"].input_scale is not None and built["a"].input_scale is not None
    assert built["b"].input_scale is None and built["blocks.0"].input_scale is None
    assert result.backend.split("in ", 1)[1].startswith("2 of 5 layers")


def test_each_layer_equals_the_one_of_a_run_with_its_formats_alone() -> None:
    """The mix is not another way of computing: layer by layer, codes and scales are those of single-format runs."""
    mixed = net()
    evenbits.quantize(mixed, scheme=SCHEME, data=batches())
    scheme = resolve(SCHEME)
    for name, layer in layers(mixed).items():
        alone = net()
        formats = scheme.of(name).to_json()
        # `tensor` scales span each layer's own input, so a run where all have this format gives this layer the same.
        evenbits.quantize(alone, scheme=formats, method="by_format", data=batches())
        theirs = layers(alone)[name]
        assert (layer.weight_format, layer.input_format) == (theirs.weight_format, theirs.input_format)
        for (key, ours), (_, other) in zip(layer.named_buffers(), theirs.named_buffers(), strict=True):
            assert torch.equal(ours.view(torch.uint8), other.view(torch.uint8)), (name, key)


def test_a_mixed_model_is_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model, fresh = net(), net()
    result = evenbits.quantize(model, scheme=SCHEME, data=batches())
    evenbits.save(model, tmp_path / "out", result=result)
    loaded = evenbits.load(tmp_path / "out", fresh)
    ours, theirs = layers(model), layers(loaded)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name].weight_format, ours[name].input_format) == (
            theirs[name].weight_format,
            theirs[name].input_format,
        )
    assert torch.equal(model(batches()[0]), loaded(batches()[0]))
    found = describe(tmp_path / "out")
    assert resolve(found["scheme"]) == resolve(SCHEME)
    assert {layer["name"]: layer["format"] for layer in found["layers"]} == {r.name: r.format for r in result.quantized}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"haed": {"weights": "int8:row"}},
            r"the override .haed. matches no layer of the model; the nearest.*: head",
        ),
        ({"encoder.*": {"weights": "int8:row"}}, r"'encoder\.\*' matches no layer"),
        ({"norm": {"weights": "int8:row"}}, "'norm' matches no layer"),
        (
            {"*": {"weights": "int8:row"}, "head": {"weights": "int4:row"}},
            "'head' is never reached: every layer it matches is taken by an override before it",
        ),
    ],
)
@pytest.mark.parametrize("entry", [evenbits.quantize, prepare_qat])
def test_an_override_without_a_layer_is_an_error(entry: Any, overrides: dict[str, Any], words: str) -> None:
    model = net()
    with pytest.raises(EvenbitsError, match=words):
        entry(model, scheme={"weights": "int8:row", "overrides": overrides})
    assert not layers(model) and isinstance(model.head, nn.Linear)


def test_an_ignored_layer_stays_float_whatever_the_override_says() -> None:
    result = evenbits.quantize(net(), scheme={**SCHEME, "ignore": ["head"]}, data=batches())
    row = next(row for row in result.layers if row.name == "head")
    assert (row.status, row.reason) == ("float", "ignored by the scheme")


def test_one_static_layer_is_enough_to_need_data() -> None:
    with pytest.raises(EvenbitsError, match="static activations need calibration data"):
        evenbits.quantize(net(), scheme=SCHEME)


def test_formats_that_cannot_be_run_are_refused_in_overrides_too() -> None:
    with pytest.raises(EvenbitsError, match="another axis"):
        evenbits.quantize(net(), scheme={"weights": "int8:row", "overrides": {"a": {"weights": "int8:axis1"}}})


def test_a_method_that_is_named_must_suit_every_layer() -> None:
    with pytest.raises(EvenbitsError, match=r"layer c: method 'olive' writes outlier-victim pairs"):
        evenbits.quantize(net(), scheme=SCHEME, method="olive", data=batches())


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ({"weights": "int8:row", "overrides": {"a": {"weights": "int4:row"}}}, "rtn"),
        ({"weights": "ovp4:row", "overrides": {"a": {"weights": "ovp4:g32"}}}, "olive"),
        ({"weights": "ant4:row", "overrides": {"a": {"weights": "ant4:g32"}}}, "ant"),
        ({"weights": "int4:row", "overrides": {"a": {"weights": "ovp4:g32"}}}, "by_format"),
        ({"weights": "ovp4:row", "overrides": {"a": {"weights": "ant4:g32"}}}, "by_format"),
        ({"weights": "int8:row", "input_activations": "int8:row", "overrides": {"a": {"weights": "int4:row"}}},
         "smoothquant"),
        ({"weights": "int8:row", "input_activations": "int8:row", "overrides": {"a": {"input_activations": None}}},
         "smoothquant"),
        ({"weights": "int8:row", "input_activations": "int8:row", "overrides": {"a": {"weights": "ovp4:row"}}},
         "by_format"),
    ],
)  # fmt: skip
def test_the_default_method(scheme: dict[str, Any], method: str) -> None:
    assert default_method(resolve(scheme)) == method


def test_twins_for_training_have_the_formats_of_their_layer() -> None:
    model = net()
    symmetric = {**SCHEME, "overrides": {**SCHEME["overrides"], "head": {"weights": "int8:row"}}}
    names = prepare_qat(model, symmetric)
    scheme = resolve(symmetric)
    twins = {name: module for name, module in model.named_modules() if isinstance(module, QATLayer)}
    assert set(names) == set(twins) == set(EXPECTED)
    for name, twin in twins.items():
        wanted = scheme.of(name).to_json()["input_activations"] or "float"
        assert f"input={wanted}" in repr(twin), name
    assert str(twins["head"].to_quantized().weight_format) == "int8:row"
    assert str(twins["b"].to_quantized().weight_format) == "int4:g16:mse"
