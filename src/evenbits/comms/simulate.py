"""How long a step would take: stages × microbatches × schedule × codec over links of some bandwidth and latency.

    cost = Costs.measured("int4:g128/int8:g128", x, forward=0.02, backward=0.04)
    predict("1F1B", stages=64, microbatches=256, cost=cost, net=Network(bandwidth=100e6, latency=0.02)).seconds

What. Every rank runs the program that torch's schedule runs (programs.py): receive, compute, send, with its waits where
torch waits. A transfer starts when sender and receiver have both posted it, the sender knows so, and the link has sent
what was posted before; it takes

    latency + jitter + 8 · bytes / bandwidth                     jitter: exponential with the given mean

Encoding and decoding take the rank's own time, as they do, and so does `Costs.message`, what the engine and the back
end need for a message beside its bytes. Every quantity is a vector over replicas, so that thousands of replicas cost
little more than one; with `stragglers` a share of all (replica, stage) pairs computes `slowdown` times slower. Replicas
wait for each other at the end of the step, and reduce gradients in 2 (R − 1) / R of their bytes (replicas.py has coded
reductions).

Stages on one machine: `Machine.cores` of them work at once at most; those that are ready share the cores evenly, as an
operating system's scheduler makes them. That needs a simulation in the order of time, of one replica. It also knows
better whose turn it is where the stock stage's two directions take turns (up to a tenth of a step).

What it shows that a formula does not: torch's GPipe and 1F1B post a receive only when they need it, so on a slow link
transfers do not hide behind computation, and 1F1B's two directions take turns (gloo announces a receive on the
connection that carries data the same way). `ahead` is CodecStage's remedy; None is the stock stage.

Left out: links shared by several pairs, TCP's slow start, overlap of the gradient reduction with the backward pass.
Sends are buffered by the kernel and do not block, which holds for messages of up to a few MB. Checked against measured
steps, with costs from another run than the measured one: benchmarks/pipeline_traffic.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from evenbits.comms.programs import Act, program
from evenbits.comms.timing import timed
from evenbits.comms.wire import BACKWARD, FORWARD, Edge
from evenbits.errors import EvenbitsError


@dataclass(frozen=True)
class Network:
    """bandwidth: bit per second each way, per link; latency, jitter: seconds per message; burst: bytes that an idle
    link has saved up and sends at once, as a token bucket does (tc tbf).
    """

    bandwidth: float
    latency: float = 0.0
    jitter: float = 0.0
    burst: float = 0.0

    def __post_init__(self) -> None:
        if self.bandwidth <= 0 or min(self.latency, self.jitter, self.burst) < 0:
            raise EvenbitsError(f"bandwidth is above 0, latency, jitter and burst at least 0; given {self}.")


@dataclass(frozen=True)
class Machine:
    """One machine that all stages run on. cores: how many stages work at once at most; together: the speed of each of
    several that work at once, against one alone (they share caches, memory and clock).
    """

    cores: int
    together: float = 1.0

    def __post_init__(self) -> None:
        if self.cores < 1 or not 0 < self.together <= 1:
            raise EvenbitsError(f"a machine has at least 1 core, together lies between 0 and 1; given {self}.")

    def speed(self, busy: int) -> float:
        """Of each of `busy` stages."""
        return 1.0 if busy < 2 else min(1.0, self.cores / busy) * (self.together if self.cores > 1 else 1.0)


@dataclass(frozen=True)
class Costs:
    """One microbatch on one stage: seconds of computation and coding, bytes that travel each way; message: seconds that
    each end of a message works for it, whatever its size.
    """

    forward: float
    backward: float
    forward_bytes: int
    backward_bytes: int
    forward_encode: float = 0.0
    forward_decode: float = 0.0
    backward_encode: float = 0.0
    backward_decode: float = 0.0
    message: float = 0.0

    @staticmethod
    def measured(
        codec: str | Edge, x: torch.Tensor, *, forward: float, backward: float, message: float = 0.0, repeats: int = 5
    ) -> Costs:
        """Costs of a codec on a tensor like x (the activation of one microbatch), timed here; the best of `repeats`."""
        edge = Edge.of(codec)
        there, back = (timed(spec, x, repeats) for spec in (edge.forward[0], edge.backward[0]))
        sizes, coding = (there.nbytes, back.nbytes), (there.encode, there.decode, back.encode, back.decode)
        return Costs(forward, backward, *sizes, *coding, message)

    def work(self, act: Act, pace: float | torch.Tensor) -> float | torch.Tensor:
        """Seconds of the rank's own time that an act takes once it can begin; pace: how many times slower it computes
        than these costs say.
        """
        forward = act.direction == FORWARD
        if act.kind == "compute":
            return pace * (self.forward if forward else self.backward)
        if act.kind == "wait":
            return self.message + (self.forward_decode if forward else self.backward_decode)
        if act.kind == "post send":
            return self.message + (self.forward_encode if forward else self.backward_encode)
        return 0.0


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
    paid: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)

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
        sender = self.costs[receiver - 1 if forward else receiver + 1]
        nbytes = sender.forward_bytes if forward else sender.backward_bytes
        self.arrived[key] = self._sent((receiver, act.direction), nbytes, start) + self._late(now)
        return True

    def _sent(self, link: tuple[int, str], nbytes: int, start: torch.Tensor) -> torch.Tensor:
        """When the last byte has left. A bucket pays at its rate, and may be behind by what it had saved up."""
        start = torch.maximum(start, self.free.get(link, start))
        rate = self.net.bandwidth / 8
        self.paid[link] = torch.maximum(start, self.paid.get(link, start)) + nbytes / rate
        self.free[link] = torch.maximum(start, self.paid[link] - self.net.burst / rate)
        return self.free[link]

    def _late(self, now: torch.Tensor) -> float | torch.Tensor:
        if not self.net.jitter:
            return self.net.latency
        uniform = torch.rand(now.shape, generator=self.generator, dtype=now.dtype)
        return self.net.latency - self.net.jitter * torch.log1p(-uniform)


def _run(world: _World, programs: list[list[Act]], replicas: int) -> list[torch.Tensor]:
    """Runs all programs to their ends, each rank as far as it gets → each rank's time."""
    stages = len(world.costs)
    now = [torch.zeros(replicas, dtype=torch.double) for _ in range(stages)]
    places, ready = [0] * stages, deque(range(stages))
    while ready:
        stage = ready.popleft()
        acts = programs[stage]
        while places[stage] < len(acts):
            act = acts[places[stage]]
            if act.kind == "wait":
                arrival = world.arrived.pop((stage, act.direction, act.microbatch), None)
                if arrival is None:
                    break
                now[stage] = torch.maximum(now[stage], arrival)
            now[stage] = now[stage] + world.costs[stage].work(act, world.pace[stage])
            if act.kind.startswith("post") and world.post(stage, act, now[stage]):
                ready.extend(n for n in (stage - 1, stage + 1) if 0 <= n < stages)
            places[stage] += 1
    if any(place < len(acts) for place, acts in zip(places, programs, strict=True)):
        raise EvenbitsError("the simulated schedule came to a standstill: two stages wait for each other.")
    return now


def _run_shared(world: _World, programs: list[list[Act]], machine: Machine) -> list[torch.Tensor]:
    """The same in the order of time, for one replica whose stages share a machine."""
    clock = 0.0
    left: dict[int, float] = {}
    todo = {stage: deque(acts) for stage, acts in enumerate(programs) if acts}
    ends = [0.0] * len(programs)

    def arrival(stage: int) -> float:
        """When a stage that does not work can go on: now, later, or not before others have worked."""
        act = todo[stage][0]
        known = world.arrived.get((stage, act.direction, act.microbatch))
        return clock if act.kind != "wait" else float("inf") if known is None else max(clock, float(known))

    while todo:
        for stage in todo:
            if stage not in left and arrival(stage) <= clock:
                left[stage] = float(world.costs[stage].work(todo[stage][0], float(world.pace[stage, 0])))
        rate = machine.speed(len(left))
        done = clock + min(left.values(), default=float("inf")) / rate
        then = min([done, *(arrival(stage) for stage in todo if stage not in left)])
        if then == float("inf"):
            raise EvenbitsError("the simulated schedule came to a standstill: two stages wait for each other.")
        left = {stage: work - rate * (then - clock) for stage, work in left.items()}
        clock = then
        for stage in [stage for stage, work in left.items() if work <= 1e-12]:
            del left[stage]
            act, ends[stage] = todo[stage].popleft(), clock
            if act.kind.startswith("post"):
                world.post(stage, act, torch.tensor([clock], dtype=torch.double))
            if not todo[stage]:
                del todo[stage]
    return [torch.tensor([end], dtype=torch.double) for end in ends]


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
    machine: Machine | None = None,
    seed: int = 0,
) -> Prediction:
    """One step. cost: the same for all stages, or one per stage; ahead: as in `program`; gradient_bytes: of one stage,
    as they travel between replicas; machine: the one that all stages run on, None if each has its own.
    Raises EvenbitsError for an unknown schedule, sizes below 1, a wrong number of costs, replicas that share a machine.
    """
    costs = [cost] * stages if isinstance(cost, Costs) else list(cost)
    if len(costs) != stages:
        raise EvenbitsError(f"one Costs for all stages or one for each of {stages}; given {len(costs)}.")
    if min(stages, microbatches, replicas) < 1 or not 0 <= stragglers <= 1:
        raise EvenbitsError("stages, microbatches and replicas are at least 1, stragglers a share from 0 to 1.")
    if machine is not None and replicas > 1:
        raise EvenbitsError(f"stages share a machine in the model of one replica only; given {replicas}.")
    generator = torch.Generator().manual_seed(seed)
    pace = torch.ones(stages, replicas, dtype=torch.double)
    if stragglers:
        pace[torch.rand(stages, replicas, generator=generator) < stragglers] = slowdown
    world = _World(costs, net, pace, generator)
    programs = [program(schedule, stage, stages, microbatches, ahead) for stage in range(stages)]
    ends = torch.stack(_run(world, programs, replicas) if machine is None else _run_shared(world, programs, machine))
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
