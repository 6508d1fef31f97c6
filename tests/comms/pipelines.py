"""Small pipelines for the tests of comms/: a model cut into stages, run by one of torch's schedules."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from evenbits.comms.stages import CodecStage

SCHEDULES = {
    "GPipe": (ScheduleGPipe, 1),
    "1F1B": (Schedule1F1B, 1),
    "Interleaved1F1B": (ScheduleInterleaved1F1B, 2),
    "InterleavedZeroBubble": (ScheduleInterleavedZeroBubble, 2),
    "ZBVZeroBubble": (ScheduleZBVZeroBubble, 2),
}
VOCABULARY, WIDTH, LENGTH, BATCH, MICROBATCHES = 31, 16, 6, 8, 4


class First(nn.Module):
    """Token ids → hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mix(self.embed(ids)))


class Middle(nn.Module):
    """Hidden → hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + torch.relu(self.mix(self.norm(h)))


class Last(nn.Module):
    """Hidden → logits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(h))


def modules(count: int, seed: int = 3) -> list[nn.Module]:
    """The same model on every rank, in `count` stages."""
    torch.manual_seed(seed)
    return [First(), *(Middle() for _ in range(count - 2)), Last()]


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets of one step, the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    return ids, (3 * ids + 1) % VOCABULARY


def local_indices(schedule: str, rank: int, world: int) -> list[int]:
    """The stages of one rank."""
    per_rank = SCHEDULES[schedule][1]
    if schedule == "ZBVZeroBubble":
        return [rank, 2 * world - 1 - rank]
    return [rank + i * world for i in range(per_rank)]


class Pipeline:
    """The stages of this rank, their schedule and their optimizer."""

    def __init__(self, schedule: str, rank: int, world: int, *, stock: bool = False, parts: Any = None, **options: Any):
        kind, per_rank = SCHEDULES[schedule]
        count = per_rank * world
        whole = parts or modules(count)
        self.stages: list[Any] = []
        for index in local_indices(schedule, rank, world):
            maker: Any = PipelineStage if stock else CodecStage
            self.stages.append(maker(whole[index], index, count, torch.device("cpu"), **options))
        given: Any = self.stages if per_rank > 1 else self.stages[0]
        self.schedule: Any = kind(given, MICROBATCHES, loss_fn=loss_of)
        self.first, self.last = self.stages[0].is_first, any(stage.is_last for stage in self.stages)
        parameters = [p for stage in self.stages for p in stage.submod.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-2)

    def step(self, ids: torch.Tensor, target: torch.Tensor, *, update: bool = True) -> list[float]:
        """One training step → the losses of the microbatches, on the rank of the last stage."""
        losses: list[torch.Tensor] = []
        self.optimizer.zero_grad(set_to_none=True)
        args = (ids,) if self.first else ()
        if self.last:
            self.schedule.step(*args, target=target, losses=losses)
        else:
            self.schedule.step(*args)
        if update:
            self.optimizer.step()
        return [float(loss.detach()) for loss in losses]

    def digest(self) -> str:
        """A digest of every gradient and parameter of this rank, bit by bit."""
        digest = hashlib.sha256()
        for stage in self.stages:
            for name, p in stage.submod.named_parameters():
                digest.update(name.encode())
                digest.update(p.detach().numpy().tobytes())
                digest.update(b"-" if p.grad is None else p.grad.numpy().tobytes())
        return digest.hexdigest()
