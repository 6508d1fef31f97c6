"""What the ranks do in tests/comms/test_contract.py: train, and write down every call that reaches a back end."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import ddp_work
import fsdp_work
import torch
from pipelines import Pipeline, batch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from evenbits.comms.wire import Edge

Call = dict[str, Any]


class Calls(TorchDispatchMode):
    """Every operation of torch.ops.c10d, in order. ours: whether a file of evenbits is among the callers."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors: list[torch.Tensor] = []
            for arg in args:
                found = arg if isinstance(arg, (list, tuple)) else [arg]
                for inner in found:
                    tensors += [x for x in (inner if isinstance(inner, list) else [inner]) if torch.is_tensor(x)]
            name = func._overloadpacket.__name__
            numbers = [x for x in args if isinstance(x, int) and not isinstance(x, bool)]
            call: Call = {"op": name, "types": sorted({str(x.dtype) for x in tensors}), "ours": _is_ours()}
            call["sizes"] = [x.numel() for x in tensors]
            if name == "alltoall_base_":
                call["from"], call["to"] = (list(x) for x in args if isinstance(x, (list, tuple)))
            if name in ("send", "recv_"):
                call["peer"], call["tag"] = numbers[:2]
            self.made.append(call)
        return func(*args, **(kwargs or {}))


def _is_ours() -> bool:
    frame: Any = sys._getframe()
    while frame is not None:
        if "/evenbits/comms/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def replicas(rank: int, world: int, codec: str) -> list[Call]:
    """Two steps of DDP in several buckets."""
    _, ddp, _, optimizer = ddp_work.made(rank, codec=codec)
    with Calls() as calls:
        for step in range(2):
            x, y = ddp_work.data(rank, step)
            optimizer.zero_grad()
            nn.functional.mse_loss(ddp(x), y).backward()
            optimizer.step()
    return calls.made


def shards(rank: int, world: int, gradients: str, weights: str) -> list[Call]:
    """Two steps of FSDP2."""
    model, _ = fsdp_work.sharded(world, gradients=gradients, weights=weights)
    with Calls() as calls:
        for step in range(2):
            fsdp_work.backward(model, *fsdp_work.data(rank, step))
    return calls.made


def stages(rank: int, world: int, schedule: str, codec: str) -> list[Call]:
    """Two steps of a pipeline as NCCL would get it: receives posted by the schedule. The first step, in which torch
    exchanges shapes, is not recorded.
    """
    edge = replace(Edge.of(codec), prune_embeddings=True)
    line = Pipeline(schedule, rank, world, codec=edge, ahead=None)
    line.step(*batch(0))
    with Calls() as calls:
        for step in (1, 2):
            line.step(*batch(step))
    return calls.made
