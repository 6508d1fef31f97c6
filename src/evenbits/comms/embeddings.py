"""Whether a cut lies right behind an embedding. Its output is not pruned unless asked for: there small values carry
the words.

What leaves a stage is an embedding's output if the stage holds one and, beside it, nothing that learns but norms: word,
position and segment embeddings summed and normed are embeddings still. A linear or convolutional layer, attention or a
whole block behind it makes activations of them. Judged by the modules alone: a stage that hands on its embedding's
output beside that of a layer (a skip connection) is not recognized.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from evenbits.comms.codecs import get

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def ends_in_embedding(module: nn.Module) -> bool:
    """Whether an embedding is all that `module` has learnt, norms and parameters that are added to it apart."""
    embeds = False
    for part in module.modules():
        if isinstance(part, _EMBEDDINGS):
            embeds = True
        # Other leaves with parameters are layers; a parameter that a whole module holds itself (positions) is none.
        elif not list(part.children()) and list(part.parameters()) and "Norm" not in type(part).__name__:
            return False
    return embeds


def refusal(module: nn.Module, specs: Iterable[str]) -> str:
    """Why codecs `specs` may not code what leaves a first stage `module`, in words; empty if they may."""
    prunes = [spec for spec in specs if get(spec).keeps_mask]
    if not prunes or not ends_in_embedding(module):
        return ""
    return (
        f"codec {prunes[0]!r} would prune the output of an embedding, where small values carry the words; cut behind a "
        "later layer, use a dense codec there, or ask for it: --prune-embeddings, or Edge(..., prune_embeddings=True)"
    )
