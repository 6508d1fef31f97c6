"""What the ranks do in tests/comms/test_fsdp.py."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.faults import one_error
from evenbits.comms.feedback import ErrorFeedback
from evenbits.comms.fsdp import code_fsdp


def net() -> nn.Sequential:
    """Rows that do not divide by the number of ranks."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(11, 7), nn.ReLU(), nn.Linear(7, 5))


def data(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(16, 11, generator=generator)
    return x, x[:, :5].abs()


def sharded(world: int, **options: Any) -> Any:
    model = net()
    mesh = init_device_mesh("cpu", (world,))
    for part in model:
        if isinstance(part, nn.Linear):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, code_fsdp(model, **options)


def backward(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    return float(loss.detach())


def local(p: Any) -> list[float]:
    return p.grad.to_local().flatten().tolist()


def gradients(rank: int, world: int, codec: str, feedback: bool, steps: int) -> Any:
    """Per step: this rank's shards as FSDP made them, and the unreduced gradients of a plain copy."""
    model, coded = sharded(world, gradients=codec, feedback=ErrorFeedback() if feedback else None)
    plain, found = net(), []
    for step in range(steps):
        loss = backward(model, *data(rank, step))
        assert loss == backward(plain, *data(rank, step))
        found.append(([local(p) for p in model.parameters()], [p.grad.flatten().tolist() for p in plain.parameters()]))
    return found, coded.bytes_sent


def weights(rank: int, world: int, codec: str) -> Any:
    """Outputs with coded weights."""
    model, _ = sharded(world, weights=codec, gradients="raw")
    with torch.no_grad():
        return model(data(0, 0)[0]).flatten().tolist()


def rows(p: torch.Tensor, world: int) -> list[torch.Tensor]:
    """FSDP's shards of a parameter: rows, the last shards padded with zeros."""
    height = -(-p.shape[0] // world)
    padded = torch.zeros(height * world, *p.shape[1:])
    padded[: p.shape[0]] = p
    return list(padded.split(height))


def through(codec: str, x: torch.Tensor) -> torch.Tensor:
    return get(codec).decode(get(codec).encode(x), Meta.of(x))


def train(rank: int, world: int, start: int, stop: int, folder: str) -> Any:
    """Steps start … stop from the checkpoint of `start`."""
    model, coded = sharded(world, gradients="int4:g16:stochastic", weights="int8:g16", feedback=ErrorFeedback())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if start:
        kept = torch.load(f"{folder}/{rank}-{start}.pt", weights_only=True)
        with torch.no_grad():
            for p, value in zip(model.parameters(), kept["model"], strict=True):
                p.to_local().copy_(value)
            for p, value in zip(model.parameters(), kept["momentum"], strict=True):
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
                optimizer.state[p]["momentum_buffer"].to_local().copy_(value)
        coded.load_state_dict(kept["coded"])
    losses = []
    for step in range(start, stop):
        losses.append(backward(model, *data(rank, step)))
        optimizer.step()
        state = {
            "model": [p.detach().to_local().clone() for p in model.parameters()],
            "momentum": [optimizer.state[p]["momentum_buffer"].to_local().clone() for p in model.parameters()],
            "coded": coded.state_dict(),
        }
        torch.save(state, f"{folder}/{rank}-{step + 1}.pt")
    return losses, [p.detach().to_local().flatten().tolist() for p in model.parameters()]


def nan(rank: int, world: int) -> Any:
    """NaN in rank 1's batch of the second step; then the next batch."""
    model, _ = sharded(world, gradients="int8:g16")
    found: list[Any] = []
    for step in range(3):
        x, y = data(rank, step)
        if step == 1 and rank == 1:
            x = x.clone()
            x[2, 2] = float("nan")
        begun = time.monotonic()
        try:
            with one_error():
                found.append(backward(model, x, y))
        except ValueError as error:
            found.append((type(error).__name__, str(error), time.monotonic() - begun))
    return found


def refused(rank: int, world: int, way: str) -> Any:
    if way == "differ":
        sharded(world, gradients="int8:g16" if rank else "int4:g16", timeout=5.0)
    code_fsdp(net())
