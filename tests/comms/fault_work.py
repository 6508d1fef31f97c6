"""What the ranks do in tests/comms/test_faults.py: things that go wrong, on one rank only."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
from pipelines import Pipeline, batch, modules
from torch import nn

from evenbits.comms.faults import one_error
from evenbits.comms.telemetry import Telemetry


class Bad(nn.Module):
    """A stage that does `deed` at its n-th forward in training."""

    def __init__(self, inner: nn.Module, deed: Any, at: int) -> None:
        super().__init__()
        self.inner, self.deed, self.at, self.calls = inner, deed, at, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The first forward of all is torch's own, to learn shapes.
        self.calls += 1
        y = self.inner(x)
        return self.deed(y) if self.calls == self.at else y


class _SpoilGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        spoilt = grads[0].clone()
        spoilt.view(-1)[3] = float("inf")
        return spoilt


def spoil(y: torch.Tensor) -> torch.Tensor:
    """One NaN."""
    z = y.clone()
    z.view(-1)[5] = float("nan")
    return z


def attempts(line: Pipeline, steps: int) -> list[Any]:
    """Per step: its losses, or the error and the seconds it took."""
    found: list[Any] = []
    for step in range(steps):
        begun = time.monotonic()
        try:
            with one_error(line.schedule):
                found.append(line.step(*batch(step)))
        except ValueError as error:
            found.append((type(error).__name__, str(error), time.monotonic() - begun))
            line.optimizer.zero_grad(set_to_none=True)
    return found


def not_finite(rank: int, world: int, schedule: str, where: int, way: str) -> Any:
    """NaN in the second step's second microbatch on stage `where`; the job then goes on with the next batch."""
    count = len(modules(world)) if schedule in ("GPipe", "1F1B") else 2 * world
    parts = modules(count)
    parts[where] = Bad(parts[where], spoil if way == "forward" else _SpoilGradient.apply, at=1 + 4 + 2)
    line = Pipeline(schedule, rank, world, parts=parts, codec="int8:g16")
    before = None
    found = []
    for step in range(4):
        if step == 1:
            before = [p.detach().clone() for stage in line.stages for p in stage.submod.parameters()]
        try:
            with one_error(line.schedule):
                found.append(("ok", line.step(*batch(step))))
        except ValueError as error:
            found.append((type(error).__name__, str(error)))
            after = [p.detach() for stage in line.stages for p in stage.submod.parameters()]
            assert before is not None and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return found


def cut(rank: int, world: int, direction: str) -> Any:
    """One frame arrives without its last 40 bytes, in a step that announces the next rung of both ladders."""
    line = Pipeline("1F1B", rank, world, codec="int8:g16>int4:g16")
    courier, seen = line.stages[0].courier, 0
    begin = courier.begin

    def climbing() -> None:
        begin()
        for lane in courier.outgoing():
            lane.following = 1 if courier.step == 1 else lane.level

    courier.begin = climbing
    whole = courier.frame

    def shorter(edge: int, way: str, microbatch: int, slot: int, x: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        frame = whole(edge, way, microbatch, slot, x)
        if way == direction and courier.step == 1 and microbatch == 2:
            seen += 1
            return frame[:-40].clone()
        return frame

    courier.frame = shorter
    found = attempts(line, 3)
    assert all(lane.level == 0 for lane in courier.lanes.values()), "a failed step changes no rung"
    assert seen == (1 if (direction == "forward") == (rank == 0) else 0)
    return found


def killed(rank: int, world: int, who: int) -> Any:
    """Rank `who` is killed in the middle of the second step."""

    def die(y: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return y

    parts = modules(world)
    parts[who] = Bad(parts[who], die, at=1 + 4 + 2)
    return attempts(Pipeline("1F1B", rank, world, parts=parts, codec="int8:g16"), 2)


def stalled(rank: int, world: int, who: int) -> Any:
    """Rank `who` stops answering in the middle of the second step, for longer than the link's timeout."""

    def sleep(y: torch.Tensor) -> torch.Tensor:
        time.sleep(4)
        return y

    parts = modules(world)
    parts[who] = Bad(parts[who], sleep, at=1 + 4 + 2)
    found = attempts(Pipeline("1F1B", rank, world, parts=parts, codec="int8:g16"), 2)
    assert not dist.is_initialized()
    return found


def raising(rank: int, world: int, who: int) -> Any:
    """The model of one stage raises."""

    def fail(y: torch.Tensor) -> torch.Tensor:
        raise KeyError("no such head")

    parts = modules(world)
    parts[who] = Bad(parts[who], fail, at=1 + 4 + 2)
    return attempts(Pipeline("1F1B", rank, world, parts=parts, codec="int8:g16"), 2)


def resumed(rank: int, world: int, start: int, stop: int, folder: str) -> Any:
    """Steps start … stop, from the checkpoint of `start` if there is one; a checkpoint at every step."""
    telemetry = Telemetry()
    from evenbits.comms.guard import Guard

    line = Pipeline(
        "1F1B",
        rank,
        world,
        codec="int2:tensor:affine:free:stochastic>int4:g16:stochastic>int8:g16/int4:g16:stochastic",
        telemetry=telemetry,
        guard=Guard(act="raise", dc_limit=1e-3, patience=2),
    )
    stage = line.stages[0]
    if start:
        kept = torch.load(f"{folder}/{rank}-{start}.pt", weights_only=True)
        stage.submod.load_state_dict(kept["model"])
        line.optimizer.load_state_dict(kept["optimizer"])
        stage.load_codec_state(kept["codec"])
    losses, rungs = [], []
    import warnings

    for step in range(start, stop):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses.append(line.step(*batch(step)))
        rungs.append({key: lane.level for key, lane in stage.courier.lanes.items()})
        state = {
            "model": stage.submod.state_dict(),
            "optimizer": line.optimizer.state_dict(),
            "codec": stage.codec_state(),
        }
        torch.save(state, f"{folder}/{rank}-{step + 1}.pt")
    return losses, rungs, line.digest()
