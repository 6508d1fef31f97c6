"""`quantize` on hand-made nets: what it does, what it says, and that a failure anywhere leaves the model as it was."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import evenbits
from evenbits.errors import EvenbitsError
from evenbits.graph.folding import Fold
from evenbits.nn.base import QuantizedLayer
from evenbits.nn.conv import QConv2d
from evenbits.nn.linear import QLinear
from evenbits.pipeline import prepare as prepare_module
from evenbits.pipeline import quantize as quantize_module
from evenbits.pipeline import solve as solve_module
from evenbits.pipeline import swap as swap_module
from evenbits.pipeline.balance import Balanced, balance
from evenbits.pipeline.batches import Batches

D = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.n1(x)
        attention = (self.q(h) @ self.k(h).transpose(-1, -2) / D**0.5).softmax(-1)
        x = x + self.drop(self.o(attention @ self.v(h)))
        return x + self.drop(self.down(torch.relu(self.up(self.n2(x)))))


class Net(nn.Module):
    def __init__(self, blocks: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 5)
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        y = self.head(self.norm(x))
        return y if bias is None else y + bias


class Viewed(nn.Module):
    """Takes a view of a convolution's output, as LeNet-like models do: it must be contiguous as torch's is."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.narrow(torch.relu(self.wide(x))))
        return self.head(x.view(x.size(0), -1))


class Mlp(nn.Module):
    """Nothing but linear layers: after quantization no parameter is left."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.bn, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.c2(torch.relu(self.bn(self.c1(x)))).mean((2, 3)))


def batches(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    spread = torch.logspace(-0.5, 0.5, D)
    return [torch.randn(2, 6, D, generator=generator) * spread for _ in range(count)]


class Snapshot:
    """Everything about a model that an error must not change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.facts = self._facts()

    def _facts(self) -> Any:
        modules = list(self.model.named_modules(remove_duplicate=False))
        return (
            [(name, id(module), type(module), module.training) for name, module in modules],
            [
                (name, id(p), p.requires_grad, p.dtype)
                for name, p in self.model.named_parameters(remove_duplicate=False)
            ],
            [(len(m._forward_hooks), len(m._forward_pre_hooks)) for _, m in modules],
        )

    def check(self) -> None:
        assert self._facts() == self.facts
        now = self.model.state_dict()
        assert list(now) == list(self.state)
        for name, tensor in self.state.items():
            assert now[name].dtype == tensor.dtype, name
            same = now[name].contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)
            assert torch.equal(*same), name


def refused(model: nn.Module, match: str, error: type[BaseException] = EvenbitsError, **kwargs: Any) -> None:
    """quantize(...) raises, and the model is as before."""
    before = Snapshot(model)
    with pytest.raises(error, match=match):
        evenbits.quantize(model, **{"data": batches(), **kwargs})
    before.check()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


# ---------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC", "W8A16"])
@pytest.mark.parametrize("method", ["rtn", "smoothquant"])
def test_the_output_stays_close_to_the_float_one(scheme: str, method: str) -> None:
    model = Net(2).eval()
    expected = [model(batch) for batch in batches()]
    result = evenbits.quantize(model, scheme=scheme, method=method, data=batches())
    for batch, before in zip(batches(), expected, strict=True):
        error = relative(model(batch), before)
        assert 1e-6 < error < 0.03
    assert len(result.quantized) == 13
    assert all(type(m) is not nn.Linear for m in model.modules())


def test_smoothing_saves_a_static_model_with_outlier_channels() -> None:
    torch.manual_seed(3)
    model = Net().eval()
    with torch.no_grad():
        for norm in (model.blocks[0].n1, model.blocks[0].n2, model.norm):
            norm.weight[5] *= 60
            norm.bias[9] = 25.0
        for layer in (*model.blocks[0].children(), model.head):
            if isinstance(layer, nn.Linear) and layer.in_features == D:
                layer.weight[:, 5] /= 60
                layer.weight[:, 9] /= 25
    expected = model(batches()[0])
    errors = {}
    for method in ("rtn", "smoothquant"):
        quantized = copy.deepcopy(model)
        evenbits.quantize(quantized, scheme="W8A8_STATIC", method=method, data=batches())
        errors[method] = relative(quantized(batches()[0]), expected)
    assert errors["smoothquant"] < errors["rtn"] / 3


@pytest.mark.parametrize("kind", ["transformer", "convolutions"])
def test_smoothing_with_rounding_switched_off_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 codes would hide a wrong scale; here the smoothed weights take the codes' place, in the whole net."""
    decided: list[Balanced] = []
    floating: list[nn.Module] = []

    def noted(*args: Any, **kwargs: Any) -> Balanced:
        floating.append(copy.deepcopy(args[0]))  # norms are folded already
        decided.append(balance(*args, **kwargs))
        return decided[0]

    monkeypatch.setattr(prepare_module, "balance", noted)
    model = (Net() if kind == "transformer" else ConvNet()).double().eval()
    x = [torch.randn(2, 3, 8, 8) if kind == "convolutions" else batch for batch in batches()]
    x = [batch.double() for batch in x]
    before = model(x[0])
    evenbits.quantize(model, scheme="W8A16", method="smoothquant", data=x, alpha=0.5)
    found, reference = decided[0], floating[0]
    assert found.folds and found.row_factors and (kind == "transformer" or found.multiplied)
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLayer)]:
        layer, layout = copy.deepcopy(reference.get_submodule(name)), found.layouts[name]
        rows = found.row_factors.get(name, torch.ones(layout.out_channels, dtype=torch.float64))
        columns = layout.mount_inputs(found.scales[name].double(), layer.weight.ndim)
        layer.weight.data = layer.weight.data * columns * layout.mount_outputs(rows, layer.weight.ndim)
        layer.bias.data = layer.bias.data * rows
        # What was put in the place of the codes is what the codes stand for.
        assert relative(module.qweight().dequantize(), layout.matrix(layer.weight.data).float()) < 0.01
        assert relative(module.bias, layer.bias) < 1e-6
        assert (module.input_multiplier is None) == (name not in found.multiplied)
        if module.input_multiplier is not None:
            divisor = found.scales[name].double()
            layer.register_forward_pre_hook(
                lambda m, args, s=divisor, at=layout: (args[0] / at.on_activation(s, args[0].ndim),)
            )
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    assert relative(model(x[0]), before) < 1e-9


def test_regions_of_a_block() -> None:
    result = evenbits.quantize(Net(), data=batches())
    found = {row.name: (row.status, row.reason) for row in result.regions}
    assert found == {
        "blocks.0.{q,k,v}": ("folded", "into blocks.0.n1"),
        "blocks.0.o": ("folded", "into the rows of blocks.0.v"),
        "blocks.0.up": ("folded", "into blocks.0.n2"),
        "blocks.0.down": ("folded", "into the rows of blocks.0.up"),
        "head": ("folded", "into norm"),
    }
    assert {name for row in result.regions for name in row.layers} == {row.name for row in result.quantized}


def test_a_model_of_linears_only_runs_afterwards() -> None:
    model = Mlp()
    data = [torch.randn(4, D)]
    expected = model(data[0])
    evenbits.quantize(model, data=data)
    assert not list(model.parameters())
    assert relative(model(data[0]), expected) < 0.03


def test_a_convolutional_net_is_quantized_and_its_convolutions_are_smoothed() -> None:
    model = ConvNet().eval()
    data = [torch.randn(2, 3, 8, 8)]
    expected = model(data[0])
    result = evenbits.quantize(model, data=data)
    assert type(model.c1) is QConv2d and type(model.c2) is QConv2d and type(model.head) is QLinear
    assert {row.name: (row.status, row.reason) for row in result.regions} == {
        "c1": ("multiplied", "its tensor comes from outside the model"),
        "c2": ("folded", "into the rows of c1"),  # whose BatchNorm was folded first
        "head": ("folded", "into the rows of c2"),
    }
    assert model.c1.input_multiplier is not None and model.c2.input_multiplier is None
    assert relative(model(data[0]), expected) < 0.05


def test_a_model_of_which_no_layer_runs_is_an_error_for_smoothing_and_rtn_is_not() -> None:
    class Idle(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    data = [torch.randn(3, D)]
    refused(Idle(), "smoothing was asked for and no region was smoothed.*did not run", data=data)
    assert len(evenbits.quantize(Idle(), method="rtn", data=data).quantized) == 2


def test_a_layer_shared_by_two_places_is_replaced_in_both() -> None:
    class Shared(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.again(torch.relu(self.a(x))))

    model = Shared().eval()
    data = [torch.randn(4, D)]
    expected = model(data[0])
    result = evenbits.quantize(model, data=data)
    assert model.a is model.again and isinstance(model.a, QLinear)
    assert [row.name for row in result.quantized] == ["a", "b"]
    rows = {row.name: row for row in result.regions}
    assert rows["a"].status == "multiplied"  # one of its two inputs comes from outside the model
    assert (
        rows["b"].status == "multiplied" and rows["b"].reason == "the rows of a also meet channels that nothing scales"
    )
    assert relative(model(data[0]), expected) < 0.05


def test_an_unused_layer_is_quantized_with_a_note_and_left_float_when_static() -> None:
    class Idle(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(D, D)

    data = [torch.randn(4, D)]
    result = evenbits.quantize(Idle(), data=data)
    row = next(row for row in result.layers if row.name == "idle")
    assert row.status == "quantized" and "did not run" in row.reason and row.output_sqnr_db is None
    assert next(r for r in result.regions if r.name == "idle").status == "skipped"
    model = Idle()
    row = next(row for row in evenbits.quantize(model, scheme="W8A8_STATIC", data=data).layers if row.name == "idle")
    assert row.status == "float" and "no activation scale" in row.reason
    assert type(model.idle) is nn.Linear


def test_a_layer_first_used_by_a_later_batch_is_multiplied() -> None:
    class Late(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Linear(D, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.late(x) if x.shape[0] == 3 else x)

    model = Late()
    result = evenbits.quantize(model, data=[torch.randn(2, D), torch.randn(3, D)])
    row = next(row for row in result.regions if row.name == "late")
    assert row.status == "multiplied" and "did not run on the first batch" in row.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_model_keep_their_type(dtype: torch.dtype) -> None:
    model = Net().to(dtype).eval()
    x = batches()[0].to(dtype)
    expected = model(x)
    evenbits.quantize(model, data=[x])
    assert model(x).dtype == dtype and relative(model(x).float(), expected.float()) < 0.05


@pytest.mark.parametrize(
    "data",
    [
        lambda: iter(batches()),
        lambda: (batch for batch in batches()),
        lambda: [(batch, torch.ones(5)) for batch in batches()],
        lambda: [{"x": batch, "bias": torch.ones(5)} for batch in batches()],
        lambda: tuple(batches()),
        lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batches()[0]), batch_size=1),
    ],
    ids=["iterator", "generator", "tuples", "mappings", "tuple of batches", "DataLoader"],
)
def test_any_iterable_of_batches_will_do(data: Callable[[], Any]) -> None:
    model = Net().eval()
    expected = model(batches()[0])
    result = evenbits.quantize(model, scheme="W8A8_STATIC", data=data())
    assert result.calibration_batches == 2
    assert relative(model(batches()[0]), expected) < 0.03


def test_static_ranges_come_from_all_batches_not_only_the_kept_ones() -> None:
    quiet, loud = [torch.randn(2, D) for _ in range(6)], torch.randn(2, D) * 50
    models = [Mlp(), Mlp()]
    models[1].load_state_dict(models[0].state_dict())
    for model, data in zip(models, ([*quiet, loud], quiet), strict=True):
        evenbits.quantize(model, scheme="W8A8_STATIC", method="rtn", data=data)
    assert float(models[0].a.input_scale) > 5 * float(models[1].a.input_scale)
    assert float(models[0].a.input_scale) == pytest.approx(float(loud.abs().max()) / 127, rel=1e-6)


def test_the_calibration_data_is_not_changed_by_a_model_that_writes_into_its_input() -> None:
    class Writes(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mul_(2))

    data = [torch.randn(4, D)]
    before = data[0].clone()
    evenbits.quantize(Writes(), data=data)
    assert torch.equal(data[0], before)


def test_training_flags_are_restored_one_by_one() -> None:
    model = Net()
    model.train()
    model.blocks[0].drop.eval()
    evenbits.quantize(model, data=batches())
    assert model.training and model.blocks[0].training and not model.blocks[0].drop.training and model.norm.training
    model = Net().eval()
    evenbits.quantize(model, data=batches())
    assert not any(module.training for module in model.modules())


def test_two_runs_on_equal_models_give_equal_bits() -> None:
    models = [Net().eval(), Net().eval()]
    models[1].load_state_dict(models[0].state_dict())
    results = [evenbits.quantize(model, data=batches()) for model in models]
    left, right = (model.state_dict() for model in models)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert results[0].layers == results[1].layers and results[0].regions == results[1].regions


def test_the_users_random_numbers_do_not_move() -> None:
    model, data = Net(), batches()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    evenbits.quantize(model, data=data)
    assert torch.equal(torch.rand(3), expected)


def test_rtn_needs_no_data() -> None:
    model = Net()
    result = evenbits.quantize(model, method="rtn")
    assert result.calibration_batches == 0 and result.regions == ()
    assert all(row.output_sqnr_db is None and row.sqnr_db is not None for row in result.quantized)


def test_an_ignored_layer_stays_float_and_is_compensated_for_the_fold() -> None:
    scheme = {"weights": "int8:row", "input_activations": "int8:row", "ignore": ["v"]}
    model = Net()
    before = copy.deepcopy(model)
    result = evenbits.quantize(model, scheme=scheme, data=batches())
    assert type(model.blocks[0].v) is nn.Linear
    row = next(row for row in result.regions if set(row.layers) == {"blocks.0.q", "blocks.0.k"})
    assert row.status == "folded" and row.reason == "into blocks.0.n1"
    assert not torch.equal(model.blocks[0].v.weight, before.blocks[0].v.weight)
    with torch.no_grad():
        h, old = (net.blocks[0].n1(batches()[0]) for net in (model, before))
        scale = before.blocks[0].n1.weight / model.blocks[0].n1.weight
        assert torch.allclose(h * scale, old, rtol=1e-5, atol=1e-6)
        # v's columns are multiplied by the s of its input, its rows divided by the s of o's.
        rows = model.blocks[0].v(h) / before.blocks[0].v(old)
    assert torch.allclose(rows, rows[0, 0].expand_as(rows), rtol=1e-2)


def test_a_fold_that_the_type_cannot_hold_becomes_a_multiply() -> None:
    class Gemma(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(D))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * (1.0 + self.weight)

    model = nn.Sequential(Gemma(), nn.Linear(D, D, bias=False)).to(torch.bfloat16).eval()
    model[1].weight.data.mul_(1e-3)  # tiny weights: s is about 60, and (1 + w)/60 − 1 has no digits left in bfloat16
    x = torch.randn(64, D).to(torch.bfloat16)
    expected = model(x).float()
    result = evenbits.quantize(model, scheme="W8A16", method="smoothquant", data=[x])
    assert result.regions[0].status == "multiplied" and "precision" in result.regions[0].reason
    assert relative(model(x).float(), expected) < 0.02


# ---------------------------------------------------------------------------------------------- what it says

_LAYER_KEYS = {"name", "format", "status", "reason", "bits_per_weight", "sqnr_db", "output_sqnr_db"}
_REGION_KEYS = {"name", "status", "reason", "alpha"}
_KEYS = {"layers", "regions", "weight_bytes", "float_weight_bytes", "model_bytes", "seconds", "peak_bytes"}


def test_the_result_is_json_with_the_promised_keys() -> None:
    model = Net()
    model.head.weight.data.zero_()  # no error at all: SQNR is infinite, which JSON cannot say
    result = evenbits.quantize(model, data=batches())
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(plain) >= _KEYS
    assert all(set(row) >= _LAYER_KEYS for row in plain["layers"])
    assert all(set(row) >= _REGION_KEYS for row in plain["regions"])
    assert {row["status"] for row in plain["layers"]} <= {"quantized", "float"}
    assert next(row for row in plain["layers"] if row["name"] == "head")["sqnr_db"] is None
    assert math.isinf(next(row for row in result.layers if row.name == "head").sqnr_db or 0)


def test_bytes_are_what_is_in_memory() -> None:
    model = Net(2)
    result = evenbits.quantize(model, method="rtn", data=batches())
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    assert result.weight_bytes == sum(m.weight.nbytes + m.weight_scale.nbytes for m in layers)
    assert result.float_weight_bytes == sum(4 * m.weight_shape[0] * m.weight_shape[1] for m in layers)
    for module in layers:
        assert module.weight_bytes / module.float_weight_bytes <= 0.25 + 1 / module.in_features
    everything = sum(t.nbytes for t in model.state_dict().values())
    assert result.model_bytes == everything
    assert result.peak_bytes > result.model_bytes and result.seconds > 0


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC", "W8A16", "W4A16"])
def test_bits_per_weight_of_a_wide_layer_are_true(scheme: str) -> None:
    model = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 64))
    result = evenbits.quantize(model, scheme=scheme, method="rtn", data=[torch.randn(4, 256)])
    (row,) = result.quantized
    scale_bits = 8 * model[1].weight_scale.element_size()
    expected = 4 + scale_bits / 128 if scheme == "W4A16" else 8 + scale_bits / 256
    assert row.bits_per_weight == pytest.approx(expected)
    assert row.weight_bytes * 8 == pytest.approx(expected * 256 * 64)


def decibels(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    reference, approximation = reference.detach().double(), approximation.detach().double()
    return 10 * math.log10(float(reference.square().sum() / (approximation - reference).square().sum()))


def by_hand(x: torch.Tensor) -> torch.Tensor:
    """Rows rounded to −127..127 steps of absmax / 127."""
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    return torch.round(x / step).clamp(-127, 127) * step


def test_sqnr_of_weights_and_outputs_equals_an_independent_computation() -> None:
    model = Mlp().eval()
    reference = copy.deepcopy(model)
    data = [torch.randn(4, D), torch.randn(7, D) * 3]
    result = evenbits.quantize(model, method="rtn", data=data)
    inputs = {"a": data, "b": [torch.relu(reference.a(x)) for x in data]}
    for row in result.quantized:
        layer = reference.get_submodule(row.name)
        x = torch.cat(inputs[row.name])
        y = nn.functional.linear(by_hand(x), by_hand(layer.weight), layer.bias)
        assert row.sqnr_db == pytest.approx(decibels(layer.weight, by_hand(layer.weight)), abs=0.02)
        assert row.output_sqnr_db == pytest.approx(decibels(layer(x), y), abs=0.02)
        assert 35 < row.sqnr_db < 55 and 30 < row.output_sqnr_db < 55


def test_output_errors_are_isolated_also_when_folded() -> None:
    """Each layer's error is its own: on the float layer's input, smoothed as the folded norm will deliver it."""
    model = Net().eval()
    reference = copy.deepcopy(model)
    x = batches(1)[0]
    result = evenbits.quantize(model, data=[x])
    row = next(row for row in result.quantized if row.name == "blocks.0.q")
    ours = model.blocks[0].q(model.blocks[0].n1(x))
    expected = decibels(reference.blocks[0].q(reference.blocks[0].n1(x)), ours)
    assert row.output_sqnr_db == pytest.approx(expected, abs=0.1)


# ---------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    model = Net()
    model.blocks[0].k.weight.data[3, 4] = value
    refused(model, r"blocks\.0\.k\.weight holds NaN or infinite")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 5])
def test_calibration_data_that_is_not_finite_is_refused_wherever_it_comes(value: float, position: int) -> None:
    data = batches(6)
    data[position][0, 0, 0] = value
    refused(Net(), f"calibration batch {position}: layer .*NaN or infinite", data=data)


def test_a_model_that_makes_nan_itself_is_refused_with_the_layers_name() -> None:
    class Divides(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x) / 0)

    refused(Divides(), "layer b: NaN or infinite", data=[torch.randn(2, D)])


@pytest.mark.parametrize("data", [[], (), [torch.empty(0, D)], [torch.empty(0, D)] * 5])
def test_empty_calibration_is_refused(data: Any) -> None:
    refused(Net(), "empty", data=data)


def test_an_empty_generator_is_refused() -> None:
    refused(Net(), "empty", data=(batch for batch in []))


@pytest.mark.parametrize("data", [torch.randn(2, 6, D), "text", {"x": torch.ones(1)}, 5])
def test_something_that_is_no_iterable_of_batches_is_refused(data: Any) -> None:
    refused(Net(), "iterable of batches", data=data)


@pytest.mark.parametrize("bad", ["text", None, torch.randn(2, D + 1), torch.ones(2, D).long(), {"z": torch.ones(2)}])
@pytest.mark.parametrize("position", [0, 1, 5])
def test_a_batch_that_does_not_fit_is_refused(bad: Any, position: int) -> None:
    data: list[Any] = batches(7)
    data[position] = bad
    refused(Net(), f"calibration batch {position}", data=data)


@pytest.mark.parametrize("method", ["smoothquant", "rtn"])
def test_data_is_required_where_it_is_needed(method: str) -> None:
    refused(Net(), "calibration data", data=None, method=method, scheme="W8A8_STATIC")
    refused(Net(), "calibration data", data=None, method="smoothquant", scheme="W8A16")


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"scheme": "W8A9"}, "unknown scheme 'W8A9'. Did you mean 'W8A8'"),
        ({"scheme": {"weights": "int8:row", "input_activation": "int8:row"}}, "Did you mean 'input_activations'"),
        ({"scheme": {"weights": "int8:rows"}}, "int8:rows|rows"),
        ({"scheme": {"weights": "int8:axis1"}}, "axis"),
        ({"scheme": 8}, "a scheme is"),
        ({"method": "smoothquont"}, "Did you mean 'smoothquant'"),
        ({"alfa": 0.5}, "Did you mean 'alpha'"),
        ({"method": "rtn", "alpha": 0.5}, "alpha"),
        ({"alpha": 1.5}, "between 0 and 1"),
        ({"alpha": -0.1}, "between 0 and 1"),
        ({"alpha": float("nan")}, "between 0 and 1"),
    ],
)
def test_unknown_names_and_values_are_refused(kwargs: dict[str, Any], match: str) -> None:
    refused(Net(), match, **kwargs)


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.Sequential(nn.LayerNorm(D)), nn.Sequential()])
@pytest.mark.parametrize("data", [None, [torch.randn(2, D)]])
def test_a_model_without_a_layer_is_refused(model: nn.Module, data: Any) -> None:
    refused(model, "no layer|could not run", data=data, method="rtn")


def test_a_model_that_is_one_linear_is_refused_with_advice() -> None:
    refused(nn.Linear(D, D), "wrap it", data=[torch.randn(2, D)])


def test_a_scheme_that_ignores_everything_is_refused() -> None:
    refused(Net(), "ignored by the scheme", scheme={"weights": "int8:row", "ignore": ["*"]})


def test_something_that_is_no_module_is_refused() -> None:
    with pytest.raises(EvenbitsError, match=r"torch.nn.Module; given dict"):
        evenbits.quantize({"weight": torch.ones(2)}, method="rtn")  # type: ignore[arg-type]


def test_a_quantized_model_is_refused() -> None:
    model = Net()
    evenbits.quantize(model, data=batches())
    refused(model, "quantized already")


def test_tied_weights_stay_float_with_a_reason() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.head = nn.Embedding(12, D), nn.Linear(D, D), nn.Linear(D, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.a(self.embed(ids))))

    model = Tied()
    result = evenbits.quantize(model, data=[torch.arange(12)[None]])
    row = next(row for row in result.layers if row.name == "head")
    assert row.status == "float" and "tied to embed.weight" in row.reason
    assert model.head.weight is model.embed.weight


def test_a_weight_read_by_another_module_stays_float() -> None:
    class Peeks(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(nn.functional.linear(x, self.a.weight)))

    model = Peeks()
    result = evenbits.quantize(model, data=[torch.randn(3, D)])
    row = next(row for row in result.layers if row.name == "a")
    assert row.status == "float" and "read directly by the model" in row.reason
    model(torch.randn(3, D))


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_torch_encoder_layer_still_runs_without_gradients(norm_first: bool) -> None:
    """Its fused path reads linear1.weight and linear2.weight behind the back of every hook."""
    encoder = nn.TransformerEncoderLayer(D, 4, 2 * D, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(encoder, nn.Linear(D, D)).eval()
    x = batches()[0]
    expected = model(x)
    result = evenbits.quantize(model, data=batches())
    with torch.no_grad():
        assert relative(model(x), expected) < 0.05
    found = {row.name: row for row in result.layers}
    for name in (
        "linear1",
        "linear2",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
    ):
        assert found[f"0.{name}"].status == "quantized"


def test_a_layer_called_by_keyword_is_quantized_or_refused_but_never_left_broken() -> None:
    class Keyword(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(input=x)))

    model = Keyword()
    x = torch.randn(3, D)
    expected, before = model(x), Snapshot(model)
    try:
        evenbits.quantize(model, data=[x])
    except EvenbitsError as error:
        assert "keyword" in str(error)
        before.check()
    assert relative(model(x), expected) < 0.05


class CastsToWeight(nn.Module):
    """As the vision models of transformers and T5 do: the input gets the type of the next layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x))
        return self.b(y.to(self.b.weight.dtype))


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC", "W8A16", "W4A16"])
@pytest.mark.parametrize("method", ["rtn", "smoothquant"])
def test_a_model_that_casts_to_the_type_of_a_weight_never_computes_with_integers(scheme: str, method: str) -> None:
    model = CastsToWeight().eval()
    x = torch.randn(16, D)
    expected = model(x)
    result = evenbits.quantize(model, scheme=scheme, method=method, data=[x])
    assert relative(model(x), expected) < (0.2 if scheme == "W4A16" else 0.03)
    row = next(row for row in result.layers if row.name == "b")
    assert row.status == "quantized" or "type of its weight" in row.reason


def test_a_quantized_layer_that_breaks_the_model_is_an_error_and_taken_back() -> None:
    class Reads(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert isinstance(self.a, nn.Linear), "I want my Linear"
            return super().forward(x)

    refused(Reads(), "does not run with quantized layers .AssertionError: I want my Linear", data=[torch.randn(3, D)])


# ---------------------------------------------------------------------------------------------- broken half-way


class Boom(Exception):
    pass


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: BaseException) -> list[int]:
    """Makes the given call of owner.name raise. Returns the running count."""
    original, count = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)
    return count


POINTS: dict[str, tuple[Any, str, int]] = {
    "third layer": (solve_module, "build_layer", 3),
    "last layer": (solve_module, "build_layer", 13),
    "output errors": (solve_module, "_output_errors", 1),
    "replace": (swap_module, "replace_modules", 1),
    "second fold of the proof": (Fold, "apply", 2),
    "first fold of the swap": (Fold, "apply", 10),
    "second fold of the swap": (Fold, "apply", 11),
    "last fold of the swap": (Fold, "apply", 18),
    "second forward": (Batches, "run", 2),
    "forward of the proof": (Batches, "run", 9),
    "the last forward": (Batches, "run", 14),
    "the check at the end": (Batches, "check_quantized", 1),
    "the result": (quantize_module, "_result", 1),
}


@pytest.mark.parametrize(
    "error", [Boom("half-way"), EvenbitsError("half-way"), KeyboardInterrupt("half-way")], ids=repr
)
@pytest.mark.parametrize("point", POINTS)
def test_a_failure_half_way_leaves_the_model_as_it_was(
    point: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, call = POINTS[point]
    model = Net(2)
    model.train()
    model.blocks[1].drop.eval()
    before = Snapshot(model)
    with monkeypatch.context() as patch:
        count = fail_at(patch, owner, name, call, error)
        with pytest.raises(type(error), match="half-way"):
            evenbits.quantize(model, data=batches())
    assert count[0] == call
    before.check()
    evenbits.quantize(model, data=batches())  # and it can be quantized all the same


@pytest.mark.parametrize("error", [Boom("half-way"), KeyboardInterrupt("half-way")], ids=repr)
def test_a_failure_in_the_rehearsal_puts_the_layers_back(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """It swallows what a model raises for a stand-in, and nothing else; in both cases the layers are back."""
    model = Net(2)
    before = Snapshot(model)
    with monkeypatch.context() as patch:
        fail_at(patch, Batches, "run", 5, error)
        with pytest.raises(type(error), match="half-way"):
            evenbits.quantize(model, data=batches())
    before.check()
    with monkeypatch.context() as patch:
        fail_at(patch, Batches, "run", 5, RuntimeError("a stand-in is no Linear"))
        evenbits.quantize(model, data=batches())


def test_the_order_of_the_injected_calls_is_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine folds: 1..9 are the proof's, 10..18 the swap's. If this changes the table above must."""
    count = fail_at(monkeypatch, Fold, "apply", -1, Boom())
    result = evenbits.quantize(Net(2), data=batches())
    assert sum(row.status == "folded" for row in result.regions) == 9
    assert count[0] == 18


def test_a_generator_that_fails_half_way_leaves_the_model_as_it_was() -> None:
    def generate() -> Iterator[torch.Tensor]:
        yield from batches(5)
        raise Boom("half-way")

    refused(Net(), "half-way", error=Boom, data=generate())


# A static net of convolutions says that byte chains would be faster.
@pytest.mark.filterwarnings("ignore:.*bytes")
@pytest.mark.parametrize(("scheme", "method"), [("W8A8_STATIC", "rtn"), ("W8A8", "smoothquant"), ("W8A16", "rtn")])
def test_a_model_that_views_a_convolution(scheme: str, method: str) -> None:
    model, x = Viewed().eval(), torch.randn(4, 3, 4, 4)
    expected = model(x).detach()
    result = evenbits.quantize(model, scheme=scheme, method=method, data=[x])
    assert all(layer.status == "quantized" for layer in result.layers)
    assert float((model(x).detach() - expected).norm() / expected.norm()) < 0.05
