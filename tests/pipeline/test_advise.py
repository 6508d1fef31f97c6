"""The advisor: it measures what `quantize` will deploy, chooses by it, and its scheme makes exactly that."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import evenbits
from evenbits.errors import EvenbitsError
from evenbits.nn.base import QuantizedLayer
from evenbits.numerics.encode import encode
from evenbits.pipeline.advice import Advice, LayerAdvice
from evenbits.pipeline.advise import advise
from evenbits.pipeline.candidates import TOLERANCE
from evenbits.schemes.scheme import resolve

D = 256


class Net(nn.Module):
    """A layer of normal weights, one of uniform ones, one with planted outliers, a convolution and a narrow one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.normal, self.even, self.far = nn.Linear(D, 64), nn.Linear(D, 64), nn.Linear(D, 64)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for module in (self.conv, self.normal, self.far):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / 16)
            far = torch.rand(self.far.weight.shape, generator=generator) < 0.01
            self.far.weight[far] *= 20
            self.even.weight.copy_(torch.rand(self.even.weight.shape, generator=generator) - 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = x.reshape(-1, 8, 4, 8)
        return self.normal(x) + self.even(x) + self.far(x) + self.deep(self.conv(images)).mean((1, 2, 3))[:, None]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(16, D, generator=generator) for _ in range(count)]


def by_name(advice: Advice) -> dict[str, LayerAdvice]:
    return {layer.name: layer for layer in advice.layers}


@pytest.fixture(scope="module")
def advice() -> Advice:
    return advise(net(), data=batches())


def test_every_format_keeps_the_budget_and_is_counted_as_it_is(advice: Advice) -> None:
    for layer in advice.advised:
        for measured in layer.candidates:
            assert measured.bits <= advice.bits + TOLERANCE, (layer.name, measured)
        fitting = [m for m in layer.candidates if m.format]
        weight = dict(net().named_modules())[layer.name].weight.detach().flatten(1)  # type: ignore[union-attr, operator]
        assert layer.chosen in fitting
        assert layer.chosen.bits == encode(weight, layer.chosen.encoded).bits_per_element


def test_each_kind_of_weight_gets_what_suits_it(advice: Advice) -> None:
    found = {name: layer.chosen.candidate for name, layer in by_name(advice).items() if layer.chosen}
    assert found == {
        "normal": "nf4:g*:mse",
        "even": "int4:g*:7.5:mse",
        "far": "ovp4:g*",
        "conv": "nf4:g*:mse",
    }


def test_normal_weights_prefer_searched_nf4_to_pairs_by_about_a_decibel() -> None:
    found = advise(net(), candidates=["nf4:g*:mse", "ovp4:g*"], data=batches(60))
    figures = {m.candidate: m for m in by_name(found)["normal"].candidates}
    nf4, pairs = figures["nf4:g*:mse"], figures["ovp4:g*"]
    assert (nf4.format, pairs.format) == ("nf4:g32:mse", "ovp4:g32") and nf4.bits == pairs.bits
    assert nf4.output_sqnr_db is not None and pairs.output_sqnr_db is not None
    assert 0.8 <= nf4.output_sqnr_db - pairs.output_sqnr_db <= 1.3


def test_int4_and_pairs_are_about_equal_in_groups_of_128_on_normal_weights() -> None:
    found = advise(net(), bits=4.125, candidates=["int4:g*:mse", "ovp4:g*"], data=batches(60))
    int4, pairs = (m for m in by_name(found)["normal"].candidates)
    assert (int4.format, pairs.format) == ("int4:g128:mse", "ovp4:g128")
    assert int4.output_sqnr_db is not None and pairs.output_sqnr_db is not None
    assert abs(int4.output_sqnr_db - pairs.output_sqnr_db) < 0.5


def test_pairs_lead_clearly_where_outliers_are_planted_and_the_words_say_why(advice: Advice) -> None:
    far = by_name(advice)["far"]
    assert far.lead_db is not None and far.lead_db > 3 and far.facts is not None
    weight = net().far.weight.detach()
    sigma = weight.square().mean(dim=1, keepdim=True).sqrt()
    assert far.facts.peak == pytest.approx(float((weight.abs() / sigma).max()), rel=1e-5)
    assert far.facts.beyond == pytest.approx(100 * float((weight.abs() > 4 * sigma).float().mean()), rel=1e-5)
    assert far.facts.pairs is not None and far.facts.pairs > 1
    assert f"the largest at {far.facts.peak:.1f} σ" in far.why and f"{far.lead_db:.2f} dB better than" in far.why


def test_the_zones_add_up_to_the_weighted_error(advice: Advice) -> None:
    weight, x = net().normal.weight.detach(), torch.cat(batches())
    h = x.double().square().mean(dim=0)
    for measured in by_name(advice)["normal"].candidates:
        if "ovp4" in measured.format:
            continue  # weighed by the input while encoding
        error = (encode(weight, measured.format).dequantize() - weight).double().square() * h
        assert measured.zones is not None
        assert sum(measured.zones) == pytest.approx(float(error.sum() / (weight.double().square() * h).sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("activations", "dynamic"), [(None, True), ("int8:row", True), ("int8:tensor", False), ("ovp4:row", True)]
)
def test_the_scheme_makes_what_was_measured(tmp_path: Path, activations: str | None, dynamic: bool) -> None:
    """advise → YAML → quantize: formats, bits and output errors of the quantized model are those of the advice."""
    found = advise(net(), activations=activations, dynamic=dynamic, data=batches())
    file = tmp_path / "scheme.yaml"
    file.write_text(found.scheme().to_yaml(), encoding="utf-8")
    assert resolve(file) == found.scheme()
    result = evenbits.quantize(net(), scheme=file, method=found.method, data=batches())
    expected = {layer.name: layer.chosen for layer in found.advised}
    assert {row.name for row in result.quantized} == set(expected)
    for row in result.quantized:
        chosen = expected[row.name]
        assert chosen is not None and chosen.output_sqnr_db is not None
        assert (row.format, row.bits_per_weight) == (chosen.encoded, pytest.approx(chosen.bits))
        assert row.input_format.startswith(activations or "float")
        assert row.output_sqnr_db == pytest.approx(chosen.output_sqnr_db, abs=1e-4)


def test_one_candidate_everywhere_is_a_scheme_too(advice: Advice) -> None:
    single = advice.scheme("nf4:g*:mse")
    result = evenbits.quantize(net(), scheme=single, method=advice.method, data=batches())
    assert {row.format.partition(":")[0] for row in result.quantized} == {"nf4"}
    total = {total.name: total for total in advice.totals}["nf4:g*:mse"]
    figures = [row.output_sqnr_db for row in result.quantized if row.output_sqnr_db is not None]
    assert total.bits == pytest.approx(32 * result.weight_bytes / result.float_weight_bytes)
    assert total.mean_sqnr_db == pytest.approx(sum(figures) / len(figures), abs=1e-4)
    assert total.mean_error == pytest.approx(sum(10 ** (-f / 10) for f in figures) / len(figures), rel=1e-4)
    with pytest.raises(EvenbitsError, match="unknown candidate 'nf4:g32'"):
        advice.scheme("nf4:g32")


def test_the_mix_is_at_least_as_good_as_any_format_everywhere_up_to_the_margin(advice: Advice) -> None:
    mix, *singles = advice.totals
    assert mix.name == "advised" and [t.name for t in singles] == list(advice.candidates)
    for single in singles:
        assert mix.mean_sqnr_db is not None and single.mean_sqnr_db is not None
        assert mix.mean_sqnr_db >= single.mean_sqnr_db - advice.margin_db


def test_all_batches_count_and_an_iterator_will_do() -> None:
    """Errors are sums over every batch, not only over the few that are kept for tracing."""
    data = [*batches(5), 100 * batches(6)[5]]
    many = advise(net(), data=data, candidates=["int4:row"])
    again = advise(net(), data=iter(data), candidates=["int4:row"])
    assert many.calibration_batches == again.calibration_batches == 6
    model, x = net(), torch.cat(data)
    for name in ("normal", "far"):
        layer = model.get_submodule(name)
        y = layer(x).detach().double()
        decoded = encode(layer.weight.detach(), "int4:row").dequantize()  # type: ignore[operator, union-attr]
        noise = (nn.functional.linear(x, decoded, layer.bias.detach()).double() - y).square().sum()  # type: ignore[arg-type]
        expected = 10 * math.log10(float(y.square().sum() / noise))
        for found in (many, again):
            assert by_name(found)[name].candidates[0].output_sqnr_db == pytest.approx(expected, abs=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    advise(model, data=batches(), activations="int8:row")
    assert model.training and not any(isinstance(m, QuantizedLayer) for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_margin_prefers_integer_products_only_as_far_as_it_goes() -> None:
    strict = advise(net(), activations="int8:row", data=batches(), margin_db=0)
    wide = advise(net(), activations="int8:row", data=batches(), margin_db=30)
    for layer in strict.advised:
        assert layer.chosen is not None
        best = max(m.output_sqnr_db or 0 for m in layer.candidates if m.format)
        assert layer.chosen.output_sqnr_db == best
    assert all(layer.chosen is not None and layer.chosen.integer == "product" for layer in wide.advised)
    result = evenbits.quantize(net(), scheme=wide.scheme(), method="by_format", data=batches())
    assert " in " not in result.backend.split("(")[0]  # every layer's product is an integer one


def test_inputs_alone_bound_what_a_layer_can_reach() -> None:
    found = advise(net(), activations="int8:row", data=batches())
    for layer in found.advised:
        assert layer.facts is not None and layer.facts.inputs_sqnr_db is not None
        assert all((m.output_sqnr_db or 0) < layer.facts.inputs_sqnr_db for m in layer.candidates if m.format)
        assert "Rounding the inputs alone makes" in layer.why


def test_a_layer_that_nothing_fits_is_listed_and_stays_float(advice: Advice) -> None:
    deep = by_name(advice)["deep"]  # rows of nine
    assert (
        deep.chosen is None and "nothing fits the budget: the least that a candidate takes is 6.22 bits" in deep.reason
    )
    assert all(m.reason and not m.format for m in deep.candidates)
    assert advice.scheme().ignores("deep")
    result = evenbits.quantize(net(), scheme=advice.scheme(), data=batches())
    assert {row.name for row in result.layers if row.status == "float"} == {"deep"}


def test_a_candidate_that_fits_some_layers_only_has_no_total_and_no_scheme() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 100), nn.Linear(100, 8))
    found = advise(model, candidates=["int4:row", "mxfp4"], data=[torch.randn(8, 64)], bits=4.26)
    total = {t.name: t for t in found.totals}["mxfp4"]
    assert (total.layers, total.bits, total.mean_error) == (2, None, None)
    last = by_name(found)["2"].candidates[1]
    assert last.candidate == "mxfp4" and last.reason == "takes 5.440 bits or more on rows of 100"
    with pytest.raises(EvenbitsError, match=r"mxfp4 does not fit layer 2: it takes 5\.440 bits or more"):
        found.scheme("mxfp4")


class Late(nn.Module):
    """`unused` never runs; `classifier` is also the last part of another name; `tied` shares a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.unused = nn.Linear(64, 64), nn.Linear(64, 32)
        self.heads = nn.ModuleDict({"classifier": nn.Linear(64, 64), "tied": nn.Linear(64, 64)})
        self.tied = nn.Linear(64, 64)
        self.tied.weight = self.heads["tied"].weight
        with torch.no_grad():
            self.classifier.weight[torch.rand(64, 64) < 0.02] *= 30

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads["classifier"](x) + self.classifier(x) + self.tied(x) + self.heads["tied"](x)


def test_names_that_are_last_parts_of_others_and_layers_that_did_not_run() -> None:
    torch.manual_seed(0)
    model = Late().eval()
    found = advise(model, data=[torch.randn(256, 64)], candidates=["int4:row:7.5:mse", "ovp4:row"])
    layers = by_name(found)
    assert "tied" in layers["tied"].reason and layers["unused"].chosen is not None
    assert "did not run on the calibration data" in layers["unused"].why
    chosen = {name: layer.chosen.format for name, layer in layers.items() if layer.chosen}
    assert chosen["classifier"] == "ovp4:row" and chosen["heads.classifier"] == "int4:row:7.5:mse"
    scheme = found.scheme()
    assert {name: str(scheme.of(name).weights) for name in chosen} == chosen
    result = evenbits.quantize(model, scheme=scheme)  # every pattern reaches its layer
    assert {row.name: row.format.partition(":")[0].partition("-")[0] for row in result.quantized} == {
        name: fmt.partition(":")[0] for name, fmt in chosen.items()
    }
    assert all(total.mean_error is not None for total in found.totals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_weights_keyword_inputs_and_half_floats(dtype: torch.dtype) -> None:
    from transformers.pytorch_utils import Conv1D

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.plain = Conv1D(96, 64), nn.Linear(64, 96)

        def forward(self, *, x: torch.Tensor) -> torch.Tensor:
            return self.wide(x) + self.plain(input=x)

    torch.manual_seed(0)
    model = Odd().to(dtype).eval()
    data = [{"x": torch.randn(3, 8, 64, dtype=dtype)} for _ in range(2)]
    found = advise(model, data=data, activations="int8:tensor", dynamic=False)
    assert by_name(found)["wide"].shape == by_name(found)["plain"].shape == (96, 64)
    result = evenbits.quantize(model, scheme=found.scheme(), method=found.method, data=data)
    for row in result.quantized:
        chosen = by_name(found)[row.name].chosen
        assert chosen is not None and chosen.output_sqnr_db is not None and row.format == chosen.encoded
        assert row.output_sqnr_db == pytest.approx(chosen.output_sqnr_db, abs=1e-3 if dtype == torch.float32 else 0.2)


def test_the_result_is_plain_json(advice: Advice) -> None:
    plain = json.loads(json.dumps(advice.to_json(), allow_nan=False))
    assert resolve(plain["scheme"]) == advice.scheme()
    assert {layer["name"] for layer in plain["layers"]} == {"conv", "deep", "normal", "even", "far"}
    assert plain["method"] == "by_format" and plain["bits"] == 4.25


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": None}, "pass calibration data"),
        ({"data": []}, "calibration data is empty"),
        ({"data": torch.randn(2, D)}, "iterable of batches"),
        ({"data": [torch.full((2, D), math.nan)]}, "NaN or infinite"),
        ({"data": [torch.randn(2, 3)]}, "could not run calibration batch 0"),
        ({"bits": 0}, "bits must be a number above 0; given 0"),
        ({"bits": math.nan}, "bits must be a number"),
        ({"bits": "4"}, "bits must be a number"),
        ({"bits": True}, "bits must be a number"),
        ({"margin_db": -0.1}, "margin_db must be a number of 0 or more"),
        ({"margin_db": math.inf}, "margin_db must be a number"),
        ({"bits": 3}, "no layer would get a format at 3 true bits"),
        ({"candidates": ["ovp5:g*"]}, "ovp5"),
        ({"activations": "int9:row"}, "int9"),
        ({"activations": "int8:row", "dynamic": False}, "static activations have one scale per tensor"),
        ({"activations": "int8:axis1"}, "another axis"),
        ({"ignore": ["*"]}, "ignored by the scheme"),
    ],
)
def test_what_cannot_be_advised_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(EvenbitsError) as caught:
        advise(net(), **{"data": batches(1), **options})
    assert words in str(caught.value)


def test_what_is_no_float_model_is_refused() -> None:
    with pytest.raises(EvenbitsError, match=r"advise takes a torch\.nn\.Module; given str"):
        advise("model", data=batches())  # type: ignore[arg-type]
    model = net()
    evenbits.quantize(model, scheme="W8A16")
    with pytest.raises(EvenbitsError, match="quantized already"):
        advise(model, data=batches())
    broken = net()
    broken.far.weight.data[0, 0] = math.inf
    with pytest.raises(EvenbitsError, match=r"parameter far\.weight holds NaN or infinite"):
        advise(broken, data=batches())
    with pytest.raises(EvenbitsError, match="It has no linear layer"):
        advise(nn.Sequential(nn.LayerNorm(D)), data=batches())


def test_an_output_that_is_not_finite_names_its_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    with pytest.raises(
        EvenbitsError, match=r"layer 0: the output in int4:row holds NaN or infinite values|layer 2: NaN"
    ):
        advise(model, data=[torch.full((2, 64), 1e2)], candidates=["int4:row"])


@pytest.mark.data
def test_real_attention_weights_prefer_searched_nf4_by_about_a_decibel(test_data: Path) -> None:
    from safetensors.torch import load_file

    found = load_file(test_data / "gpt2_attn_weights" / "gpt2_124m_attn_4layers.safetensors")
    weights = {name: x.T[::8].float() for name, x in found.items() if ".attn." in name and x.ndim == 2}
    model = nn.ModuleDict()
    for name, weight in weights.items():
        model[name.replace(".", "_")] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        model[name.replace(".", "_")].weight.data = weight.contiguous()

    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([layer(x) for layer in self.layers.values()], dim=-1)

    advice = advise(Side(), data=[torch.randn(256, 768)], candidates=["nf4:g*:mse", "ovp4:g*"])
    leads = [layer.lead_db or 0 for layer in advice.advised]
    assert len(leads) == len(weights) >= 8
    assert all(layer.chosen is not None and layer.chosen.format == "nf4:g32:mse" for layer in advice.advised)
    assert 0.8 <= sum(leads) / len(leads) <= 1.3


@pytest.mark.data
def test_a_real_transformer_is_advised_and_quantized(test_data: Path) -> None:
    from evenbits.checkpoints.sources import open_model
    from evenbits.pipeline.calibration import calibration

    source = open_model(str(test_data / "stories260k_llama"))
    blocks = calibration(None, source.model, source.tokenizer, samples=8).batches
    advice = advise(source.model, data=blocks)
    formats = [layer.chosen.candidate for layer in advice.advised if layer.chosen]
    assert len(formats) == 35 and len(set(formats)) > 1
    assert formats.count("nf4:g*:mse") > 20  # nearly normal weights, as in docs/formats.md
    result = evenbits.quantize(source.model, scheme=advice.scheme(), data=blocks)
    assert result.method == "by_format" and len(result.quantized) == 35
    assert 32 * result.weight_bytes / result.float_weight_bytes <= 4.25 + TOLERANCE


CONVOLUTIONS = {
    "conv1d": lambda: nn.Sequential(nn.Conv1d(8, 32, 3, padding=1), nn.Flatten(), nn.Linear(32 * 12, 32)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose1d(8, 32, 3, padding=1), nn.Flatten(), nn.Linear(32 * 12, 32)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_every_kind_are_measured_as_deployed(name: str) -> None:
    torch.manual_seed(0)
    model, data = CONVOLUTIONS[name]().eval(), [torch.randn(4, 8, 12) * torch.logspace(-2, 1, 8)[:, None]]
    assert_as_quantized(model, data)


class Normed(nn.Module):
    """A convolution with BatchNorm behind it, and attention: what `quantize` prepares before it plans."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(8, 32, 3, padding=1), nn.BatchNorm1d(32)
        self.attn = nn.MultiheadAttention(32, 2, batch_first=True)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-2, 1, 32))
            self.norm.running_mean.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)).transpose(1, 2)
        return self.attn(y, y, y, need_weights=False)[0]


def test_norms_and_fused_modules_are_prepared_as_quantize_does_and_come_back() -> None:
    torch.manual_seed(0)
    model, data = Normed().eval(), [torch.randn(4, 8, 12)]
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    advise(model, bits=9, candidates=["int4:row"], data=data)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_as_quantized(model, data)
    assert type(model.norm).__name__ == "FoldedNorm" and model.attn.q_proj.weight.dtype == torch.uint8


def assert_as_quantized(model: nn.Module, data: list[torch.Tensor]) -> None:
    """What the advisor says of every layer is what `quantize` measures of the layer it makes."""
    advice = advise(model, bits=9, activations="int8:row", candidates=["int4:row"], data=data)
    found = evenbits.quantize(model, scheme=advice.scheme(), method=advice.method, data=data)
    rows = {row.name: row.output_sqnr_db for row in found.layers if row.status == "quantized"}
    assert rows and rows == pytest.approx(
        {layer.name: layer.chosen.output_sqnr_db for layer in advice.advised}, abs=0.01
    )
