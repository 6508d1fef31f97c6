"""A BERT classifier as a chain of parts that can be cut anywhere: embedding, layer0 …, classifier.

Every part but the last maps (hidden, mask) → (hidden, mask): the mask of real tokens travels with the hidden states,
as integers, which codecs leave alone. The parts read a Hugging Face folder (config.json, model.safetensors).

Left out: dropout. A checkpoint that resumes bit by bit, and a pipeline that equals its one-process study, would need
the dropout streams of all stages to be the same; in runs of a few hundred steps it hardly matters.

Source: J. Devlin et al., NAACL 2019.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from evenbits.errors import EvenbitsError

_EMBEDDINGS = {
    "word": "word_embeddings",
    "position": "position_embeddings",
    "kind": "token_type_embeddings",
    "norm": "LayerNorm",
}
_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "last": "output.LayerNorm",
}


@dataclass(frozen=True)
class Sizes:
    """What config.json says of a BERT."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @staticmethod
    def read(folder: Path) -> Sizes:
        """From folder/config.json. Raises EvenbitsError if it is missing or describes something else."""
        try:
            given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            sizes = Sizes(**{name: given[name] for name in Sizes.__annotations__})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvenbitsError(f"{folder} holds no configuration of a BERT: {error!r}.") from error
        if given.get("model_type") != "bert" or given.get("hidden_act", "gelu") != "gelu":
            raise EvenbitsError(f"{folder} is a {given.get('model_type')!r}; text recipes take a BERT with GELU.")
        return sizes


class Embedding(nn.Module):
    """Token ids and their mask → hidden states."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.word = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.position = nn.Embedding(sizes.max_position_embeddings, sizes.hidden_size)
        self.kind = nn.Embedding(sizes.type_vocab_size, sizes.hidden_size)
        self.norm = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps)

    def forward(self, ids_NT: Tensor, marks_NT: Tensor) -> tuple[Tensor, Tensor]:
        """ids int64 [N, T], marks int64 [N, T] (0: padding, 1: first sentence, 2: second) → float [N, T, C], marks."""
        place = torch.arange(ids_NT.shape[1], device=ids_NT.device)
        sums = self.word(ids_NT) + self.position(place) + self.kind((marks_NT - 1).clamp(min=0))
        return self.norm(sums), marks_NT


class Layer(nn.Module):
    """Attention and feed-forward, each followed by its norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.heads = sizes.num_attention_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, sizes.intermediate_size), nn.Linear(sizes.intermediate_size, width)
        self.norm = nn.LayerNorm(width, sizes.layer_norm_eps)
        self.last = nn.LayerNorm(width, sizes.layer_norm_eps)

    def forward(self, h_NTC: Tensor, marks_NT: Tensor) -> tuple[Tensor, Tensor]:
        """float [N, T, C] and the marks → the same."""
        split = (-1, (self.heads, -1))
        q, k, v = (f(h_NTC).unflatten(*split).transpose(1, 2) for f in (self.query, self.key, self.value))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=(marks_NT > 0)[:, None, None, :])
        h_NTC = self.norm(h_NTC + self.out(seen.transpose(1, 2).flatten(2)))
        return self.last(h_NTC + self.down(F.gelu(self.up(h_NTC)))), marks_NT


class SentenceClassifier(nn.Module):
    """Pooled first token → classes."""

    def __init__(self, sizes: Sizes, classes: int) -> None:
        super().__init__()
        self.pooler = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.linear = nn.Linear(sizes.hidden_size, classes)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h_NTC: Tensor, marks_NT: Tensor) -> Tensor:
        """float [N, T, C] and the marks → float [N, classes]."""
        logits: Tensor = self.linear(torch.tanh(self.pooler(h_NTC[:, 0])))
        return logits


def bert(folder: Path, classes: int) -> dict[str, nn.Module]:
    """The parts by name, in order, with the folder's weights; the classes are new (small random weights).

    Raises EvenbitsError if the folder lacks a part or holds another model.
    """
    sizes = Sizes.read(folder)
    try:
        state = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise EvenbitsError(f"the weights in {folder} cannot be read: {error}") from error
    parts: dict[str, nn.Module] = {"embedding": Embedding(sizes)}
    _fill(parts["embedding"], state, {k: f"bert.embeddings.{v}" for k, v in _EMBEDDINGS.items()}, folder)
    for i in range(sizes.num_hidden_layers):
        layer = parts[f"layer{i}"] = Layer(sizes)
        _fill(layer, state, {k: f"bert.encoder.layer.{i}.{v}" for k, v in _LAYER.items()}, folder)
    parts["classifier"] = SentenceClassifier(sizes, classes)
    _fill(parts["classifier"], state, {"pooler": "bert.pooler.dense"}, folder)
    return parts


def _fill(part: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, str], folder: Path) -> None:
    own: Any = dict(part.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            prefix, _, kind = name.partition(".")
            if prefix not in names:
                continue
            found = state.get(f"{names[prefix]}.{kind}")
            if found is None or found.shape != parameter.shape:
                raise EvenbitsError(
                    f"{folder}/model.safetensors must hold {names[prefix]}.{kind} of shape {list(parameter.shape)}; "
                    f"found {None if found is None else list(found.shape)}."
                )
            parameter.copy_(found.float())
