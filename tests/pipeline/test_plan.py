"""Which layers, and for every other matrix why not: nothing is invisible."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from evenbits.errors import EvenbitsError
from evenbits.graph.trace import Trace, trace
from evenbits.nn.layout import layout_of
from evenbits.pipeline.plan import (
    LayerPlan,
    outside_readers,
    plan_layers,
    untied,
    unwatched_readers,
    weight_OI,
    weight_shape,
)
from evenbits.schemes.scheme import Scheme

SCHEME = Scheme(weights="int8:row", input_activations="int8:row")


class Odd(nn.Linear):
    """A subclass that uses its weight in a way of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Same(nn.Linear):
    """A subclass that computes what its base does (Falcon's linear layer)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.linear = nn.Linear(8, 4)
        self.conv = nn.Conv2d(3, 6, 3)
        self.hf = Conv1D(5, 8)
        self.odd = Odd(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.experts = nn.Parameter(torch.randn(4, 8, 8))
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 10)


def lines(model: nn.Module, scheme: Scheme = SCHEME) -> dict[str, LayerPlan]:
    plans = plan_layers(model, scheme)
    assert len({plan.name for plan in plans}) == len(plans)
    return {plan.name: plan for plan in plans}


def test_every_parameter_of_two_or_more_dimensions_has_one_line() -> None:
    model = Zoo()
    found = lines(model)
    for name, parameter in model.named_parameters():
        mentioned = name in found or name.removesuffix(".weight") in found
        assert mentioned == (parameter.ndim >= 2), name
    assert {name for name, plan in found.items() if not plan.reason} == {"linear", "conv", "hf"}


def test_each_reason_says_what_it_is() -> None:
    found = lines(Zoo())
    assert "embedding" in found["embed.weight"].reason
    assert "parameter of Odd" in found["odd.weight"].reason
    assert "parameter of MultiheadAttention" in found["attention.in_proj_weight"].reason
    assert "attention.out_proj.weight" in found
    assert "parameter of Zoo" in found["experts"].reason
    assert found["lm_head"].reason == "ignored by the scheme"


def test_shapes_are_stated_out_first_and_layouts_know_the_channels() -> None:
    found = lines(Zoo())
    for name, shape, inputs, dim in (
        ("linear", (4, 8), 8, -1),
        ("hf", (5, 8), 8, -1),
        ("conv", (6, 3, 3, 3), 3, -3),
    ):
        plan = found[name]
        assert (plan.shape, plan.channels.in_channels, plan.channels.channel_dim) == (shape, inputs, dim)
        assert plan.kind == plan.channels.kind


def test_an_ignored_layer_keeps_its_layout_and_what_is_no_layer_has_none() -> None:
    """An ignored layer is not quantized, but a neighbour's factors may be folded into it."""
    found = lines(Zoo())
    assert found["lm_head"].channels.in_channels == 8
    for name in ("experts", "embed.weight", "attention.in_proj_weight", "odd.weight"):
        assert found[name].layout is None
        with pytest.raises(EvenbitsError, match=f"{name} .* is not a layer whose channels can be scaled"):
            _ = found[name].channels


def test_a_conv1d_weight_is_turned_and_shares_memory() -> None:
    layer = Conv1D(5, 8)
    assert weight_shape(layer) == (5, 8)
    assert torch.equal(weight_OI(layer), layer.weight.t())
    assert weight_OI(layer).data_ptr() == layer.weight.data_ptr()
    assert weight_OI(nn.Conv2d(4, 6, 3, groups=2)).shape == (6, 2 * 9)


def test_what_computes_a_linear_layer_or_a_convolution_is_replaced() -> None:
    fake = type("Conv1D", (nn.Module,), {})
    kinds = {
        "Linear": [nn.Linear(2, 2), Same(2, 2), Same(2, 2, bias=False)],
        "Conv1D": [Conv1D(2, 2)],
        "Conv1d": [nn.Conv1d(1, 1, 1)],
        "Conv2d": [nn.Conv2d(1, 1, 1)],
        "Conv3d": [nn.Conv3d(1, 1, 1)],
        "ConvTranspose1d": [nn.ConvTranspose1d(1, 1, 1)],
        "ConvTranspose2d": [nn.ConvTranspose2d(1, 1, 1)],
        "ConvTranspose3d": [nn.ConvTranspose3d(1, 1, 1)],
    }
    for kind, modules in kinds.items():
        for module in modules:
            layout = layout_of(module)
            assert layout is not None and layout.kind == kind
    attention = nn.MultiheadAttention(8, 2)
    for module in (Odd(2, 2), fake(), nn.Bilinear(2, 2, 2), nn.Embedding(2, 2), attention.out_proj):
        assert layout_of(module) is None


def test_a_tied_weight_stays_float_and_names_its_partner() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "head": nn.Linear(8, 10), "other": nn.Linear(8, 8)})
    model["head"].weight = model["embed"].weight
    found = lines(model)
    assert found["head"].reason == "its weight is tied to embed.weight"
    assert found["other"].reason == ""


@pytest.mark.parametrize("order", [("embed", "head"), ("head", "embed")])
def test_a_scheme_may_quantize_what_is_tied_to_embeddings_only(order: tuple[str, str]) -> None:
    parts = {"embed": nn.Embedding(10, 8), "head": nn.Linear(8, 10)}
    model = nn.ModuleDict({**{name: parts[name] for name in order}, "again": nn.Embedding(10, 8)})
    model["head"].weight = model["again"].weight = model["embed"].weight
    scheme = replace(SCHEME, tied=True)
    plans = {plan.name: plan for plan in plan_layers(model, scheme)}
    assert set(plans) == {"embed.weight", "head"} and plans["embed.weight"].reason.startswith("embedding")
    assert plans["head"].reason == "" and plans["head"].channels.in_channels == 8
    assert untied(model, [plans["head"]]) == (
        "head is quantized from a copy of its own; the float weight stays in embed.weight, again.weight.",
    )
    ignored = {plan.name: plan for plan in plan_layers(model, replace(scheme, ignore=("head",)))}
    assert "tied to embed.weight" in ignored["head"].reason and ignored["head"].layout is None
    model["other"] = nn.Linear(8, 10)
    model["other"].weight = model["embed"].weight
    both = {plan.name: plan for plan in plan_layers(model, scheme)}
    assert "tied to" in both["head"].reason and "tied to" in both["other"].reason


def test_two_linears_with_one_weight_both_stay_float() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    found = lines(model)
    assert "tied to b.weight" in found["a"].reason and found["c"].reason == ""
    assert found["a"].layout is None and found["b"].layout is None  # nor may anything be folded into it


def test_one_module_in_two_places_is_one_layer_and_not_tied() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model["again"] = model["a"]
    found = lines(model)
    assert list(found) == ["a"] and found["a"].reason == ""


@pytest.mark.parametrize("name", ["linear", "lin*", "*"])
def test_the_scheme_can_ignore_by_name_or_glob(name: str) -> None:
    assert lines(Zoo(), Scheme(weights="int8:row", ignore=(name,)))["linear"].reason == "ignored by the scheme"


def test_the_model_itself_cannot_be_replaced() -> None:
    found = lines(nn.Linear(4, 4))
    assert "wrap it" in found[""].reason


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["linear.bias", "embed.weight", "norm.weight", "experts", "lm_head.weight"])
def test_a_parameter_that_is_not_finite_is_refused_wherever_it_is(value: float, where: str) -> None:
    model = Zoo()
    model.get_parameter(where).data.view(-1)[-1] = value
    with pytest.raises(EvenbitsError, match=f"parameter {where} holds NaN or infinite"):
        plan_layers(model, SCHEME)


def test_a_linear_that_carries_more_than_weight_and_bias_stays_float() -> None:
    model = nn.ModuleDict({"p": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4), "d": nn.Linear(4, 4)})
    model["p"].register_parameter("lora", nn.Parameter(torch.zeros(2, 2)))
    model["b"].register_buffer("scale", torch.ones(1))
    model["c"].adapter = nn.Linear(4, 4)
    found = lines(model)
    assert "'lora'" in found["p"].reason and "'scale'" in found["b"].reason and "'adapter'" in found["c"].reason
    assert found["d"].reason == ""


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_linear_with_the_users_own_hook_stays_float(kind: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    getattr(model["a"], kind)(lambda *_: None)
    found = lines(model)
    assert "hooks" in found["a"].reason and found["b"].reason == ""


def test_a_weight_norm_linear_is_not_replaced_but_has_lines() -> None:
    model = nn.ModuleDict({"a": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    found = lines(model)
    assert found and all(plan.reason for plan in found.values())


def traced(model: nn.Module, plans: list[LayerPlan], *inputs: torch.Tensor) -> Trace:
    return trace(model, lambda: model(*inputs), {plan.name: plan.layout for plan in plans if plan.layout is not None})


class Peeks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.fine, self.direct = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(self.fine(x), self.proj.weight)
        return self.direct.forward(y)


def test_a_weight_read_outside_its_layer_is_found() -> None:
    model = Peeks().eval()
    plans = plan_layers(model, SCHEME)
    found = outside_readers(traced(model, plans, torch.randn(2, 8)), plans)
    assert set(found) == {"proj", "direct"}
    assert "read directly by the model" in found["proj"]


def test_a_fused_layer_that_hides_from_hooks_is_found() -> None:
    """In evaluation nn.TransformerEncoderLayer hands its weights to one fused operation, if it has no hooks."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8)).eval()
    plans = plan_layers(model, SCHEME)
    x = torch.randn(2, 3, 8)
    watched = traced(model, plans, x)
    bare = trace(model, lambda: model(x), {}, hooks=False)
    assert not outside_readers(watched, plans)
    assert set(unwatched_readers(watched, bare, plans)) == {"0.linear1", "0.linear2"}
