"""Tiny, randomly initialised models of transformer families, with a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
_MLP = {**_SIZES, "intermediate_size": 64}
_GQA = {**_MLP, "num_key_value_heads": 2, "head_dim": 8}
_WORDS = {"vocab_size": 99}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "BERT": lambda: hf.BertModel(hf.BertConfig(**_MLP, **_WORDS)),
    "RoBERTa": lambda: hf.RobertaModel(hf.RobertaConfig(**_MLP, **_WORDS)),
    "BART": lambda: hf.BartModel(
        hf.BartConfig(
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
            **_WORDS,
        )
    ),
    "OPT": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**_SIZES, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, **_WORDS)
    ),
    "BLOOM": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=1, n_head=4, **_WORDS)),
    "GPT-2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, **_WORDS)
    ),
    "GPT-J": lambda: hf.GPTJForCausalLM(
        hf.GPTJConfig(n_embd=32, n_layer=1, n_head=4, n_positions=64, rotary_dim=4, **_WORDS)
    ),
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GQA, **_WORDS)),
    "Mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GQA, **_WORDS)),
    "Qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GQA, **_WORDS)),
    "Gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GQA, **_WORDS)),
    "Gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GQA, **_WORDS)),
    "Falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_SIZES, **_WORDS)),
    "Phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_MLP, **_WORDS)),
    "Mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(experts_implementation="eager", num_local_experts=4, **_GQA, **_WORDS)
    ),
    "ViT": lambda: hf.ViTModel(hf.ViTConfig(**_MLP, image_size=16, patch_size=4)),
    "T5": lambda: hf.T5Model(hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, **_WORDS)),
    "ALBERT": lambda: hf.AlbertModel(hf.AlbertConfig(embedding_size=16, **{**_MLP, "num_hidden_layers": 2}, **_WORDS)),
}


def family(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in float64 whose gains and biases are not those of the first day, and its arguments."""
    model = FAMILIES[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter) * 0.3)
    if name == "ViT":
        return model, {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}
    inputs: dict[str, Any] = {"input_ids": torch.randint(3, 90, (2, 9))}
    if name in ("BART", "T5"):
        inputs["decoder_input_ids"] = torch.randint(3, 90, (2, 7))
    return model, inputs
