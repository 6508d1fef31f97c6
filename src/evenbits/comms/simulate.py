"""How long a step would take: stages × microbatches × schedule × codec over links of some bandwidth and latency.

    cost = Costs.measured("int4:g128/int8:g128", shape, forward=0.02, backward=0.04)
    predict("1F1B", stages=64, microbatches=256, cost=cost, net=Network(bandwidth=100e6, latency=0.02)).seconds

What. Every rank runs the program that torch's schedule runs: receive, compute, send, with its waits where torch waits.
A transfer starts when sender and receiver have both posted it, the sender knows so, and the link has sent what was
posted before; it takes

    latency + jitter + 8 · bytes / bandwidth                     jitter: exponential with the given mean

Encoding and decoding take the rank's own time, as they do. Every quantity is a vector over replicas, so that thousands
of replicas cost little more than one; with `stragglers` a share of all (replica, stage) pairs computes `slowdown` times
slower. Replicas wait for each other at the end of the step, and reduce gradients in 2 (R − 1) / R of their bytes.

What it shows that a formula does not: torch's GPipe and 1F1B post a receive only when they need it, so on a slow link
transfers do not hide behind computation, and 1F1B's two directions take turns (gloo announces a receive on the
connection that carries data the same way). `ahead` is CodecStage's remedy; None is the stock stage.

Left out: links shared by several pairs, TCP's slow start, overlap of the gradient reduction with the backward pass,
schedules with several stages per rank. Sends are buffered by the kernel and do not block, which holds for messages of
up to a few MB. Checked against measured steps: benchmarks/pipeline_traffic.py.

Break-even. A codec pays off on a link slower than 8 · (bytes saved) / (encode + decode seconds): `break_even`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.wire import BACKWARD, FORWARD, TRAILER, Edge
from evenbits.errors import EvenbitsError

SCHEDULES = ("GPipe", "1F1B")


@dataclass(frozen=True)
class Network:
    """bandwidth: bit per second each way, per link; latency, jitter: seconds per message."""

    bandwidth: float
    latency: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.bandwidth <= 0 or self.latency < 0 or self.jitter < 0:
            raise EvenbitsError(f"bandwidth is above 0, latency and jitter at least 0; given {self}.")


@dataclass(frozen=True)
class Costs:
    """One microbatch on one stage: seconds of computation and coding, bytes that travel each way."""

    forward: float
    backward: float
    forward_bytes: int
    backward_bytes: int
    forward_encode: float = 0.0
    forward_decode: float = 0.0
    backward_encode: float = 0.0
    backward_decode: float = 0.0

    @staticmethod
    def measured(codec: str | Edge, x: torch.Tensor, *, forward: float, backward: float, repeats: int = 5) -> Costs:
        """Costs of a codec on a tensor like x (the activation of one microbatch), timed here; the best of `repeats`."""
        edge = Edge.of(codec)
        there, back = (timed(spec, x, repeats) for spec in (edge.forward[0], edge.backward[0]))
        return Costs(forward, backward, there.nbytes, back.nbytes, there.encode, there.decode, back.encode, back.decode)


class Timing(NamedTuple):
    """Seconds to encode and decode one tensor, bytes of its message."""

    encode: float
    decode: float
    nbytes: int


def timed(spec: str, x: torch.Tensor, repeats: int = 5) -> Timing:
    """A codec on x, timed on this machine: the best of `repeats`, after one call that is not counted."""
    codec, meta = get(spec), Meta.of(x)
    payload, encode, decode = codec.encode(x), [], []
    codec.decode(payload, meta)
    for _ in range(max(1, repeats)):
        start = time.perf_counter()
        payload = codec.encode(x)
        middle = time.perf_counter()
        codec.decode(payload, meta)
        encode.append(middle - start)
        decode.append(time.perf_counter() - middle)
    return Timing(min(encode), min(decode), payload.numel() + TRAILER)


def break_even(mine: Timing, other: Timing) -> float:
    """Bit per second below which one codec moves a tensor faster than another (both `timed` on it): infinite if it is
    both smaller and quicker to code, 0 if it is not smaller.
    """
    saved, extra = other.nbytes - mine.nbytes, mine.encode + mine.decode - other.encode - other.decode
    if saved <= 0:
        return 0.0
    return 8 * saved / extra if extra > 0 else float("inf")


@dataclass(frozen=True)
class Prediction:
    """seconds: of the step, all replicas together. compute: share of it that the busiest stage computes; coding: share
    it encodes and decodes; waiting: the rest, links and bubbles.
    """

    seconds: float
    compute: float
    coding: float
    waiting: float
    replicas: torch.Tensor


class Act(NamedTuple):
    """One line of a rank's program. kind: "compute", "post send", "post receive", "wait"; the message is named by
    direction and microbatch.
    """

    kind: str
    direction: str
    microbatch: int


def program(schedule: str, stage: int, stages: int, microbatches: int, ahead: int | None = None) -> list[Act]:
    """What torch's schedule does on one rank, in order (pipelining/schedules.py); ahead: CodecStage's, None without."""
    if schedule not in SCHEDULES:
        raise EvenbitsError(f"schedules that can be predicted: {', '.join(SCHEDULES)}; given {schedule!r}.")
    acts = list(_gpipe(microbatches) if schedule == "GPipe" else _1f1b(microbatches, stages - stage))
    if ahead is not None:
        acts = _posted_ahead(acts, microbatches, ahead)
    first, last = stage == 0, stage == stages - 1

    def exists(act: Act) -> bool:
        receives, forward = act.kind in ("post receive", "wait"), act.direction == FORWARD
        nothing = (first if receives else last) if forward else (last if receives else first)
        return act.kind == "compute" or not nothing

    return [act for act in acts if exists(act)]


def _posted_ahead(acts: list[Act], microbatches: int, ahead: int) -> list[Act]:
    """Receives that the stage posts itself: before the send that the schedule posts with them, and for `ahead` more."""
    made: list[Act] = []
    posted: set[tuple[str, int]] = set()
    for act in acts:
        if act.kind != "post receive":
            made.append(act)
            continue
        at = len(made) - 1 if made and made[-1].kind == "post send" else len(made)
        for m in range(act.microbatch, min(act.microbatch + ahead, microbatches - 1) + 1):
            if (act.direction, m) not in posted:
                posted.add((act.direction, m))
                made.insert(at, Act("post receive", act.direction, m))
                at += 1
    return made


def _gpipe(microbatches: int) -> Iterator[Act]:
    for direction in (FORWARD, BACKWARD):
        for m in range(microbatches):
            yield Act("post receive", direction, m)
            yield Act("wait", direction, m)
            yield Act("compute", direction, m)
            yield Act("post send", direction, m)


def _1f1b(microbatches: int, warmup: int) -> Iterator[Act]:
    forward = backward = 0
    for forward in range(min(warmup, microbatches)):
        if forward:
            yield Act("post send", FORWARD, forward - 1)
        yield Act("post receive", FORWARD, forward)
        yield Act("wait", FORWARD, forward)
        yield Act("compute", FORWARD, forward)
    forward += 1
    # The last send of the warm-up is posted together with the first receive of a gradient.
    yield Act("post send", FORWARD, forward - 1)
    while backward < microbatches:
        yield Act("post receive", BACKWARD, backward)
        yield Act("wait", BACKWARD, backward)
        yield Act("compute", BACKWARD, backward)
        yield Act("post send", BACKWARD, backward)
        backward += 1
        if forward < microbatches:
            yield Act("post receive", FORWARD, forward)
            yield Act("wait", FORWARD, forward)
            yield Act("compute", FORWARD, forward)
            yield Act("post send", FORWARD, forward)
            forward += 1


@dataclass
class _World:
    """The state of a simulated step; times are vectors over replicas."""

    costs: Sequence[Costs]
    net: Network
    pace: torch.Tensor  # [stages, replicas], how many times slower than `cost` each stage computes
    generator: torch.Generator
    posted: dict[tuple[int, str, int], torch.Tensor] = field(default_factory=dict)
    arrived: dict[tuple[int, str, int], torch.Tensor] = field(default_factory=dict)
    free: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)

    def post(self, stage: int, act: Act, now: torch.Tensor) -> bool:
        """One end posts a message; once both have, it is on its way. Whether its arrival is now known."""
        forward, sends = act.direction == FORWARD, act.kind == "post send"
        receiver = stage if not sends else stage + 1 if forward else stage - 1
        key = (receiver, act.direction, act.microbatch)
        if not sends:
            # gloo announces the receive on the connection of the pair, behind the data that already goes that way.
            back = (stage - 1, BACKWARD) if forward else (stage + 1, FORWARD)
            if back in self.free:
                now = torch.maximum(now, self.free[back])
            now = now + self.net.latency
        other = self.posted.pop(key, None)
        if other is None:
            self.posted[key] = now
            return False
        start = torch.maximum(now, other)
        link = (receiver, act.direction)
        if link in self.free:
            start = torch.maximum(start, self.free[link])
        sender = self.costs[receiver - 1 if forward else receiver + 1]
        nbytes = sender.forward_bytes if forward else sender.backward_bytes
        self.free[link] = start + 8 * nbytes / self.net.bandwidth
        late = self.net.latency
        if self.net.jitter:
            uniform = torch.rand(now.shape, generator=self.generator, dtype=now.dtype)
            self.arrived[key] = self.free[link] + late - self.net.jitter * torch.log1p(-uniform)
        else:
            self.arrived[key] = self.free[link] + late
        return True


def _run(world: _World, programs: list[list[Act]], now: list[torch.Tensor]) -> list[torch.Tensor]:
    """Runs all programs to their ends; `now` starts at zero and ends at each rank's time."""
    stages = len(world.costs)
    places, ready = [0] * stages, deque(range(stages))
    while ready:
        stage = ready.popleft()
        acts, cost = programs[stage], world.costs[stage]
        while places[stage] < len(acts):
            act = acts[places[stage]]
            forward = act.direction == FORWARD
            if act.kind == "compute":
                now[stage] = now[stage] + world.pace[stage] * (cost.forward if forward else cost.backward)
            elif act.kind == "wait":
                arrival = world.arrived.pop((stage, act.direction, act.microbatch), None)
                if arrival is None:
                    break
                now[stage] = torch.maximum(now[stage], arrival) + (
                    cost.forward_decode if forward else cost.backward_decode
                )
            else:
                if act.kind == "post send":
                    now[stage] = now[stage] + (cost.forward_encode if forward else cost.backward_encode)
                if world.post(stage, act, now[stage]):
                    ready.extend(n for n in (stage - 1, stage + 1) if 0 <= n < stages)
            places[stage] += 1
    if any(place < len(acts) for place, acts in zip(places, programs, strict=True)):
        raise EvenbitsError("the simulated schedule came to a standstill: two stages wait for each other.")
    return now


def predict(
    schedule: str,
    *,
    stages: int,
    microbatches: int,
    cost: Costs | Sequence[Costs],
    net: Network,
    replicas: int = 1,
    stragglers: float = 0.0,
    slowdown: float = 2.0,
    gradient_bytes: int = 0,
    ahead: int | None = None,
    seed: int = 0,
) -> Prediction:
    """One step. cost: the same for all stages, or one per stage; ahead: as in `program`; gradient_bytes: of one stage,
    as they travel between replicas. Raises EvenbitsError for an unknown schedule, sizes below 1 and a wrong number of
    costs.
    """
    costs = [cost] * stages if isinstance(cost, Costs) else list(cost)
    if len(costs) != stages:
        raise EvenbitsError(f"one Costs for all stages or one for each of {stages}; given {len(costs)}.")
    if min(stages, microbatches, replicas) < 1 or not 0 <= stragglers <= 1:
        raise EvenbitsError("stages, microbatches and replicas are at least 1, stragglers a share from 0 to 1.")
    generator = torch.Generator().manual_seed(seed)
    pace = torch.ones(stages, replicas, dtype=torch.double)
    if stragglers:
        pace[torch.rand(stages, replicas, generator=generator) < stragglers] = slowdown
    world = _World(costs, net, pace, generator)
    programs = [program(schedule, stage, stages, microbatches, ahead) for stage in range(stages)]
    ends = torch.stack(_run(world, programs, [torch.zeros(replicas, dtype=torch.double) for _ in range(stages)]))
    seconds = float(ends.max())
    if replicas > 1:
        seconds += 2 * (replicas - 1) / replicas * 8 * gradient_bytes / net.bandwidth + 2 * net.latency
    busy = [microbatches * (c.forward + c.backward) for c in costs]
    codes = [_coding(c, stage, stages) * microbatches for stage, c in enumerate(costs)]
    whole = max(seconds, 1e-300)
    busiest = max(range(stages), key=lambda stage: busy[stage] + codes[stage])
    compute, coding = float(pace[busiest].max()) * busy[busiest] / whole, codes[busiest] / whole
    return Prediction(seconds, compute, coding, max(0.0, 1 - compute - coding), ends.max(0).values)


def _coding(cost: Costs, stage: int, stages: int) -> float:
    """Seconds one stage codes per microbatch."""
    after = cost.forward_encode + cost.backward_decode if stage < stages - 1 else 0.0
    before = cost.forward_decode + cost.backward_encode if stage > 0 else 0.0
    return after + before
