"""What counts as the output of an embedding."""

from __future__ import annotations

import pytest
from torch import nn

from evenbits.comms.embeddings import ends_in_embedding, refusal


class Positions(nn.Module):
    """A word embedding and a parameter that is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(8, 4)
        self.place = nn.Parameter(nn.Linear(4, 4).weight.detach())


@pytest.mark.parametrize(
    ("module", "ends"),
    [
        (nn.Embedding(8, 4), True),
        (nn.Sequential(nn.EmbeddingBag(8, 4), nn.LayerNorm(4), nn.Dropout(0.1)), True),
        (nn.Sequential(nn.Embedding(8, 4), nn.RMSNorm(4)), True),
        (Positions(), True),
        (nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4)), False),
        (nn.Sequential(nn.Embedding(8, 4), nn.MultiheadAttention(4, 1)), False),
        (nn.Sequential(nn.Embedding(8, 4), nn.GRU(4, 4)), False),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), False),
        (nn.LayerNorm(4), False),
    ],
)
def test_an_embedding_and_norms_and_nothing_else(module: nn.Module, ends: bool) -> None:
    assert ends_in_embedding(module) is ends
    assert bool(refusal(module, ["int8:g128", "top0.5+int8:g128"])) is ends
    assert refusal(module, ["int8:g128"]) == ""
