"""Tiny random models of transformers, one per way of building a transformer: no table of architectures stands behind
this, so each must come out right by itself. No download.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import evenbits
from evenbits.errors import EvenbitsError
from evenbits.graph.folding import Fold
from evenbits.graph.regions import find_regions
from evenbits.graph.trace import trace
from evenbits.nn.base import QuantizedLayer
from evenbits.pipeline.plan import plan_layers
from evenbits.pipeline.watch import without_cache
from evenbits.schemes.scheme import Scheme, resolve

V, D = 64, 32
_TEXT: dict[str, Any] = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "intermediate_size": 64, "max_position_embeddings": 64}  # fmt: skip
_GQA = {**_TEXT, "num_key_value_heads": 2}
_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def ids(length: int = 9) -> torch.Tensor:
    return torch.randint(3, V, (2, length), generator=torch.Generator().manual_seed(3))


def text() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 9, dtype=torch.long)
    return {"input_ids": ids(), "attention_mask": mask}


def pair() -> dict[str, torch.Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids(5)}


def picture() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]]]] = {
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**_TEXT)), text),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GQA, **_IDS)), text),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
        ),
        text,
    ),
    "opt": (
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=V,
                hidden_size=D,
                num_hidden_layers=2,
                num_attention_heads=4,
                ffn_dim=64,
                max_position_embeddings=64,
                word_embed_proj_dim=D,
            )
        ),
        text,
    ),
    "gemma2": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GQA, **_IDS, head_dim=8)), text),
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_GQA, **_IDS, num_local_experts=4)), text),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=V, d_model=D, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
        ),
        pair,
    ),
    "bart": (
        lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=V,
                d_model=D,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=64,
            )
        ),
        pair,
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=D,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=16,
                patch_size=4,
            )
        ),
        picture,
    ),
}


def model_of(family: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    make, batch = FAMILIES[family]
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(torch.randn_like(parameter) * 0.2)  # trained norms are not all ones
            elif parameter.ndim >= 2 and family != "t5":
                parameter.mul_(4)  # the initial 0.02 would hide every error behind the residual stream
    return model, batch()


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def smoothed() -> dict[str, tuple[nn.Module, evenbits.Result, float]]:
    """Every family, smoothed W8A8: the model, the result and the relative error of its logits."""
    found = {}
    for family in FAMILIES:
        model, batch = model_of(family)
        before = logits(model, batch)
        result = evenbits.quantize(model, scheme="W8A8", method="smoothquant", data=[batch])
        found[family] = (model, result, relative(logits(model, batch), before))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_w8a8_is_close_to_float(family: str, smoothed: Any) -> None:
    _, result, error = smoothed[family]
    assert 1e-7 < error < 0.05
    assert all(row.output_sqnr_db is not None and row.output_sqnr_db > 25 for row in result.quantized)


@pytest.mark.parametrize("family", FAMILIES)
def test_static_activations_are_close_to_float_too(family: str) -> None:
    model, batch = model_of(family)
    before = logits(model, batch)
    evenbits.quantize(model, scheme="W8A8_STATIC", data=[batch, batch])
    assert relative(logits(model, batch), before) < 0.08


@pytest.mark.parametrize("family", ["t5", "vit"])
def test_models_that_cast_to_the_type_of_a_weight_survive_packed_codes(family: str) -> None:
    """T5 casts to `wo.weight.dtype` unless that is int8, ViT to `projection.weight.dtype` whatever it is."""
    model, batch = model_of(family)
    before = logits(model, batch)
    evenbits.quantize(model, scheme="W4A16", method="rtn", data=[batch])
    assert relative(logits(model, batch), before) < 0.35


@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_is_invisible(family: str, smoothed: Any) -> None:
    model, _ = model_of(family)
    quantized, result, _ = smoothed[family]
    rows = {row.name: row for row in result.layers}
    assert len(rows) == len(result.layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            owner, _, part = name.rpartition(".")
            # An expert's matrix is a line of its own once the fused ones were taken apart.
            taken_apart = all(f"{owner}.{expert}.{part}" in rows for expert in range(len(parameter)))
            assert name in rows or name.removesuffix(".weight") in rows or taken_apart, name
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            assert rows[name].status == "quantized" or rows[name].reason
            replaced = isinstance(quantized.get_submodule(name), QuantizedLayer)
            assert replaced == (rows[name].status == "quantized")
    assert all(row.reason for row in result.layers if row.status == "float")
    in_regions = [name for region in result.regions for name in region.layers]
    assert sorted(in_regions) == sorted(set(in_regions))
    assert set(in_regions) >= {row.name for row in result.quantized}


def statuses(result: evenbits.Result) -> dict[str, str]:
    return {name: region.status for region in result.regions for name in region.layers}


def test_bert_has_residual_norms_and_is_multiplied(smoothed: Any) -> None:
    _, result, _ = smoothed["bert"]
    rows = {row.name: row for row in result.regions}
    for index in (0, 1):
        block = f"bert.encoder.layer.{index}"
        row = rows[f"{block}.attention.self.{{query,key,value}}"]
        assert row.status == "multiplied" and "also read by layer_norm" in row.reason
        assert rows[f"{block}.intermediate.dense"].status == "multiplied"
    assert rows["bert.pooler.dense"].status == "folded"
    assert all(row.status in ("folded", "multiplied") for row in result.regions)
    assert len(result.quantized) == 14


def test_llama_folds_its_input_norms(smoothed: Any) -> None:
    _, result, _ = smoothed["llama"]
    rows = {row.name: (row.status, row.reason) for row in result.regions}
    for index in (0, 1):
        block = f"model.layers.{index}"
        assert rows[f"{block}.self_attn.{{q_proj,k_proj,v_proj}}"] == ("folded", f"into {block}.input_layernorm")
        after = f"into {block}.post_attention_layernorm"
        assert rows[f"{block}.mlp.{{gate_proj,up_proj}}"] == ("folded", after)
        assert rows[f"{block}.self_attn.o_proj"] == ("folded", f"into the rows of {block}.self_attn.v_proj")
        assert rows[f"{block}.mlp.down_proj"] == ("folded", f"into the rows of {block}.mlp.up_proj")
    assert next(row for row in result.layers if row.name == "lm_head").reason == "ignored by the scheme"


def test_gemma_folds_into_one_plus_w(smoothed: Any) -> None:
    model, result, _ = smoothed["gemma2"]
    found = statuses(result)
    assert found["model.layers.0.self_attn.q_proj"] == found["model.layers.1.mlp.up_proj"] == "folded"
    fresh, _ = model_of("gemma2")
    name = "model.layers.0.input_layernorm.weight"
    scale = (1 + fresh.get_parameter(name)) / (1 + model.get_parameter(name))
    assert float(scale.detach().min()) > 0 and float((scale.detach() - 1).abs().max()) > 0.05


def test_gpt2_conv1d_layers_are_quantized_and_folded(smoothed: Any) -> None:
    _, result, _ = smoothed["gpt2"]
    assert {row.kind for row in result.quantized} == {"Conv1D"} and len(result.quantized) == 8
    row = next(row for row in result.quantized if row.name == "transformer.h.0.attn.c_attn")
    assert row.shape == (3 * D, D)
    assert statuses(result)["transformer.h.0.attn.c_attn"] == statuses(result)["transformer.h.1.mlp.c_fc"] == "folded"
    tied = next(row for row in result.layers if row.name == "lm_head")
    assert tied.status == "float" and "tied to transformer.wte.weight" in tied.reason


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize(("scheme", "method"), [("W8A8", "smoothquant"), ("W8A8", "rtn"), ("W4A8_OVP", "olive")])
@torch.no_grad()
def test_a_head_tied_to_the_embedding_is_quantized_on_request(
    family: str, scheme: str, method: str, tmp_path: Path
) -> None:
    model, batch = model_of(family)
    before, embedding = logits(model, batch), model.get_input_embeddings().weight
    float_head = model.lm_head
    assert float_head.weight is embedding
    result = evenbits.quantize(model, scheme=resolve(scheme).with_head(), method=method, data=[batch])
    assert isinstance(model.lm_head, QuantizedLayer) and model.get_input_embeddings().weight is embedding
    assert any("lm_head is quantized from a copy of its own" in note for note in result.notes)
    row = next(row for row in result.quantized if row.name == "lm_head")
    assert row.shape == (V, D) and row.weight_bytes < V * D * 1.2
    assert relative(logits(model, batch), before) < (0.05 if scheme == "W8A8" else 0.5)
    if method != "smoothquant":  # which folds channel factors into the norm before the head
        x = torch.randn(3, D)
        assert 0 < relative(model.lm_head(x), float_head(x)) < (0.02 if scheme == "W8A8" else 0.2)
    loaded = evenbits.load(evenbits.save(model, tmp_path / "out", result=result))
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert loaded.get_input_embeddings().weight.equal(embedding) and isinstance(loaded.lm_head, QuantizedLayer)


def test_fused_experts_are_layers_and_the_router_a_line_with_a_reason(smoothed: Any) -> None:
    _, result, _ = smoothed["mixtral"]
    experts = [row for row in result.layers if ".experts." in row.name]
    assert len(experts) == 16 and all(row.status == "quantized" and len(row.shape) == 2 for row in experts)
    assert len([row for row in result.layers if row.name.endswith("mlp.gate.weight")]) == 2


def test_an_encoder_output_that_leaves_the_model_is_not_folded(smoothed: Any) -> None:
    for family, name in (("t5", "decoder.block.0.layer.1.EncDecAttention.k"),
                         ("bart", "model.decoder.layers.0.encoder_attn.k_proj")):  # fmt: skip
        _, result, _ = smoothed[family]
        row = next(row for row in result.regions if name in row.layers)
        assert row.status == "multiplied" and "output of the model" in row.reason


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_leaves_the_float64_output_within_a_billionth(family: str) -> None:
    """All folds of a model at once with factors from 1/30 to 30, nothing rounded."""
    model, batch = model_of(family)
    model = model.double()
    if family == "mixtral":
        model.set_experts_implementation("eager")  # the grouped product has no float64
    batch = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
    before = logits(model, batch)
    plans = plan_layers(model, Scheme("int8:row", ignore=()))
    layouts = {plan.name: plan.layout for plan in plans if plan.layout is not None}
    widths = {name: layout.in_channels for name, layout in layouts.items()}
    with without_cache(model):
        regions = find_regions(trace(model, lambda: model(**batch), layouts), widths)
    folded = [region for region in regions if region.parts]
    assert folded
    for region in folded:
        scale_S = torch.logspace(-1.5, 1.5, region.width, dtype=torch.float64)[torch.randperm(region.width)]
        Fold(model, region).apply(scale_S)
        for name, index_I in region.index.items():
            weight = model.get_submodule(name).weight.data
            weight.mul_(layouts[name].mount_inputs(scale_S[index_I], weight.ndim))
    # Gemma's norm computes (1 + w)·x in float32 whatever the model's type is; tests/graph has a norm that does not.
    assert relative(logits(model, batch), before) < (5e-6 if family == "gemma2" else 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_bit_for_bit(family: str, smoothed: Any, tmp_path: Path) -> None:
    model, result, _ = smoothed[family]
    evenbits.save(model, tmp_path / "out", result=result)
    loaded = evenbits.load(tmp_path / "out")
    assert type(loaded) is type(model) and not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype and torch.equal(theirs[name], tensor), name
    assert not any(p.is_meta for p in (*loaded.parameters(), *loaded.buffers()))
    batch = FAMILIES[family][1]()
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    shared = [(n, len(names)) for n, names in _owners(model).items()]
    assert shared == [(n, len(names)) for n, names in _owners(loaded).items()]


def _owners(model: nn.Module) -> dict[str, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in owners.values()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "mixtral", "t5"])
def test_generation_is_the_same_after_loading(family: str, smoothed: Any, tmp_path: Path) -> None:
    model, _, _ = smoothed[family]
    evenbits.save(model, tmp_path / "out")
    loaded = evenbits.load(tmp_path / "out")
    prompt = ids(4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **options)
    assert torch.equal(loaded.generate(prompt, **options), expected) and expected.shape[1] > 1


def test_a_batch_encoding_and_training_mode(tmp_path: Path) -> None:
    model, batch = model_of("bert")
    model.train()
    result = evenbits.quantize(model, data=iter([hf.BatchEncoding(batch)]))
    assert result.calibration_batches == 1 and model.training
    assert all(m.training for m in model.modules() if not isinstance(m, QuantizedLayer))


def test_a_model_in_bfloat16_keeps_its_types(tmp_path: Path) -> None:
    config = hf.LlamaConfig(**_GQA, **_IDS, dtype=torch.bfloat16)
    model, batch = hf.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval(), text()
    before = logits(model, batch).float()
    evenbits.quantize(model, data=[batch])
    assert relative(logits(model, batch).float(), before) < 0.08
    loaded = evenbits.load(evenbits.save(model, tmp_path / "out"))
    assert loaded.model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_the_config_written_names_the_class_and_the_model_is_unchanged(tmp_path: Path) -> None:
    model, batch = model_of("bert")
    evenbits.quantize(model, data=[batch])
    before = copy.deepcopy(model.config.to_dict())
    evenbits.save(model, tmp_path / "out")
    assert model.config.to_dict() == before
    config = hf.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == ["BertForSequenceClassification"]


def test_transformers_itself_does_not_load_our_folder_with_random_weights(tmp_path: Path) -> None:
    model, batch = model_of("bert")
    evenbits.quantize(model, data=[batch])
    evenbits.save(model, tmp_path / "out")
    with pytest.raises(OSError, match="no file named"):
        hf.BertForSequenceClassification.from_pretrained(tmp_path / "out")


def test_a_wrong_keyword_in_a_batch_leaves_the_model_alone() -> None:
    model, batch = model_of("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(EvenbitsError, match="calibration batch 0"):
        evenbits.quantize(model, data=[{"input_idz": batch["input_ids"]}])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not isinstance(module, QuantizedLayer) for module in model.modules())
