"""What the ranks do in tests/comms/test_visits.py."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from fault_work import Bad, spoil
from pipelines import BATCH, MICROBATCHES, Pipeline, batch, loss_of, modules
from safetensors.torch import load, save

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.faults import one_error
from evenbits.comms.telemetry import Telemetry
from evenbits.comms.visits import Delta

BATCHES = 3
CODEC = "bf16/int8:g16"


def ids_of(step: int) -> list[int]:
    """Step s sees the samples of batch s mod 3, in another order each time."""
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(step)).tolist()
    return [100 * (step % BATCHES) + row for row in order]


def seen(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, target = batch(step % BATCHES)
    rows = torch.tensor([i % 100 for i in ids_of(step)])
    return ids[rows], target[rows]


def train(rank: int, world: int, schedule: str, steps: int, ahead: Any = "auto", **delta: Any) -> Any:
    """Losses of every step, bytes sent in every step, a digest."""
    line = Pipeline(schedule, rank, world, codec=CODEC, delta=Delta(**delta), ahead=ahead)
    losses, sent = [], [0]
    for step in range(steps):
        for stage in line.stages:
            stage.samples(ids_of(step))
        losses.append(line.step(*seen(step)))
        sent.append(sum(stage.bytes_sent() for stage in line.stages))
    return losses, [b - a for a, b in pairwise(sent)], line.digest()


def many(rank: int, world: int, schedules: list[str], steps: int, delta: dict[str, Any]) -> Any:
    return {name: train(rank, world, name, steps, **delta) for name in schedules}


class _Cut(torch.autograd.Function):
    """A delta-coded edge in one process, with what is kept in a plain dictionary."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ids: list[int], kept: dict[int, torch.Tensor], delta: str) -> torch.Tensor:
        rows = []
        for row, sample in zip(x, ids, strict=True):
            codec, base = (get(delta), kept[sample]) if sample in kept else (get("bf16"), torch.zeros_like(row))
            change = (row - base)[None]
            kept[sample] = base + codec.decode(codec.encode(change), Meta.of(change))[0]
            rows.append(kept[sample])
        return torch.stack(rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        codec = get(CODEC.partition("/")[2])
        return codec.decode(codec.encode(grads[0]), Meta.of(grads[0])), None, None, None


def one_process(delta: str, steps: int) -> list[list[float]]:
    """The losses of `train` over two stages, without messages."""
    parts, kept = modules(2), {}
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-2) for part in parts]
    losses: list[list[float]] = []
    for step in range(steps):
        losses.append([])
        for part in parts:
            part.zero_grad(set_to_none=True)
        chunks = [x.chunk(MICROBATCHES) for x in (*seen(step), torch.tensor(ids_of(step)))]
        for ids_m, target_m, samples in zip(*chunks, strict=True):
            loss = loss_of(parts[1](_Cut.apply(parts[0](ids_m), samples.tolist(), kept, delta)), target_m)
            loss.backward()
            losses[-1].append(float(loss.detach()))
        for part, optimizer in zip(parts, optimizers, strict=True):
            for p in part.parameters():
                p.grad.div_(MICROBATCHES)
            optimizer.step()
    return losses


def resumed(rank: int, world: int, folder: str) -> Any:
    """A run of six steps; and one that stops after four and goes on from its state, as bytes, with spilled samples."""
    options = {"codec": CODEC, "delta": Delta("int4:g16", memory=512, folder=f"{folder}/a")}
    first = Pipeline("1F1B", rank, world, **options)
    state: Any = None
    for step in range(6):
        if step == 4:
            codec = first.stages[0].codec_state()
            state = [first.stages[0].submod.state_dict(), first.optimizer.state_dict(), codec]
            state = [{k: v.clone() for k, v in state[0].items()}, _copied(state[1]), codec]
            codec["delta"] = {name: load(save(kept)) for name, kept in codec["delta"].items()}
        first.stages[0].samples(ids_of(step))
        first.step(*seen(step))
    second = Pipeline("1F1B", rank, world, codec=CODEC, delta=Delta("int4:g16", memory=512, folder=f"{folder}/b"))
    second.stages[0].submod.load_state_dict(state[0])
    second.optimizer.load_state_dict(state[1])
    second.stages[0].load_codec_state(state[2])
    for step in (4, 5):
        second.stages[0].samples(ids_of(step))
        second.step(*seen(step))
    return first.digest(), second.digest()


def _copied(state: Any) -> Any:
    if isinstance(state, dict):
        return {k: _copied(v) for k, v in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


def spoilt(rank: int, world: int) -> Any:
    """A step that all ranks drop: its samples are new again at both ends, and the next steps are fine."""
    parts = modules(2)
    parts[0] = Bad(parts[0], spoil, 1 + MICROBATCHES * 4 + 2)  # in the fifth step, the second visit of batch 1
    line = Pipeline("1F1B", rank, world, codec=CODEC, delta=Delta("int4:g16"), parts=parts)
    found: list[Any] = []
    for step in range(9):
        before = line.stages[0].bytes_sent()
        line.stages[0].samples(ids_of(step))
        try:
            with one_error(line.schedule):
                line.step(*seen(step))
            found.append(line.stages[0].bytes_sent() - before)
        except ValueError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def confused(rank: int, world: int, case: str) -> Any:
    """Ends that were told different things."""
    delta = Delta("int4:g16" if rank or case != "codec" else "int8:g16")
    line = Pipeline("1F1B", rank, world, codec=CODEC, delta=delta, timeout=5.0)
    if case == "none":
        line.step(*seen(0))
    shift = 1000 * rank if case == "samples" else 0
    line.stages[0].samples([i + shift for i in ids_of(0)])
    line.step(*seen(0))


def measured(rank: int, world: int) -> Any:
    """Figures of the delta codec, step by step, and an evaluation in between."""
    telemetry = Telemetry()
    line = Pipeline("1F1B", rank, world, codec=CODEC, delta=Delta("int4:g16"), telemetry=telemetry)
    for step in range(2 * BATCHES):
        line.stages[0].samples(ids_of(step))
        line.step(*seen(step))
        if step == BATCHES:
            ids, target = seen(0)
            line.schedule.eval(*(ids,) * line.first, **({"target": target} if line.last else {}))
    telemetry.close()
    return [(f.direction, f.codec, f.bits_per_element, f.snr_db) for f in telemetry.history]
