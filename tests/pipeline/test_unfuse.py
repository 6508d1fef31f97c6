"""Fused attention and experts end to end: layers like all others, or a line that says why not; restored on errors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

import evenbits
from evenbits.checkpoints.files import read_config, write_config
from evenbits.errors import CheckpointError, EvenbitsError
from evenbits.graph.folding import Fold, multiplied_inputs
from evenbits.graph.regions import find_regions
from evenbits.graph.trace import trace
from evenbits.nn.attention import UnfusedAttention
from evenbits.nn.experts import UnfusedExperts
from evenbits.nn.layout import layout_of
from evenbits.nn.linear import QLinear
from evenbits.nn.unfuse import fused_modules, unfuse, unfused_form
from evenbits.pipeline import prepare as prepare_module
from evenbits.pipeline import quantize as quantize_module
from evenbits.pipeline import unfuse as unfuse_module
from evenbits.pipeline.result import Result

D, V = 32, 64
_TEXT: dict[str, Any] = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 4,
                         "intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 2,
                         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

MOE: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_TEXT, num_local_experts=4)),
    "qwen2": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **_TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24
        )
    ),
    "qwen3": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_TEXT, head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
    "gpt-oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**_TEXT, head_dim=8, num_local_experts=4, num_experts_per_tok=2, rope_parameters=_ROPE)
    ),
}
KINDS = {"mixtral": "experts", "qwen2": "experts", "qwen3": "experts", "gpt-oss": "experts_transposed"}


def moe(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = MOE[family]().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
        elif not name.endswith("norm.weight"):
            nn.init.normal_(parameter, std=0.1)
    return model


def ids(length: int = 12, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, V, (2, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, given: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=given).logits
    return found


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


class Attending(nn.Module):
    """A norm, an attention and a head; with_mask: what the attention gets."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(D), nn.MultiheadAttention(D, 4, batch_first=True, **options)
        self.head = nn.Linear(D, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.head(x + self.attn(y, y, y, need_weights=False)[0])


def x(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 6, D, generator=generator) for _ in range(count)]


class Snapshot:
    """The objects, bits and modes of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = [(name, id(module), module.training) for name, module in model.named_modules()]
        self.parameters = [(name, id(p), p.detach().clone()) for name, p in model.named_parameters()]

    def check(self) -> None:
        assert self.modules == [(n, id(m), m.training) for n, m in self.model.named_modules()]
        now = dict(self.model.named_parameters())
        assert list(now) == [name for name, _, _ in self.parameters]
        assert all(id(now[name]) == number and torch.equal(now[name], old) for name, number, old in self.parameters)


def lines(result: Result) -> dict[str, Any]:
    return {row.name: row for row in result.layers}


def statuses(result: Result) -> dict[str, str]:
    return {name: f"{row.status} {row.reason}" for row in result.regions for name in row.layers}


def test_attention_is_four_layers_that_are_quantized_and_smoothed() -> None:
    model = Attending().train()
    with torch.no_grad():
        before = model.eval()(x()[0])
    model.train()
    result = evenbits.quantize(model, data=x())
    names = [f"attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")]
    assert [row.name for row in result.layers] == [*names, "head"]
    assert all(row.status == "quantized" and row.kind == "Linear" for row in result.layers)
    regions = statuses(result)
    assert regions["attn.q_proj"] == regions["attn.v_proj"] == "folded into norm"
    assert regions["attn.out_proj"] == "folded into the rows of attn.v_proj"
    assert any("taken apart" in note and "attn" in note for note in result.notes)
    assert isinstance(model.attn, UnfusedAttention) and model.training and model.attn.training
    assert not list(model.attn.parameters())
    with torch.no_grad():
        assert relative(model.eval()(x()[0]), before) < 0.05
    json.dumps(result.to_json())


def test_without_data_attention_is_taken_apart_too() -> None:
    model = Attending()
    result = evenbits.quantize(model, scheme="W8A16")
    assert len(result.quantized) == 5


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_every_layer_of_an_encoder_is_quantized(norm_first: bool, masked: bool) -> None:
    layer = nn.TransformerEncoderLayer(D, 4, 2 * D, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(6) if masked else None
    data = [(batch, mask) if masked else batch for batch in x()]
    with torch.no_grad():
        before = encoder(x()[0], mask)
        result = evenbits.quantize(encoder, data=data)
        assert relative(encoder(x()[0], mask), before) < 0.05
    assert len(result.quantized) == len(result.layers) == 12
    assert not any("read directly" in row.reason for row in result.layers)
    assert sum(isinstance(module, QLinear) for module in encoder.modules()) == 12


def test_an_encoder_that_used_nested_tensors_runs_and_says_what_is_new() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 4, 2 * D, batch_first=True), 1).eval()
    padding = torch.zeros(3, 6, dtype=torch.bool)
    result = evenbits.quantize(encoder, data=x())
    assert any("padded positions" in note for note in result.notes)
    padding[1, 4:] = True
    with torch.no_grad():
        assert encoder(x()[0], src_key_padding_mask=padding)[~padding].isfinite().all()  # no nested tensor, no warning


def test_every_layer_of_a_decoder_is_quantized() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 4, 2 * D, batch_first=True), 1)

        def forward(self, target: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
            return self.decoder(target, memory, tgt_mask=mask, tgt_is_causal=True)

    model = Both().eval()
    data = [(x()[0], x()[1])]
    with torch.no_grad():
        before = model(*data[0])
        result = evenbits.quantize(model, data=data)
        assert relative(model(*data[0]), before) < 0.05
    assert len(result.quantized) == len(result.layers) == 10


@pytest.mark.parametrize("family", MOE)
def test_experts_are_quantized_and_smoothed_with_the_router(family: str, tmp_path: Path) -> None:
    model = moe(family)
    before = logits(model, ids())
    result = evenbits.quantize(model, data=[{"input_ids": ids()}])
    after = logits(model, ids())
    assert relative(after, before) < 0.2
    found = [row for row in result.layers if ".experts." in row.name]
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts, UnfusedExperts) and len(found) == 2 * experts.expert_count
    assert all(row.status == "quantized" and len(row.shape) == 2 for row in found)
    regions = statuses(result)
    for expert in range(experts.expert_count):
        name = f"model.layers.0.mlp.experts.{expert}"
        assert regions[f"{name}.gate_up_proj"] == "folded into model.layers.0.post_attention_layernorm"
        down = regions[f"{name}.down_proj"]
        assert (
            down.startswith("multiplied") if family == "gpt-oss" else f"rows of {name}.gate_up" in down or "run" in down
        )
    if family == "qwen2":
        assert regions["model.layers.0.mlp.shared_expert_gate"] == regions[f"{name}.gate_up_proj"]
    evenbits.save(model, tmp_path / "out", result=result)
    config = json.loads((tmp_path / "out" / "evenbits.json").read_text())
    assert config["unfused"] == {"model.layers.0.mlp.experts": KINDS[family]} and config["format_version"] == 1
    loaded = evenbits.load(tmp_path / "out")
    assert torch.equal(logits(loaded, ids()), after)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", MOE)
def test_smoothing_leaves_the_float64_output_as_it_is_also_where_nothing_was_routed(family: str) -> None:
    """Traced on two tokens, which leave experts without rows; compared on many, which do not."""
    model = moe(family).double()
    model.set_experts_implementation("eager")
    before = logits(model, ids(40, seed=5))
    unfuse(model, {"model.layers.0.mlp.experts": KINDS[family]})
    layouts = {n: layout for n, m in model.named_modules() if (layout := layout_of(m)) and n != "lm_head"}
    few = ids(1)[:1]
    with torch.no_grad():
        flow = trace(model, lambda: model(input_ids=few, use_cache=False), layouts)
    widths = {name: layout.in_channels for name, layout in layouts.items()}
    regions = [region for region in find_regions(flow, widths) if region.parts]
    assert any(".experts." in region.name and "layernorm" in region.into for region in regions)
    moved = 0
    for region in regions:
        scale = torch.logspace(-1, 1, region.width, dtype=torch.float64)[torch.randperm(region.width)]
        Fold(model, region).apply(scale)
        moved += len(region.matrices)
        multiplied_inputs(model, region, scale)  # hooks that stay
    assert moved == 1
    # GPT-OSS and the norms of the others compute in float32 whatever the model's type is.
    assert relative(logits(model, ids(40, seed=5)), before) < 1e-5


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_without_data_experts_are_proved_on_random_inputs(family: str) -> None:
    model = moe(family)
    before = logits(model, ids())
    result = evenbits.quantize(model, scheme="W8A16")
    assert isinstance(model.get_submodule("model.layers.0.mlp.experts"), UnfusedExperts)
    assert len([row for row in result.quantized if ".experts." in row.name]) == 8
    assert relative(logits(model, ids()), before) < 0.1


class Experts(nn.Module):
    """Looks like fused experts; computes something of its own if `odd`."""

    def __init__(self, odd: float) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 16, D)), nn.Parameter(torch.randn(3, D, 8))
        self.act_fn, self.odd = nn.SiLU(), odd

    def forward(self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(states)
        for expert in range(3):
            token, slot = torch.where(index == expert)
            gate, up = (states[token] @ self.up[expert].T).chunk(2, dim=-1)
            y = (self.act_fn(gate) * up) @ self.down[expert].T + self.odd
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


class Sparse(nn.Module):
    def __init__(self, odd: float = 0.0) -> None:
        super().__init__()
        self.norm, self.router, self.experts = nn.LayerNorm(D), nn.Linear(D, 3), Experts(odd)
        self.head = nn.Linear(D, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x).reshape(-1, D)
        weights, index = self.router(y).softmax(-1).topk(2, dim=-1)
        return self.head(x + self.experts(y, index, weights).view_as(x))


@pytest.mark.parametrize("with_data", [True, False])
def test_experts_that_compute_something_else_stay_with_the_reason(with_data: bool) -> None:
    model = Sparse(odd=0.01)
    fused = model.experts
    result = evenbits.quantize(model, scheme="W8A8" if with_data else "W8A16", data=x() if with_data else None)
    assert model.experts is fused
    for name in ("experts.up", "experts.down"):
        row = lines(result)[name]
        assert row.status == "float" and row.reason == "its unfused form gives another output" and len(row.shape) == 3
    assert not any("taken apart" in note for note in result.notes)


def test_nothing_routed_to_an_expert_leaves_it_float_with_static_activations_and_right_with_dynamic() -> None:
    model = Sparse()
    with torch.no_grad():
        model.router.bias.copy_(torch.tensor([500.0, 400.0, -500.0]))
        model.norm.weight[::5] *= 20  # so that s is far from one
    before = model(x()[0])
    dynamic = copy.deepcopy(model)
    result = evenbits.quantize(dynamic, data=x())
    assert lines(result)["experts.2.up"].status == "quantized" and lines(result)["experts.2.up"].output_sqnr_db is None
    assert statuses(result)["experts.2.up"] == "folded into norm"
    assert "no statistics" in statuses(result)["experts.2.down"]
    static = copy.deepcopy(model)
    result = evenbits.quantize(static, scheme="W8A8_STATIC", data=x())
    assert "did not run" in lines(result)["experts.2.up"].reason
    assert lines(result)["experts.1.up"].status == "quantized"
    assert isinstance(static.experts.get_submodule("2.up"), nn.Linear)
    for quantized in (dynamic, static):
        assert relative(quantized(x()[0]), before) < 0.05
        # Now everything is routed to the expert that saw nothing.
        for each in (quantized, model):
            bias = each.router.bias
            bias.data = torch.tensor([-500.0, 400.0, 500.0])
        assert relative(quantized(x()[0]), model(x()[0])) < 0.1


def test_a_float_layer_of_an_unfused_module_owns_its_memory() -> None:
    model = Attending()
    evenbits.quantize(model, scheme={"weights": "int8:row", "ignore": ["attn.k_proj"]})
    weight = model.attn.k_proj.weight
    assert type(model.attn.k_proj) is nn.Linear and weight.untyped_storage().nbytes() == weight.nbytes


@pytest.mark.parametrize("ignore", [["attn"], ["attn.*"], ["*_proj"]])
def test_what_the_scheme_ignores_is_not_taken_apart(ignore: list[str]) -> None:
    model = Attending()
    attention = model.attn
    result = evenbits.quantize(model, scheme={"weights": "int8:row", "ignore": ignore}, data=x())
    assert model.attn is attention and type(attention) is nn.MultiheadAttention
    assert lines(result)["attn.in_proj_weight"].reason == "ignored by the scheme"
    assert lines(result)["attn.out_proj.weight"].reason == "ignored by the scheme"


def test_a_module_whose_layers_all_stay_float_gets_its_original_back() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.proj = nn.LayerNorm(D), nn.Linear(D, D)
            self.attn = nn.MultiheadAttention(D, 4, batch_first=True)

        def forward(self, x: torch.Tensor, also: bool = False) -> torch.Tensor:
            y = self.proj(self.norm(x))
            return self.attn(y, y, y)[0] if also else y

    model = Sometimes()
    attention = model.attn
    result = evenbits.quantize(model, scheme="W8A8_STATIC", data=x())
    assert model.attn is attention and lines(result)["proj"].status == "quantized"
    row = lines(result)["attn.in_proj_weight"]
    assert row.status == "float" and "none of its layers" in row.reason and "did not run" in row.reason
    assert "attn.q_proj" not in lines(result) and not any("taken apart" in note for note in result.notes)


def test_parameters_that_something_else_reads_are_left_where_they_are() -> None:
    class Reads(Attending):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + nn.functional.linear(x, self.attn.in_proj_weight).mean()

    model = Reads().eval()
    expected = model(x()[0])
    result = evenbits.quantize(model, data=x())
    assert "something else reads" in lines(result)["attn.in_proj_weight"].reason
    assert relative(model(x()[0]), expected) < 0.05


def test_tied_and_hooked_modules_are_left_with_the_reason() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2), "c": Experts(0.0)})
    model["b"].in_proj_weight = model["a"].in_proj_weight
    model["c"].register_forward_hook(lambda *_: None)
    found = fused_modules(model)
    assert "in_proj_weight is tied" in found["a"].reason and "hooks" in found["c"].reason
    assert "single module" in fused_modules(nn.MultiheadAttention(8, 2))[""].reason
    replaced = nn.ModuleDict({"c": Experts(0.0)})
    replaced["c"].forward = lambda a, b, c: a
    assert "forward was replaced" in fused_modules(replaced)["c"].reason


def test_a_module_in_two_places_is_taken_apart_in_both() -> None:
    model = Attending()
    model.again = model.attn
    evenbits.quantize(model, data=x())
    assert model.again is model.attn and isinstance(model.attn, UnfusedAttention)


@pytest.mark.parametrize("where", ["watch", "balance", "solve", "swap", "_result"])
@pytest.mark.parametrize("make", [Attending, Sparse])
def test_an_error_anywhere_leaves_the_model_as_it_was(
    where: str, make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make().train()
    before = Snapshot(model)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("injected")

    module = quantize_module if where in ("swap", "_result") else prepare_module
    monkeypatch.setattr(module, where, fail)
    with pytest.raises(RuntimeError, match="injected"):
        evenbits.quantize(model, data=x())
    before.check()


def test_an_error_while_proving_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Sparse().train()
    before = Snapshot(model)

    def fail(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(unfuse_module, "_differs", fail)
    with pytest.raises(KeyboardInterrupt):
        evenbits.quantize(model, data=x())
    before.check()


def test_a_nan_is_named_by_the_name_the_user_knows() -> None:
    model = Attending()
    model.attn.in_proj_weight.data[3, 3] = torch.nan
    with pytest.raises(EvenbitsError, match=r"attn\.in_proj_weight"):
        evenbits.quantize(model, data=x())
    assert type(model.attn) is nn.MultiheadAttention


@pytest.mark.parametrize("make", [Attending, Sparse, lambda: Attending(add_bias_kv=True, kdim=D, vdim=D)])
def test_saved_and_loaded_bit_for_bit_into_the_float_model(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make().eval()
    evenbits.quantize(model, data=x())
    evenbits.save(model, tmp_path / "out")
    loaded = evenbits.load(tmp_path / "out", model=make())
    with torch.no_grad():
        assert torch.equal(loaded(x()[1]), model(x()[1]))
    again = evenbits.load(tmp_path / "out", model=loaded)
    with torch.no_grad():
        assert torch.equal(again(x()[1]), model(x()[1]))


def _tampered(folder: Path, unfused: Any) -> None:
    config = read_config(folder)
    if unfused is None:
        del config["unfused"]
    else:
        config["unfused"] = unfused
    for key in ("files", "checksum"):
        config.pop(key, None)
    (folder / "evenbits.json").unlink()  # so that it does not list itself
    write_config(folder, config)


@pytest.mark.parametrize(
    "hostile",
    [
        [],
        "attn",
        {"attn": 3},
        {"attn": "experts"},
        {"attn": "no such kind"},
        {"nowhere": "attention"},
        {"": "attention"},
        {"norm": "attention"},
        {"norm": "experts"},
        {"attn.out_proj": "attention"},
        {},
        None,
    ],
)
def test_hostile_tables_are_errors_and_change_nothing(hostile: Any, tmp_path: Path) -> None:
    model = Attending()
    evenbits.quantize(model, data=x())
    evenbits.save(model, tmp_path / "out")
    _tampered(tmp_path / "out", hostile)
    target = Attending()
    before = Snapshot(target)
    with pytest.raises(CheckpointError, match=r"unfused modules|lacks"):
        evenbits.load(tmp_path / "out", model=target)
    before.check()


def test_a_checkpoint_without_the_table_still_loads(tmp_path: Path) -> None:
    """As older versions wrote it: attention left fused."""
    model = Attending()
    evenbits.quantize(model, scheme={"weights": "int8:row", "ignore": ["attn"]})
    evenbits.save(model, tmp_path / "out")
    _tampered(tmp_path / "out", None)
    loaded = evenbits.load(tmp_path / "out", model=Attending())
    assert type(loaded.attn) is nn.MultiheadAttention
    with torch.no_grad():
        assert torch.equal(loaded(x()[0]), model.eval()(x()[0]))


def test_the_registry_refuses_what_it_does_not_know() -> None:
    with pytest.raises(EvenbitsError, match="Allowed: attention"):
        unfused_form(nn.MultiheadAttention(8, 2), "attentoin")
    with pytest.raises(EvenbitsError, match="no module 'b'"):
        unfuse(nn.ModuleDict({"a": nn.Linear(2, 2)}), {"b": "attention"})
    with pytest.raises(EvenbitsError, match=r"is no nn\.MultiheadAttention"):
        unfuse(nn.ModuleDict({"a": nn.Linear(2, 2)}), {"a": "attention"})


class Peeking(nn.Module):
    """Batches of three read the fused parameter of the attention directly."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.last = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        direct = len(x) == 3
        return self.last(F.linear(x, self.attn.in_proj_weight[:16]) if direct else self.attn(x, x, x)[0])


def test_a_later_batch_that_reads_the_fused_parameter_keeps_it_fused() -> None:
    model = Peeking().eval()
    result = evenbits.quantize(model, method="rtn", data=[torch.randn(2, 5, 16), torch.randn(3, 5, 16)])
    assert type(model.attn) is nn.MultiheadAttention
    assert not any("taken apart" in note for note in result.notes)
