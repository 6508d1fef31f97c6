"""What the ranks do in tests/comms/test_carrier.py: torch's own stage around a Carrier."""

from __future__ import annotations

from typing import Any

import torch
from pipelines import BATCH, LENGTH, MICROBATCHES, VOCABULARY, WIDTH, Pipeline, batch, modules

from evenbits.comms.carrier import Carrier, carried
from evenbits.comms.codecs.base import Meta
from evenbits.comms.wire import Edge

SIZE = BATCH // MICROBATCHES
SHAPE = (SIZE, LENGTH, WIDTH)


def carriers(codec: str) -> list[Carrier]:
    """The two stages of `modules(2)` with one edge between them."""
    edge, (first, last) = Edge.of(codec), modules(2)
    return [Carrier(first, sends=edge), Carrier(last, receives=edge, shape_in=SHAPE)]


def train(rank: int, world: int, schedule: str, codec: str, steps: int) -> Any:
    """Losses of every step over the stock stage, which sees a float32 vector."""
    vector = torch.zeros(carried(Edge.of(codec), Meta(SHAPE, torch.float32)), requires_grad=True)
    ids = torch.zeros(SIZE, LENGTH, dtype=torch.long)
    logits = torch.zeros(SIZE, LENGTH, VOCABULARY, requires_grad=True)
    shapes = [{"input_args": ids, "output_args": vector}, {"input_args": vector, "output_args": logits}][rank]
    line = Pipeline(schedule, rank, world, stock=True, parts=carriers(codec), **shapes)
    return [line.step(*batch(step)) for step in range(steps)]
