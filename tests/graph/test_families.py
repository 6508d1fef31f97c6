"""Eighteen transformer families as they are in the library: what is folded where, and that it changes nothing.

No table of architectures is read; the table here is what watching finds. Names are cut: E and D are the encoder's and
the decoder's first layer. "× norm: X" is a reader that cannot be compensated, "× fn" an operation that factors do not
pass. Layers whose weight is tied to the embedding do not appear.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from family_nets import FAMILIES, family
from graph_nets import check_found, report

from evenbits.graph.regions import find_regions
from evenbits.graph.trace import trace
from evenbits.nn.layout import Layout
from evenbits.pipeline.plan import plan_layers
from evenbits.pipeline.watch import without_cache
from evenbits.schemes.scheme import Scheme

_CUTS = {
    r"\b(encoder|decoder)\.(layers|block)\.0\.": lambda m: f"{m[1][0].upper()}.",
    r"\bencoder\.albert_layer_groups\.0\.albert_layers\.0\.": "",
    r"\b(model\.D|(encoder|model|transformer|layers)\.(layers?|h)|layers)\.0\.": "",
    r"\bmodel\.D\.": "",
    r"its tensor is also read by layer_norm in ": "norm: ",
    r"its tensor is also read by (\w+) in .*": r"\1",
    r"computed by (\w+), through which no factor passes": r"\1",
    r"its tensor is an output of the model": "output",
    r"its tensor comes from outside the model": "outside",
}

TABLE: dict[str, dict[str, str]] = {
    "BERT": {
        "attention.self.{query,key,value}": "× norm: attention.output.LayerNorm",
        "attention.output.dense": "the rows of attention.self.value",
        "intermediate.dense": "× norm: output.LayerNorm",
        "output.dense": "× gelu",
        "pooler.dense": "× output",
    },
    "RoBERTa": {
        "attention.self.{query,key,value}": "× norm: attention.output.LayerNorm",
        "attention.output.dense": "the rows of attention.self.value",
        "intermediate.dense": "× norm: output.LayerNorm",
        "output.dense": "× gelu",
        "pooler.dense": "× output",
    },
    "BART": {
        "E.self_attn.{q_proj,k_proj,v_proj}": "× norm: E.self_attn_layer_norm",
        "E.self_attn.out_proj": "the rows of E.self_attn.v_proj",
        "E.fc1": "× norm: E.final_layer_norm",
        "E.fc2": "× gelu",
        "D.self_attn.{q_proj,k_proj,v_proj}": "× norm: D.self_attn_layer_norm",
        "D.self_attn.out_proj": "the rows of D.self_attn.v_proj",
        "D.encoder_attn.q_proj": "× norm: D.encoder_attn_layer_norm",
        "D.encoder_attn.{k_proj,v_proj}": "× output",
        "D.encoder_attn.out_proj": "the rows of D.encoder_attn.v_proj",
        "D.fc1": "× norm: D.final_layer_norm",
        "D.fc2": "× gelu",
    },
    "OPT": {
        "self_attn.{q_proj,k_proj,v_proj}": "self_attn_layer_norm",
        "self_attn.out_proj": "the rows of self_attn.v_proj",
        "fc1": "final_layer_norm",
        "fc2": "the rows of fc1",
    },
    "BLOOM": {
        "self_attention.query_key_value": "input_layernorm",
        "self_attention.dense": "the rows of self_attention.query_key_value",
        "mlp.dense_h_to_4h": "post_attention_layernorm",
        "mlp.dense_4h_to_h": "× mul",
    },
    "GPT-2": {
        "attn.c_attn": "ln_1",
        "attn.c_proj": "the rows of attn.c_attn",
        "mlp.c_fc": "ln_2",
        "mlp.c_proj": "× pow",
    },
    "GPT-J": {
        "attn.q_proj,attn.k_proj,attn.v_proj,mlp.fc_in": "ln_1",
        "attn.out_proj": "the rows of attn.v_proj",
        "mlp.fc_out": "× pow",
        "lm_head": "transformer.ln_f",
    },
    "Llama": {
        "self_attn.{q_proj,k_proj,v_proj}": "input_layernorm",
        "self_attn.o_proj": "the rows of self_attn.v_proj",
        "mlp.{gate_proj,up_proj}": "post_attention_layernorm",
        "mlp.down_proj": "the rows of mlp.up_proj",
        "lm_head": "model.norm",
    },
    "Mistral": {
        "self_attn.{q_proj,k_proj,v_proj}": "input_layernorm",
        "self_attn.o_proj": "the rows of self_attn.v_proj",
        "mlp.{gate_proj,up_proj}": "post_attention_layernorm",
        "mlp.down_proj": "the rows of mlp.up_proj",
        "lm_head": "model.norm",
    },
    "Qwen3": {
        "self_attn.{q_proj,k_proj,v_proj}": "input_layernorm",
        "self_attn.o_proj": "the rows of self_attn.v_proj",
        "mlp.{gate_proj,up_proj}": "post_attention_layernorm",
        "mlp.down_proj": "the rows of mlp.up_proj",
        "lm_head": "model.norm",
    },
    "Gemma2": {
        "self_attn.{q_proj,k_proj,v_proj}": "input_layernorm",
        "self_attn.o_proj": "the rows of self_attn.v_proj",
        "mlp.{gate_proj,up_proj}": "pre_feedforward_layernorm",
        "mlp.down_proj": "the rows of mlp.up_proj",
    },
    "Gemma3": {
        "self_attn.{q_proj,k_proj,v_proj}": "input_layernorm",
        "self_attn.o_proj": "the rows of self_attn.v_proj",
        "mlp.{gate_proj,up_proj}": "pre_feedforward_layernorm",
        "mlp.down_proj": "the rows of mlp.up_proj",
    },
    "Falcon": {
        "self_attention.query_key_value,mlp.dense_h_to_4h": "input_layernorm",
        "self_attention.dense": "the rows of self_attention.query_key_value",
        "mlp.dense_4h_to_h": "× gelu",
    },
    "Phi": {
        "self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,mlp.fc1": "input_layernorm",
        "self_attn.dense": "the rows of self_attn.v_proj",
        "mlp.fc2": "× pow",
        "lm_head": "model.final_layernorm",
    },
    "Mixtral": {
        "self_attn.{q_proj,k_proj,v_proj}": "input_layernorm",
        "self_attn.o_proj": "the rows of self_attn.v_proj",
        "lm_head": "model.norm",
    },
    "ViT": {
        "embeddings.patch_embeddings.projection": "× outside",
        "attention.{q_proj,k_proj,v_proj}": "layernorm_before",
        "attention.o_proj": "the rows of attention.v_proj",
        "mlp.fc1": "layernorm_after",
        "mlp.fc2": "× gelu",
        "pooler.dense": "× output",
    },
    "T5": {
        "E.layer.0.SelfAttention.{q,k,v}": "E.layer.0.layer_norm",
        "E.layer.0.SelfAttention.o": "the rows of E.layer.0.SelfAttention.v",
        "E.layer.1.DenseReluDense.wi": "E.layer.1.layer_norm",
        "E.layer.1.DenseReluDense.wo": "the rows of E.layer.1.DenseReluDense.wi",
        "D.layer.0.SelfAttention.{q,k,v}": "D.layer.0.layer_norm",
        "D.layer.0.SelfAttention.o": "the rows of D.layer.0.SelfAttention.v",
        "D.layer.1.EncDecAttention.q": "D.layer.1.layer_norm",
        "D.layer.1.EncDecAttention.{k,v}": "× output",
        "D.layer.1.EncDecAttention.o": "the rows of D.layer.1.EncDecAttention.v",
        "D.layer.2.DenseReluDense.wi": "D.layer.2.layer_norm",
        "D.layer.2.DenseReluDense.wo": "the rows of D.layer.2.DenseReluDense.wi",
    },
    "ALBERT": {
        "encoder.embedding_hidden_mapping_in": "embeddings.LayerNorm",
        "attention.{query,key,value}": "× norm: attention.LayerNorm",
        "attention.dense": "the rows of attention.value",
        "ffn": "× norm: full_layer_layer_norm",
        "ffn_output": "× pow",
        "pooler": "× norm: attention.LayerNorm",
    },
}


def cut(text: str) -> str:
    for pattern, word in _CUTS.items():
        text = re.sub(pattern, word, text)
    return text


def layers_of(model: torch.nn.Module) -> dict[str, Layout]:
    plans = plan_layers(model, Scheme(weights="int8:row"))
    return {plan.name: plan.layout for plan in plans if plan.layout is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_regions_and_smoothing_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Norms that go to float32 would hide an error of 1e-8 in their own rounding.
    monkeypatch.setattr(torch.Tensor, "float", lambda x, **_: x.double())
    model, inputs = family(name)
    layers = layers_of(model)

    def run() -> Any:
        return model(**inputs)

    with without_cache(model), torch.no_grad():
        found = find_regions(trace(model, run, layers), {n: layout.in_channels for n, layout in layers.items()})
        assert {cut(region): cut(where) for region, where in report(found).items()} == TABLE[name]
        check_found(model, run, found, 1e-12)
