"""The carrier computes what a codec at the cut computes, under an engine that knows nothing of it."""

from __future__ import annotations

import carrier_work
import pytest
import stage_work
import torch
from pipelines import batch, loss_of, modules
from ranks import run, values
from torch import nn

from evenbits.comms.carrier import Carrier, carried
from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.wire import Edge
from evenbits.errors import EvenbitsError


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_two_processes_with_the_stock_stage_compute_what_fake_quantization_computes(schedule: str) -> None:
    losses = values(run(carrier_work.train, 2, schedule, "int4:g16/int8:g16", 3))
    assert losses[1] == stage_work.one_process("int4:g16/int8:g16", 3)


@pytest.mark.parametrize("codec", ["raw", "int8:g16/fp16", "int3:g16/raw", "top0.1+int8:g16/bf16"])
def test_gradients_at_the_cut_are_those_of_the_codec(codec: str) -> None:
    """One process plays both ends; the gradient handed over is the packed one."""
    ids, target = (t[: carrier_work.SIZE] for t in batch(0))
    first, last = carrier_work.carriers(codec)
    vector = first(ids)
    assert vector.dtype == torch.float32
    assert vector.numel() == carried(Edge.of(codec), Meta(carrier_work.SHAPE, torch.float32))
    arrived = vector.detach().requires_grad_()
    loss = loss_of(last(arrived), target)
    loss.backward()
    vector.backward(arrived.grad)
    edge, parts = Edge.of(codec), modules(2)
    expected = loss_of(parts[1](stage_work._Cut.apply(parts[0](ids), edge.forward[0], edge.backward[0])), target)
    if not get(edge.backward[0]).keeps_mask:
        expected.backward()
        for mine, theirs in zip((first, last), parts, strict=True):
            for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad)
    assert float(loss.detach()) == float(expected.detach())


def test_what_cannot_be_carried_is_refused() -> None:
    edge = Edge.of("int8:g16")
    with pytest.raises(EvenbitsError, match="give shape_in"):
        Carrier(nn.Identity(), receives=edge)
    with pytest.raises(EvenbitsError, match="cannot change codecs"):
        Carrier(nn.Identity(), sends=Edge.of("int4:g16>int8:g16"))
    last = Carrier(nn.Identity(), receives=edge, shape_in=(4, 16))
    for wrong in (torch.zeros(3), torch.zeros(100, dtype=torch.float64), torch.zeros(10, 10)):
        with pytest.raises(EvenbitsError, match="the same edge and shape"):
            last(wrong)
