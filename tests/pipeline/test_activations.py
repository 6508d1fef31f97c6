"""How inputs are quantized: searched scales of pairs and choices, spanning ones of integers, none when dynamic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import evenbits
from evenbits.errors import EvenbitsError
from evenbits.nn.base import QuantizedLayer
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.format import Format
from evenbits.observers.calibrate import watching
from evenbits.observers.scale_search import ScaleSearch

D = 32


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(D), nn.Linear(D, 48), nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(self.norm(x))))


class Curved(Net):
    """Nothing passes GELU: b is smoothed by a multiply of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(nn.functional.gelu(self.a(self.norm(x))))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 6, 3, groups=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(x)


class Gated(nn.Module):
    """The gate's product is zero: `b` is fed nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 4)
        self.open = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) * (1.0 if self.open else 0.0)) + x[..., :4]


class Late(Net):
    """`b` runs on wide batches only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if len(x) > 4 else self.a(x)[..., :5]


def batches(count: int = 3, rows: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    spread = torch.where(torch.arange(D) % 11 == 4, 9.0, 1.0)
    return [torch.randn(rows, D, generator=generator) * spread for _ in range(count)]


def inputs(model: nn.Module, data: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What every layer of a float model is given, over all batches."""
    seen: dict[str, list[torch.Tensor]] = {
        n: [] for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
    }
    with watching(model, seen, lambda name, x, _: seen[name].append(x.detach().clone())), torch.no_grad():
        for batch in data:
            model(batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def scheme(activations: str | None, *, dynamic: bool = False, weights: str = "int8:row") -> dict[str, Any]:
    return {"weights": weights, "input_activations": activations, "dynamic": dynamic}


@pytest.mark.parametrize(
    ("activations", "resolved"),
    [
        ("ovp4:tensor", {"ovp4-int:tensor", "ovp4-flint:tensor"}),
        ("ovp4-i8:tensor", {"ovp4-int:tensor", "ovp4-flint_i8:tensor"}),
        ("ovp4:tensor:reference:3sigma", {f"ovp4-{kind}:tensor:3sigma:reference" for kind in ("int", "flint")}),
        ("ovp4-flint:tensor", {"ovp4-flint:tensor"}),
        ("ant4:tensor", {"int4:tensor:mse", "pot4:tensor", "flint4:tensor"}),
        ("int4:tensor:mse", {"int4:tensor:mse"}),
    ],
)
def test_static_activations_get_a_searched_scale_and_a_resolved_format(activations: str, resolved: set[str]) -> None:
    model, data = Net().eval(), batches()
    seen = inputs(model, data)
    result = evenbits.quantize(model, scheme=scheme(activations), method="rtn", data=data)
    for name, layer in layers(model).items():
        assert str(layer.input_format) in resolved
        assert layer.input_scale is not None and layer.input_scale.shape == (1,)
        search = ScaleSearch(Format.parse(activations))
        search.measure(seen[name])
        search.update(seen[name])
        fmt, scale = search.best()
        assert layer.input_format == fmt
        assert float(layer.input_scale) == pytest.approx(float(scale), rel=1e-5)
        row = next(row for row in result.layers if row.name == name)
        assert row.input_format == f"{fmt} static"
        rounded = fake_quantize(seen[name], fmt, scale=layer.input_scale)
        assert layer.quantized_input(seen[name]).equal(rounded)
        spanning = float(seen[name].abs().max()) / {"ovp4-int": 7, "int4": 7, "pot4": 64}.get(fmt.dtype.name, 16)
        clipped = fake_quantize(seen[name], fmt, scale=torch.tensor([spanning]))
        if "3sigma" not in activations:
            assert (rounded - seen[name]).norm() <= (clipped - seen[name]).norm() * (1 + 1e-6)


def test_layers_resolve_their_choice_one_by_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.peaked = nn.Linear(D, 4), nn.Linear(D, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.flat(torch.sin(x)) + self.peaked(x**5)

    model = Two().eval()
    data = [torch.randn(64, D) * 2]
    evenbits.quantize(model, scheme=scheme("ant4:tensor"), method="rtn", data=data)
    assert str(model.flat.input_format) == "int4:tensor:mse"
    assert str(model.peaked.input_format) == "pot4:tensor"


def smoothed(seen: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each layer's input over the paper's s for alpha = 0.5."""
    scales = {name: (x.abs().amax(0) / weights[name].abs().amax(0)).sqrt() for name, x in seen.items()}
    dead = {name: x.abs().amax(0) < 1e-5 for name, x in seen.items()}
    return {name: x / torch.where(dead[name], 1.0, scales[name]) for name, x in seen.items()}


@pytest.mark.parametrize("method", ["rtn", "smoothquant"])
@pytest.mark.parametrize("make", [Net, Curved])
def test_static_int8_is_absmax_over_127_after_smoothing(make: type[Net], method: str) -> None:
    """Folded into a norm, folded into rows (behind ReLU) or multiplied (behind GELU): the scale is the smoothed one."""
    model, data = make().eval(), batches()
    seen = inputs(model, data)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in seen}
    evenbits.quantize(model, scheme="W8A8_STATIC", method=method, data=data)
    expected = smoothed(seen, weights) if method == "smoothquant" else seen
    for name, layer in layers(model).items():
        assert (layer.input_multiplier is not None) == (method == "smoothquant" and make is Curved and name == "b")
        assert (method == "smoothquant") == (not expected[name].allclose(seen[name]))
        assert float(layer.input_scale) == pytest.approx(float(expected[name].abs().max()) / 127, rel=1e-5)
        assert str(layer.input_format) == "int8:tensor"
        assert layer.qweight().dequantize().shape == weights[name].shape


@pytest.mark.parametrize("make", [Net, Curved])
def test_searched_scales_are_those_of_the_smoothed_input(make: type[Net]) -> None:
    model, data = make().eval(), batches()
    seen = inputs(model, data)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in seen}
    evenbits.quantize(model, scheme=scheme("ovp4:tensor"), method="smoothquant", data=data)
    for name, x in smoothed(seen, weights).items():
        search = ScaleSearch(Format.parse("ovp4:tensor"))
        search.measure(x)
        search.update(x)
        fmt, scale = search.best()
        layer = layers(model)[name]
        assert layer.input_format == fmt and float(layer.input_scale) == pytest.approx(float(scale), rel=1e-4)


@pytest.mark.parametrize("activations", ["int8:row", "int8:tensor", "ovp4:row", "ovp4:tensor", "ant4:row", "ovp4:g16"])
@pytest.mark.parametrize("with_data", [True, False])
def test_dynamic_activations_have_no_scale(activations: str, with_data: bool) -> None:
    model, data = Net().eval(), batches()
    chosen = scheme(activations, dynamic=True)
    evenbits.quantize(model, scheme=chosen, method="rtn", data=data if with_data else None)
    for layer in layers(model).values():
        assert layer.input_scale is None and layer.input_zero_point is None
        assert layer.input_format == Format.parse(activations)
    assert torch.isfinite(model(data[0])).all()


def test_without_activations_inputs_stay_float() -> None:
    model = Net().eval()
    evenbits.quantize(model, scheme=scheme(None), method="rtn", data=batches())
    assert all(layer.input_format is None and layer.input_scale is None for layer in layers(model).values())


@pytest.mark.parametrize(
    "activations", ["nf4:tensor", "fp8:tensor", "ovp4:tensor:minmax", "ant4:tensor:minmax", "int4:tensor"]
)
def test_minmax_spans_all_that_was_seen(activations: str) -> None:
    model, data = Net().eval(), batches()
    seen = inputs(model, data)
    evenbits.quantize(model, scheme=scheme(activations), method="rtn", data=data)
    tops = {"nf4": 1, "fp8": 448, "int4": 7, "ovp4-int": 7, "ovp4-flint": 16, "flint4": 16, "pot4": 64}
    for name, layer in layers(model).items():
        assert layer.input_format is not None
        top = tops[layer.input_format.dtype.name]
        assert float(layer.input_scale) == pytest.approx(float(seen[name].abs().max()) / top, rel=1e-5)


def test_static_affine_activations_keep_their_zero_point() -> None:
    model, data = Net().eval(), batches()
    expected = model(data[0])
    evenbits.quantize(model, scheme=scheme("uint8:tensor:affine"), method="rtn", data=data)
    assert all(layer.input_zero_point is not None for layer in layers(model).values())
    assert (model(data[0]) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("activations", ["uint8:tensor:affine:mse", "uint8:tensor:affine:p99", "int8:tensor:p99.9"])
def test_scale_rules_that_are_not_calibrated_are_refused(activations: str) -> None:
    """They used to be searched as if they were symmetric: everything below zero was cut off, without a word."""
    model = Net().eval()
    with pytest.raises(EvenbitsError, match=f"{activations}: a calibrated scale is searched for symmetric formats"):
        evenbits.quantize(model, scheme=scheme(activations), method="rtn", data=batches())
    assert not layers(model)


def test_negative_inputs_of_an_unsigned_format_name_the_layer() -> None:
    with pytest.raises(EvenbitsError, match=r"layer a: uint4:tensor:mse.*cannot hold negative values"):
        evenbits.quantize(Net().eval(), scheme=scheme("uint4:tensor:mse"), method="rtn", data=batches())


@pytest.mark.parametrize("activations", ["ovp4:tensor", "ant4:tensor", "int4:tensor:mse", "int8:tensor"])
def test_a_layer_fed_zeros(activations: str) -> None:
    """It gets scale 1, so that what comes later is rounded, not wiped out; its weights are rounded without weights."""
    model = Gated().eval()
    weights = "ovp4:row" if "ovp" in activations else "int8:row"
    result = evenbits.quantize(model, scheme=scheme(activations, weights=weights), method=None, data=batches())
    assert float(model.b.input_scale) == 1 and float(model.a.input_scale) != 1
    assert all(row.sqnr_db > 12 for row in result.quantized)
    x = batches(1)[0]
    assert model(x).equal(model(x)) and torch.isfinite(model(x)).all()
    assert (model.b(torch.full((1, D), 3.0)) - model.b.bias).abs().max() > 0.01


@pytest.mark.parametrize("shape", [(2, 3, 7, 7), (3, 7, 7)])
def test_convolutions_are_searched_as_they_are_rounded(shape: tuple[int, ...]) -> None:
    """Images are rows, so pairs run across their ends of line, whether there is a batch dimension or not."""
    torch.manual_seed(2)
    model, data = ConvNet().eval(), [torch.randn(shape) for _ in range(2)]
    for x in data:
        for start in (0, 1):  # neighbours far out, in one byte or in two
            x.view(-1)[start::9] *= 20
    evenbits.quantize(model, scheme=scheme("ovp4:tensor"), method="rtn", data=data)
    search = ScaleSearch(Format.parse("ovp4:tensor"))
    rows = [x.reshape(-1, 3 * 7 * 7) for x in data]
    for x in rows:
        search.measure(x)
    for x in rows:
        search.update(x)
    fmt, scale = search.best()
    assert model.c.input_format == fmt and model.c.input_scale.equal(scale)
    by_lines = ScaleSearch(Format.parse("ovp4:tensor"))
    for x in data:
        by_lines.measure(x)
    for x in data:
        by_lines.update(x.reshape(-1, 7 * 7))
    assert by_lines._errors != search._errors
    assert model(data[0]).shape == (*shape[:-3], 6, 5, 5)


def test_a_layer_that_runs_late_is_named() -> None:
    """Scales are searched on the kept batches; ranges are those of all of them."""
    data = [*batches(5, rows=4), *batches(1, rows=8)]
    model = Late().eval()
    with pytest.raises(EvenbitsError, match="layer b did not run on the first 4 calibration batches"):
        evenbits.quantize(model, scheme="W4A4_OVP", data=data)
    assert not layers(model)
    evenbits.quantize(model, scheme="W4A4_OVP", data=data[::-1])
    assert set(layers(model)) == {"a", "b"}
    spanning = Late().eval()
    evenbits.quantize(spanning, scheme="W8A8_STATIC", method="rtn", data=data)
    assert set(layers(spanning)) == {"a", "b"}


def test_a_layer_that_never_runs_stays_float_when_static() -> None:
    model = Late().eval()
    result = evenbits.quantize(model, scheme="W4A4_OVP", data=batches(2, rows=4))
    row = next(row for row in result.layers if row.name == "b")
    assert row.status == "float" and row.reason == "did not run on the calibration data: no activation scale"


def test_batches_that_leave_a_layer_nothing_are_no_data_for_it() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, 4), nn.Linear(D, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = x[:, 0] > 0
            y = x.new_zeros(len(x), 4)
            y[first], y[~first] = self.a(x[first]), self.b(x[~first])
            return y

    data = batches(3)
    data[1][:, 0] = 1.0
    model = Experts().eval()
    evenbits.quantize(model, scheme="W4A4_OVP", data=data)
    assert set(layers(model)) == {"a", "b"}
    assert all(float(layer.input_scale) > 0 for layer in layers(model).values())
