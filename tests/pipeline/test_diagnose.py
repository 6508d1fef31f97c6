"""`diagnose` against straightforward computations: whole outputs side by side, formulas written out once more."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import evenbits
from evenbits.errors import EvenbitsError
from evenbits.pipeline.diagnose import Diagnosis, diagnose

D = 16


class Mlp(nn.Module):
    """up's smoothing folds into the norm, down's into the rows of up."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 24), nn.Linear(24, 5)
        with torch.no_grad():
            self.norm.weight[3] = 30.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu_(self.up(self.norm(x))))  # in place: what was seen of `up` must survive it


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


def rows(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 7, D, generator=generator) for _ in range(count)]


def images(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, 3, 6, 6, generator=generator) for _ in range(count)]


def outputs(model: nn.Module, names: list[str], data: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every output of the named layers over all batches, in one tensor each; "" is the model's."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in (*names, "")}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda _, __, y, n=n: found[n].append(y.detach().clone()))
        for n in names
    ]
    with torch.no_grad():
        for batch in data:
            found[""].append(model(batch.clone()))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def figures(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """L1 loss and SQNR, from whole tensors."""
    error = found - expected
    l1 = float(error.abs().sum() / expected.abs().sum())
    return l1, 10 * math.log10(float(expected.square().sum() / error.square().sum()))


@pytest.mark.parametrize(("model", "data"), [(Mlp(), rows()), (Conv(), images())], ids=["linear", "conv"])
@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC", "W8A16"])
def test_errors_without_smoothing(model: nn.Module, data: list[torch.Tensor], scheme: str) -> None:
    model.eval()
    found = diagnose(model, scheme=scheme, method="rtn", data=data).errors
    names = [row.name for row in found.rows]
    assert names == [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    float_outputs, quantized = outputs(model, names, data), copy.deepcopy(model)
    evenbits.quantize(quantized, scheme=scheme, method="rtn", data=data)
    together = outputs(quantized, names, data)
    for row in found.rows:
        alone = copy.deepcopy(model)
        alone.set_submodule(row.name, quantized.get_submodule(row.name))
        isolated = figures(float_outputs[row.name], outputs(alone, [row.name], data)[row.name])
        assert (row.isolated_l1, row.isolated_sqnr_db) == pytest.approx(isolated, rel=1e-9)
        cumulative = figures(float_outputs[row.name], together[row.name])
        assert (row.cumulative_l1, row.cumulative_sqnr_db) == pytest.approx(cumulative, rel=1e-9)
    assert (found.output_l1, found.output_sqnr_db) == pytest.approx(figures(float_outputs[""], together[""]), rel=1e-9)
    assert found.batches == 3
    held = sum(y.float().nbytes for name, y in float_outputs.items() if name) // 3
    assert found.held_bytes == held  # of one batch, not of three


def smoothing(absmax_I: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """SmoothQuant's s at α = 0.5, written out."""
    return (absmax_I.double() / weight_OI.detach().abs().amax(0).double()).sqrt()


def test_errors_with_smoothing_are_in_the_float_models_units() -> None:
    model, data = Mlp().eval(), rows()
    x = torch.cat(data)
    with torch.no_grad():
        h = model.norm(x)
        y = model.up(h)
        s_up = smoothing(h.abs().amax((0, 1)), model.up.weight)
        s_down = smoothing(y.relu().abs().amax((0, 1)), model.down.weight)
        found = diagnose(model, scheme="W8A8_STATIC", method="smoothquant", alpha=0.5, data=data)
        assert {row.name: row.status for row in found.regions} == {"up": "folded", "down": "folded"}
        quantized = copy.deepcopy(model)
        evenbits.quantize(quantized, scheme="W8A8_STATIC", method="smoothquant", alpha=0.5, data=data)
        row = found.errors.rows[0]
        isolated = figures(y.double(), quantized.up((h / s_up).float()).double() * s_down)
        assert (row.isolated_l1, row.isolated_sqnr_db) == pytest.approx(isolated, rel=1e-3)
        cumulative = figures(y.double(), quantized.up(quantized.norm(x)).double() * s_down)
        assert (row.cumulative_l1, row.cumulative_sqnr_db) == pytest.approx(cumulative, rel=1e-3)
        row = found.errors.rows[1]
        isolated = figures(model(x).double(), quantized.down((y.relu() / s_down).float()).double())
        assert (row.isolated_l1, row.isolated_sqnr_db) == pytest.approx(isolated, rel=1e-3)
        cumulative = figures(model(x).double(), quantized(x).double())
        assert (row.cumulative_l1, row.cumulative_sqnr_db) == pytest.approx(cumulative, rel=1e-9)


def test_a_repaired_order_is_put_back_before_it_is_compared() -> None:
    class Hot(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(nn.functional.gelu(self.up(self.norm(x))))

    model, data = Hot().eval(), rows()
    with torch.no_grad():
        model.up.weight[[10, 11, 20, 21]] *= 40  # outlier channels side by side in the input of `down`
    found = diagnose(model, scheme="W4A8_OVP", method="repair+olive", data=data)
    assert {row.name: row.status for row in found.regions}["down"] == "folded"
    for row in found.errors.rows:
        assert row.isolated_l1 is not None and row.isolated_l1 < 0.5  # channels in another order would give about 1.4
        assert row.cumulative_l1 is not None and row.cumulative_l1 < 0.5


def test_the_model_is_as_it_was() -> None:
    model = Mlp().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [
        (name, id(module), module.training, len(module._forward_hooks)) for name, module in model.named_modules()
    ]
    data = [(row.reshape(-1, D), torch.arange(28) % 5) for row in rows()]
    options: dict[str, Any] = {"task": "classification", "evaluation": data, "sizes": (2, 4), "orders": 2}
    diagnose(model, scheme="W8A8_STATIC", data=[x for x, _ in data], **options)
    assert modules == [(n, id(m), m.training, len(m._forward_hooks)) for n, m in model.named_modules()]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_ranges_before_and_after() -> None:
    model, data = Mlp().eval(), rows()
    found = {row.name: row for row in diagnose(model, scheme="W8A8_STATIC", data=data).ranges}
    with torch.no_grad():
        h = model.norm(torch.cat(data)).abs().amax((0, 1))
    after = h / smoothing(h, model.up.weight).float()
    row = found["up"]
    assert row.absmax_before == float(h.max()) and row.absmax_after == pytest.approx(float(after.max()), rel=1e-5)
    assert row.unevenness_before == pytest.approx(float(h.max() / h.median()))
    assert row.unevenness_after == pytest.approx(float(after.max() / after.median()), rel=1e-5)
    assert row.scale_before == pytest.approx(float(h.max()) / 127) and row.smoothing == "folded"
    assert row.scale_after == pytest.approx(float(after.max()) / 127, rel=1e-5)
    assert row.s_max == pytest.approx(float(smoothing(h, model.up.weight).max()), rel=1e-5)
    plain = {row.name: row for row in diagnose(model, scheme="W8A8", method="rtn", data=data).ranges}
    assert plain["up"].scale_before is None and plain["up"].smoothing == "none"
    assert plain["up"].absmax_after == plain["up"].absmax_before == row.absmax_before


def test_histograms_and_grids() -> None:
    model, data = Mlp().eval(), rows()
    found = diagnose(model, scheme="W8A8_STATIC", data=data, layers=["up"])
    (look,) = found.looks
    with torch.no_grad():
        h = model.norm(torch.cat(data))
    s = smoothing(h.abs().amax((0, 1)), model.up.weight).float()
    assert look.after is not None and look.numbers == h.numel()
    for side, x in ((look.before, h), (look.after, h / s)):
        assert torch.allclose(torch.tensor(side.lo), x.amin((0, 1)), rtol=1e-5)
        assert torch.allclose(torch.tensor(side.hi), x.amax((0, 1)), rtol=1e-5)
        assert sum(side.counts) == pytest.approx(x.numel(), abs=2)  # an end may lie one rounding outside
        expected = torch.histc(x, bins=len(side.counts), min=side.edges[0], max=side.edges[-1])
        assert float((torch.tensor(side.counts) - expected).abs().sum()) <= 4
        step = float(x.abs().max()) / 127
        assert torch.allclose(torch.tensor(side.grid), torch.arange(-127, 128) * step, rtol=1e-4)
        codes = (x / step).round().flatten().to(torch.int64) + 127
        shares = torch.bincount(codes, minlength=255).double() / codes.numel()
        entropy = -float((shares[shares > 0] * shares[shares > 0].log2()).sum())
        assert side.entropy == pytest.approx(entropy, abs=0.02)
        assert side.to_zero == pytest.approx(float(shares[127]), abs=0.01)
    assert look.after.entropy is not None and look.before.entropy is not None
    assert look.after.entropy > look.before.entropy + 1  # one channel no longer claims the range


def test_a_surface_is_one_sample_and_keeps_its_outliers() -> None:
    model = nn.Sequential(nn.Linear(300, 4)).eval()
    x = torch.randn(2, 100, 300)
    x[0, 77, 123] = 50.0
    (look,) = diagnose(model, data=[x]).looks
    surface = torch.tensor(look.before.surface)
    assert (look.tokens, look.channels) == (100, 300) and surface.shape == (48, 96)
    assert float(surface.max()) == 50.0 and float(surface.min()) >= 0
    place = (surface == 50.0).nonzero()[0].tolist()
    assert abs(place[0] - 77 * 48 // 100) <= 1 and abs(place[1] - 123 * 96 // 300) <= 1


def test_pixels_of_a_convolution_are_tokens() -> None:
    (look,) = diagnose(Conv().eval(), method="rtn", data=images(), layers=["b"]).looks
    assert (look.tokens, look.channels, look.after) == (36, 6, None)
    assert torch.tensor(look.before.surface).shape == (36, 6)


@pytest.mark.parametrize(
    ("scheme", "values", "word"),
    [("W8A8", 255, "largest range"), ("W8A16", 0, "stay float"), ("W4A4", 15, "calibrated"), ("W4A4_OVP", 0, "pairs")],
)
def test_grids_of_other_schemes(scheme: str, values: int, word: str) -> None:
    look = diagnose(Mlp().eval(), scheme=scheme, method="by_format", data=rows()).looks[0]
    assert len(look.before.grid) == values and word in look.before.grid_note
    assert (look.before.entropy is None) == (values == 0)


def test_the_worst_layers_are_looked_at_unless_others_are_named() -> None:
    found = diagnose(Conv().eval(), method="rtn", data=images())
    worst = sorted(found.errors.rows, key=lambda row: -(row.isolated_l1 or 0))
    assert [look.name for look in found.looks] == [row.name for row in worst] and len(worst) == 3
    found = diagnose(Conv().eval(), method="rtn", data=images(), layers=["head", "a", "head"])
    assert [look.name for look in found.looks] == ["head", "a"]


def scored() -> list[tuple[torch.Tensor, torch.Tensor]]:
    model = Mlp().eval()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200, D, generator=generator)
    with torch.no_grad():
        return [(x, model(x).argmax(1))]


def test_accuracy_with_and_without_smoothing() -> None:
    torch.manual_seed(0)
    model, data = Mlp().eval(), [batch.reshape(-1, D) for batch in rows()]
    torch.manual_seed(0)
    items = scored()
    found = diagnose(model, scheme="W8A8_STATIC", data=data, task="classification", evaluation=iter(items)).accuracy
    assert found is not None and [row.name for row in found.rows] == ["float", "unsmoothed", "smoothed"]
    assert found.rows[0].metric == 1.0 and found.n == 200 and found.rows[0].against_float is None
    for name, row in zip(("rtn", "smoothquant"), found.rows[1:], strict=True):
        quantized = copy.deepcopy(model)
        evenbits.quantize(quantized, scheme="W8A8_STATIC", method=name, data=data)
        expected = evenbits.evaluate(quantized, task="classification", data=items)
        assert row.metric == expected.metrics["accuracy"] and row.interval == expected.interval
        assert row.against_float is not None and row.against_float.value == pytest.approx(row.metric - 1.0)
        assert row.against_float.p is not None
    gain = found.rows[2].metric - found.rows[1].metric
    assert found.smoothing is not None and found.smoothing.value == pytest.approx(gain)
    plain = diagnose(model, scheme="W8A8_STATIC", method="rtn", data=data, task="classification", evaluation=items)
    assert plain.accuracy is not None and [row.name for row in plain.accuracy.rows] == ["float", "quantized"]
    assert plain.accuracy.smoothing is None


def test_layers_that_did_not_run_or_stay_float_are_named() -> None:
    class Idle(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.lm_head = nn.Linear(4, 4), nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lm_head(super().forward(x))

    found = diagnose(Idle().eval(), data=rows())
    assert ("lm_head", "ignored by the scheme") in found.float_layers
    idle = next(row for row in found.errors.rows if row.name == "idle")
    assert idle.isolated_l1 is None and "did not run" in idle.note and found.errors.worst_first[-1] is idle
    assert "idle" not in [row.name for row in found.ranges]


def test_a_layer_that_gets_other_inputs_in_the_quantized_model_has_no_cumulative_error() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.expert = nn.Linear(D, 1), nn.Linear(D, 4)
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen = type(self.gate) is nn.Linear
            self.gate(x)
            y = self.expert(x if chosen else x[:, :2])
            return y.sum(1)

    found = diagnose(Routed().eval(), method="rtn", data=rows())
    row = next(row for row in found.errors.rows if row.name == "expert")
    assert row.cumulative_l1 is None and "routing" in row.note and row.isolated_l1 is not None
    assert found.errors.output_l1 is not None


def test_an_iterator_is_read_once_and_a_shared_layer_counts_every_call() -> None:
    class Twice(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(self.norm(x)) + self.up(x)))

    model, data = Twice().eval(), rows()
    listed, walked = (diagnose(model, method="rtn", data=given) for given in (data, iter(data)))
    assert listed.to_json() == walked.to_json()
    names = ["up"]
    expected, quantized = outputs(model, names, data), copy.deepcopy(model)
    evenbits.quantize(quantized, method="rtn", data=data)
    row = listed.errors.rows[0]
    assert row.cumulative_l1 == pytest.approx(figures(expected["up"], outputs(quantized, names, data)["up"])[0])


def test_the_result_is_plain_data() -> None:
    found: Diagnosis = diagnose(Mlp().eval(), data=rows(), sizes=[2, 5, 12])
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["convergence"]["sizes"] == [2, 5, 12]


def never() -> Iterator[torch.Tensor]:
    raise AssertionError("the data was touched")
    yield torch.empty(0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": ["dwon"]}, "no layer 'dwon'; the nearest names: down"),
        ({"layers": ["norm"]}, "no layer 'norm'"),
        ({"layers": ["up"], "scheme": {"weights": "int8:row", "ignore": ["up"]}}, "'up': ignored by the scheme"),
        ({"task": "classification"}, "both a task and the data"),
        ({"task": "clasification", "evaluation": []}, "Did you mean 'classification'"),
        ({"sizes": [5]}, "at least two"),
        ({"sizes": [5, 5]}, "ascending"),
        ({"sizes": [0, 5]}, "ascending"),
        ({"sizes": [2, 13]}, "12 samples and the sizes go to 13"),
        ({"sizes": [2, 3], "orders": 0}, "orders must be at least 1"),
        ({"data": []}, "empty"),
        ({"scheme": "W8A9"}, "Did you mean 'W8A8'"),
        ({"alpha": "auto", "sizes": [2, 4], "task": "classification", "evaluation": scored()}, "alpha as a number"),
    ],
)
def test_what_is_refused(options: dict[str, Any], match: str) -> None:
    model = Mlp().eval()
    data = [batch.reshape(-1, 7, D) for batch in rows()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if "task" in options and "sizes" in options:
        data = [batch.reshape(-1, D) for batch in data]
    with pytest.raises(EvenbitsError, match=match):
        diagnose(model, **{"data": data, **options})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(EvenbitsError, match="no layer that can be quantized"):
        diagnose(nn.LayerNorm(D), data=rows())
