"""What evenbits asks of a back end, so that NCCL can do it too: types, operations, and one order of calls on all ranks.

NCCL has no tags and no cards to compare: it moves uint8 and int64, matches collectives by their order, and matches the
messages of a pair of ranks by theirs. Here every call is recorded on gloo and held against that. Where a GPU is at hand
the exchanges run on NCCL itself, with one rank.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import contract_work
import pytest
import torch
import torch.distributed as dist
from ranks import run, values
from torch import nn

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.collectives import exchange, gather
from evenbits.comms.ddp import QuantizedReduce
from evenbits.comms.feedback import ErrorFeedback
from evenbits.errors import EvenbitsError

Call = dict[str, Any]
MESSAGES = {"send", "recv_"}
ALLOWED = {"alltoall_base_", "_allgather_base_", "allreduce_", *MESSAGES}
NCCL = ["torch.int64", "torch.uint8"]


def held(ranks: list[list[Call]]) -> list[list[Call]]:
    """The calls that are ours, after checking what holds for all of them."""
    ours = [[c for c in calls if c["ours"] or c["op"] in MESSAGES] for calls in ranks]
    for calls in ours:
        assert calls
        for call in calls:
            assert call["op"] in ALLOWED and all(kind in NCCL for kind in call["types"]), call
            assert len(call["types"]) == 1, "one type in a call"
    for step in zip(*([c for c in calls if c["op"] not in MESSAGES] for calls in ours), strict=True):
        first = step[0]
        assert all((c["op"], c["types"]) == (first["op"], first["types"]) for c in step), "one order on all ranks"
        if first["op"] == "alltoall_base_":
            assert [c["to"] for c in step] == [list(row) for row in zip(*(c["from"] for c in step), strict=True)]
        else:
            assert all(c["sizes"] == first["sizes"] for c in step)
    return ours


@pytest.mark.parametrize("codec", ["int4:g32", "top0.25+int8:g32"])
def test_calls_of_replicas(codec: str) -> None:
    for calls in held(values(run(contract_work.replicas, 3, codec))):
        assert [c["op"] for c in calls] == ["alltoall_base_", "_allgather_base_"] * (len(calls) // 2)
        assert len(calls) > 4, "several buckets"
        assert {kind for c in calls for kind in c["types"]} == {"torch.uint8"}


@pytest.mark.parametrize("weights", ["raw", "int8:g32"])
def test_calls_of_shards(weights: str) -> None:
    for calls in held(values(run(contract_work.shards, 2, "int8:g32", weights))):
        kinds = {c["op"] for c in calls}
        assert kinds == ({"alltoall_base_"} if weights == "raw" else {"alltoall_base_", "_allgather_base_"})
        assert {kind for c in calls for kind in c["types"]} == {"torch.uint8"}


@pytest.mark.parametrize(
    ("schedule", "codec"),
    [
        ("1F1B", "int4:g16/int8:g16"),
        ("1F1B", "top0.25+int8:g16/top0.25+int8:g16"),  # sizes that depend on the index set
        ("GPipe", "int4:g16/int8:g16"),
        ("ZBVZeroBubble", "int4:g16/int8:g16"),
    ],
)
def test_calls_of_stages(schedule: str, codec: str) -> None:
    """Messages are bytes; what one rank sends to another is what the other receives from it, in the same order."""
    ours = held(values(run(contract_work.stages, 3 if schedule == "1F1B" else 2, schedule, codec)))
    for a, b in permutations(range(len(ours)), 2):
        sent = [(c["sizes"], c["tag"]) for c in ours[a] if c["op"] == "send" and c["peer"] == b]
        received = [(c["sizes"], c["tag"]) for c in ours[b] if c["op"] == "recv_" and c["peer"] == a]
        assert sent == received and bool(sent) == (abs(a - b) == 1)
    for calls in ours:
        assert all(c["types"] == ["torch.uint8"] for c in calls if c["op"] in MESSAGES)
        ends = [c for c in calls if c["op"] == "allreduce_"]
        assert len(ends) == 2 and all(c["types"] == ["torch.int64"] and c["sizes"] == [1] for c in ends)


class Bucket:
    """What DDP hands to a hook."""

    def __init__(self, model: nn.Module) -> None:
        self.model = list(model.parameters())
        self.whole = torch.cat([p.grad.flatten() for p in self.model if p.grad is not None])

    def buffer(self) -> torch.Tensor:
        return self.whole

    def parameters(self) -> list[nn.Parameter]:
        return self.model

    def gradients(self) -> list[torch.Tensor]:
        pieces = self.whole.split([p.numel() for p in self.model])
        return [piece.view_as(p) for piece, p in zip(pieces, self.model, strict=True)]

    def index(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("gloo", "cpu"),
        pytest.param("nccl", "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")),
    ],
)
def test_one_rank_on_its_own_goes_through_the_back_end(backend: str, device: str, tmp_path: Path) -> None:
    """The hook does nothing for one rank; here its exchanges run all the same, on the back end itself."""
    assert not dist.is_initialized()
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _alone(torch.device(device))
    finally:
        dist.destroy_process_group()


def _alone(device: torch.device) -> None:
    payload = torch.arange(17, dtype=torch.uint8, device=device)
    for found in (
        exchange([payload], 17, group=None, sequence=3, fault="")[0],
        gather(payload, [17], group=None, sequence=4, fault="")[0],
    ):
        assert found.device.type == device.type and found.equal(payload)
    with pytest.raises(EvenbitsError, match="could not code"):
        exchange([payload], 17, group=None, sequence=5, fault="spoilt")
    torch.manual_seed(0)
    model = nn.Linear(64, 48).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    weight, bias = (p.grad.clone() for p in model.parameters() if p.grad is not None)
    hook, bucket = QuantizedReduce(model, codec="int8:g32", feedback=ErrorFeedback()), Bucket(model)
    hook._reduce(bucket)
    coded, meta = get("int8:g32"), Meta((weight.numel(),), torch.float32)
    once = coded.decode(coded.encode(weight.flatten()), meta)
    twice = coded.decode(coded.encode(once), meta).view_as(weight)
    torch.testing.assert_close(bucket.gradients()[0], twice, rtol=0, atol=0)
    assert bucket.gradients()[1].equal(bias), "few elements travel as they are"
    error = hook.state_dict()["errors"]["weight"]
    torch.testing.assert_close(error, weight - twice, rtol=0, atol=1e-6)
