"""Four-bit schemes from the float model to the folder and back: what was chosen, counted, said, and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import evenbits
from evenbits.checkpoints.describe import describe
from evenbits.nn.base import QuantizedLayer
from evenbits.nn.conv import QConv2d
from evenbits.numerics.pair_statistics import pair_statistics

D = 32
OWN: dict[str, Any] = {"W4A16_OVP_MIX": {"weights": "ovp4-mix:g32"}}
# scheme → method by default, weight formats and input formats that layers may end up with, integer product
SCHEMES: dict[str, tuple[str, set[str], set[str], bool]] = {
    "W4A4_OVP": (
        "olive",
        {"ovp4-int:row", "ovp4-flint:row"},
        {"ovp4-int:tensor static", "ovp4-flint:tensor static"},
        False,
    ),
    "W4A4_OVP_DYNAMIC": ("olive", {"ovp4-int:row", "ovp4-flint:row"}, {"ovp4:row dynamic"}, False),
    "W4A8_OVP": ("olive", {"ovp4-int:row", "ovp4-flint_i8:row"}, {"int8:row dynamic"}, True),
    # In groups linear layers run in integers, convolutions do not.
    "W4A8_OVP_G32": ("olive", {"ovp4-int:g32", "ovp4-flint:g32"}, {"int8:row dynamic"}, True),
    "W4A16_OVP_G32": ("olive", {"ovp4-int:g32", "ovp4-flint:g32"}, {"float"}, False),
    "W4A4_ANT": (
        "ant",
        {"int4:row:mse", "pot4:row", "flint4:row"},
        {"int4:tensor:mse static", "pot4:tensor static", "flint4:tensor static"},
        False,
    ),
    "W4A4_OVP_REFERENCE": (
        "olive",
        {f"ovp4-{kind}:row:3sigma:reference" for kind in ("int", "flint")},
        {f"ovp4-{kind}:tensor:3sigma:reference static" for kind in ("int", "flint")},
        False,
    ),
    "W4A4_OVP_G32": ("olive", {"ovp4-int:g32", "ovp4-flint:g32"}, {"ovp4:g32 dynamic"}, False),
    "W4A16_OVP_MIX": ("olive", {"ovp4-mix:g32"}, {"float"}, False),
}
BITS = {"row": 4 + 16 / 32, "g32": 4 + 8 / 32}  # with scales, of rows of 32: the narrowest layers


class ConvNet(nn.Module):
    """Odd rows (3·3·3 = 27) and groups; a linear layer behind."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.c2(torch.relu(self.c1(x)))).mean((2, 3)))


def bert() -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """A tiny BERT with a few far weights, and batches of token ids."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=2 * D,
        max_position_embeddings=32,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
                parameter[torch.rand_like(parameter) < 0.01] *= 12
    generator = torch.Generator().manual_seed(3)
    return model, [{"input_ids": torch.randint(3, 64, (4, 10), generator=generator)} for _ in range(2)]


def pictures() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    return ConvNet().eval(), [torch.randn(4, 3, 9, 9, generator=generator) for _ in range(2)]


def run(model: nn.Module, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits if isinstance(batch, dict) else model(batch)


def layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def same(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and tensor.shape == second[name].shape, name
        assert (
            tensor.contiguous().view(-1).view(torch.uint8).equal(second[name].contiguous().view(-1).view(torch.uint8))
        )


def check_result(model: nn.Module, result: Any, scheme: str) -> None:
    method, weights, inputs, integer = SCHEMES[scheme]
    assert result.method == method
    assert {row.name for row in result.quantized} == set(layers(model))
    for row in result.quantized:
        layer = layers(model)[row.name]
        grouped = layer.weight_format.granularity.kind == "group"
        assert layer.is_integer is (integer and not (grouped and isinstance(layer, QConv2d)))
        assert row.format == str(layer.weight_format) and row.format.split(":")[0] in {w.split(":")[0] for w in weights}
        assert row.input_format in inputs
        assert row.sqnr_db > 10 and row.output_sqnr_db > 3
        if method == "olive":
            assert row.pairs is not None and row.pairs.nn + row.pairs.on + row.pairs.oo == pytest.approx(100)
            assert row.pairs.kind == layer.weight_format.dtype.kind  # type: ignore[union-attr]
        else:
            assert row.pairs is None
    assert result.backend.startswith("float product of ") is not integer


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["bert", "convnet"])
def test_there_and_back(kind: str, scheme: str, tmp_path: Path) -> None:
    model, data = bert() if kind == "bert" else pictures()
    before = run(model, data[0])
    chosen = OWN.get(scheme, scheme)
    result = evenbits.quantize(model, scheme=chosen, data=data)
    check_result(model, result, scheme)
    after = run(model, data[0])
    assert 1e-6 < float((after - before).norm() / before.norm()) < 0.8
    evenbits.save(model, tmp_path / "out", result=result)
    fresh = evenbits.load(tmp_path / "out", None if kind == "bert" else ConvNet())
    same(model, fresh)
    for batch in data:
        assert run(fresh, batch).equal(run(model, batch))
    stored = describe(tmp_path / "out")
    assert stored["method"] == result.method and stored["scheme"] == result.scheme
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    rows = {row["name"]: row for row in plain["layers"]}
    for row in stored["layers"]:
        assert row["pairs"] == rows[row["name"]]["pairs"]
        assert row["format"] == rows[row["name"]]["format"] and row["input_format"] == rows[row["name"]]["input_format"]
        if SCHEMES[scheme][0] == "olive":
            assert set(row["pairs"]) == {"kind", "nn", "on", "oo", "saturated"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_are_those_of_the_tensors(scheme: str) -> None:
    model, data = bert()
    result = evenbits.quantize(model, scheme=OWN.get(scheme, scheme), data=data)
    for row in result.quantized:
        layer = layers(model)[row.name]
        buffers = [b for n, b in layer.named_buffers() if n.startswith("weight")]
        assert row.weight_bytes == sum(len(b.contiguous().view(-1).view(torch.uint8)) for b in buffers)
        assert row.bits_per_weight == 8 * row.weight_bytes / (row.shape[0] * row.shape[1])
        if row.shape[0] >= D:
            bits = BITS["g32" if "G32" in scheme or "MIX" in scheme else "row"]
            assert row.bits_per_weight <= bits + 0.3  # the factor, the bits that say the kind


@pytest.mark.parametrize("scheme", ["W4A8_OVP_G32", "W4A16_OVP_MIX"])
def test_bytes_on_disk_are_those_in_memory(scheme: str, tmp_path: Path) -> None:
    model, data = bert()
    result = evenbits.quantize(model, scheme=OWN.get(scheme, scheme), data=data)
    evenbits.save(model, tmp_path / "out", result=result)
    assert describe(tmp_path / "out")["weight_bytes"] == result.weight_bytes


@pytest.mark.parametrize("scheme", ["W4A8_OVP", "W4A8_OVP_G32"])
def test_the_integer_product_is_that_of_the_decoded_weights(scheme: str) -> None:
    """Whether it runs in integers or in float, a layer computes decoded weight times rounded input."""
    model, data = bert()
    evenbits.quantize(model, scheme=scheme, data=data)
    for layer in layers(model).values():
        x = torch.randn(5, layer.weight_shape[1])
        bias = 0 if layer.bias is None else layer.bias.double()
        expected = layer.quantized_input(x).double() @ layer.qweight().dequantize(torch.float64).t() + bias
        assert layer(x).tolist() == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in expected.tolist()]


def test_statistics_are_those_of_the_weights_that_were_there() -> None:
    model, data = bert()
    name = "bert.encoder.layer.0.intermediate.dense"
    weight = model.get_submodule(name).weight.detach().clone()
    result = evenbits.quantize(model, scheme="W4A8_OVP", data=data)
    found = next(row.pairs for row in result.layers if row.name == name)
    assert found == pair_statistics(weight, layers(model)[name].qweight())
    assert found is not None and 0 < found.on < 20 and found.nn > 80


def test_calibration_weighs_and_without_it_nothing_is_weighed() -> None:
    """`weighted` needs the input's mean square: with it the layer's output is nearer, and it can be switched off."""
    packed, errors = {}, {}
    for name, options in (("weighted", {}), ("plain", {"weighted": False}), ("no data", None)):
        fresh, data = bert()
        with torch.no_grad():
            fresh.get_submodule("bert.embeddings.LayerNorm").weight[::7] *= 12  # outlier channels
        given = None if options is None else data
        result = evenbits.quantize(fresh, scheme="W4A16_OVP", data=given, **(options or {}))
        packed[name] = {n: layer.weight.clone() for n, layer in layers(fresh).items()}
        if given is not None:
            fed = [row for row in result.quantized if row.name.split(".")[-1] in ("query", "key", "value")]
            errors[name] = sum(10 ** (-row.output_sqnr_db / 10) for row in fed)
        assert result.options == (options or {})
    assert all(packed["plain"][n].equal(packed["no data"][n]) for n in packed["plain"])
    assert not all(packed["plain"][n].equal(packed["weighted"][n]) for n in packed["plain"])
    assert errors["weighted"] < 0.95 * errors["plain"]


def test_a_smoothed_layer_is_weighed_by_its_smoothed_input() -> None:
    """smoothquant and olive together: the weight is W·s, its column's weight E[x²] / s²."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, 6)).eval()
    weight, spread = model[2].weight.detach().clone(), torch.logspace(-1, 1, D)
    with torch.no_grad():
        model[0].weight *= spread.unsqueeze(1)
    data = [torch.randn(64, D) for _ in range(2)]
    with torch.no_grad():
        seen = torch.cat([nn.functional.gelu(model[0](batch)) for batch in data]).double()
    chosen = {"weights": "ovp4-int:row", "input_activations": "int8:row"}
    evenbits.quantize(model, scheme=chosen, method="smoothquant+olive", data=data)
    layer = layers(model)["2"]
    assert layer.input_multiplier is not None
    s = 1 / layer.input_multiplier
    moment = (seen.square().mean(0) / s.double().square()).float()
    expected = evenbits.encode(weight * s, "ovp4-int:row", importance=moment)
    other = evenbits.encode(weight * s, "ovp4-int:row", importance=seen.square().mean(0).float())

    def differing(encoded: evenbits.QTensor) -> int:
        return int((encoded.packed != layer.weight).sum())

    assert differing(expected) <= 2 < differing(other)  # s is known to a rounding of its reciprocal


def test_grouped_convolutions_are_weighed_by_the_channels_they_read() -> None:
    """Both groups read channels of which the odd ones are loud: errors move to the quiet columns."""
    torch.manual_seed(1)
    conv = nn.Conv2d(8, 6, 3, groups=2, bias=False)
    model = nn.Sequential(conv).eval()
    weight = conv.weight.detach().clone()
    loud = torch.where(torch.arange(8) % 2 == 1, 10.0, 0.2).view(1, 8, 1, 1)
    data = [torch.randn(4, 8, 9, 9) * loud for _ in range(2)]
    evenbits.quantize(model, scheme="W4A16_OVP", data=data)
    misses = (layers(model)["0"].qweight().dequantize().view(weight.shape) - weight).square().mean((0, 2, 3))
    plain = nn.Sequential(nn.Conv2d(8, 6, 3, groups=2, bias=False)).eval()
    plain[0].weight.data.copy_(weight)
    evenbits.quantize(plain, scheme="W4A16_OVP", data=data, weighted=False)
    unweighted = (layers(plain)["0"].qweight().dequantize().view(weight.shape) - weight).square().mean((0, 2, 3))
    assert float(misses[1::2].sum()) < float(unweighted[1::2].sum())
    assert float(misses[::2].sum()) >= float(unweighted[::2].sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model, data = pictures()
    model = model.to(dtype)
    halves = [batch.to(dtype) for batch in data]
    result = evenbits.quantize(model, scheme="W4A4_OVP", data=halves)
    evenbits.save(model, tmp_path / "out", result=result)
    fresh = evenbits.load(tmp_path / "out", ConvNet().to(dtype))
    same(model, fresh)
    y = run(fresh, halves[0])
    assert y.dtype == dtype and y.equal(run(model, halves[0])) and torch.isfinite(y).all()
