"""Does a coded reduction of gradients pay off? A model of comms/ddp.py, fed with codecs timed on this machine.

    plan_replicas(["int8:g128"], parameters=7_000_000, net=Network(1e9), replicas=Replicas(4), feedback=True)

What. P gradients in T tensors on W replicas; g of them on one machine share its link and its cores, S is the size of
all codes. Bytes that leave a machine, each step:

    uncoded (ring all-reduce)       2 (W − 1) / W · 4 P
    coded   (all-to-all)            g (W − g) / W · S        a machine's replicas send to all replicas elsewhere
            (ring all-gather)         (W − 1) / W · S

A rank's own work for a coded reduction: encode P, decode and add the W slices it was sent (P), encode the mean of its
slice (P / W), decode all means (P), and with error feedback decode what it sent (P again) and keep the difference. g
ranks that share fewer cores take g / cores times as long. Codecs are timed on slices of P / (T W) elements, because
with many small tensors a call costs more than its elements. The uncoded reduction adds and copies.

So a codec that pays off on a pipeline's link may not pay off here: every gradient is coded once and decoded twice or
three times, on cores that all ranks of a machine share. Checked against the measured table of docs/wire.md.

Left out: overlap with the backward pass, which the uncoded reduction has in models of several buckets and the hook does
not; small tensors that travel uncoded; links shared by several machines.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evenbits.comms.codecs import get
from evenbits.comms.plan import Offer
from evenbits.comms.simulate import Network
from evenbits.comms.timing import Timing, break_even, timed
from evenbits.errors import EvenbitsError

CODECS = ("fp16", "int8:g128", "int4:g128")


@dataclass(frozen=True)
class Replicas:
    """count: of replicas; per_machine: how many of them share a machine's link and its cores."""

    count: int
    per_machine: int = 1
    cores: int = 1

    def __post_init__(self) -> None:
        if self.count < 2 or self.cores < 1 or self.per_machine < 1 or self.count % self.per_machine:
            raise EvenbitsError(
                "gradients are reduced between at least 2 replicas, equally many on every machine, with 1 core or "
                f"more; given {self}."
            )

    @property
    def crowding(self) -> float:
        """How many times longer a rank's work takes because others share its cores."""
        return max(1.0, self.per_machine / self.cores)


@dataclass(frozen=True)
class Reduction:
    """One reduction: bytes that leave a machine, seconds of each rank's work (crowding counted)."""

    nbytes: float
    work: float

    def seconds(self, net: Network, replicas: Replicas) -> float:
        """Work and link one after the other, as the hook does them; 2 (W − 1) messages one after the other."""
        return self.work + 8 * self.nbytes / net.bandwidth + 2 * (replicas.count - 1) * (net.latency + net.jitter)


def uncoded(parameters: int, replicas: Replicas, *, add: float) -> Reduction:
    """An all-reduce of float32. add: seconds to add or copy one vector of all parameters."""
    share = (replicas.count - 1) / replicas.count
    leaves = 0.0 if replicas.per_machine == replicas.count else 2 * share * 4 * parameters
    return Reduction(leaves, 2 * share * add * replicas.crowding)


def coded(one: Timing, tensors: int, replicas: Replicas, *, add: float, feedback: bool) -> Reduction:
    """QuantizedReduce. one: a codec, timed on one slice of one tensor."""
    world, group = replicas.count, replicas.per_machine
    whole = tensors * world * one.nbytes
    decodes = (3 if feedback else 2) * world
    work = tensors * ((world + 1) * one.encode + decodes * one.decode) + (6 if feedback else 3) * add
    leaves = 0.0 if group == world else (group * (world - group) + world - 1) / world * whole
    return Reduction(leaves, work * replicas.crowding)


def _adding(parameters: int, repeats: int) -> float:
    """Seconds to add one vector of that many float32 to another; the best of `repeats`."""
    x, y, laps = torch.zeros(parameters), torch.ones(parameters), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        x.add_(y)
        laps.append(time.perf_counter() - start)
    return min(laps[1:])


def plan_replicas(
    codecs: Sequence[str],
    *,
    parameters: int,
    net: Network,
    replicas: Replicas,
    tensors: int = 1,
    feedback: bool = False,
    compute: float = 0.0,
    repeats: int = 5,
) -> list[Offer]:
    """One offer per codec, the uncoded reduction ("raw") first. parameters: all of a replica's, in `tensors` tensors of
    equal size; compute: seconds of forward, backward and optimizer of a step. Offer.encode and .decode: one rank's
    seconds in a step; .bits: per parameter and coding; .break_even: bandwidth of a machine's link.

    Raises EvenbitsError for unknown codecs and for sizes that make no reduction.
    """
    slices = tensors * replicas.count
    if not 0 < slices <= parameters <= 1 << 31 or compute < 0:
        raise EvenbitsError(
            f"every replica owns a slice of each of {tensors} tensors: between {slices} and 2^31 parameters; and a "
            f"step computes for 0 s or more; given {parameters} parameters, {compute} s."
        )
    names = [name for name in codecs if name != "raw"]
    for name in names:
        get(name)
    x = torch.randn(-(-parameters // slices), generator=torch.Generator().manual_seed(0))
    add = _adding(parameters, repeats)
    plain = uncoded(parameters, replicas, add=add)
    base = compute + plain.seconds(net, replicas)
    offers = [Offer("raw", 32.0, 0.0, 0.0, 0.0, base, 1.0)]
    for name in names:
        one = timed(name, x, repeats)
        made = coded(one, tensors, replicas, add=add, feedback=feedback)
        step = compute + made.seconds(net, replicas)
        encode, decode = tensors * (replicas.count + 1) * one.encode, (3 if feedback else 2) * slices * one.decode
        limit = break_even(Timing(made.work, 0.0, round(made.nbytes)), Timing(plain.work, 0.0, round(plain.nbytes)))
        even = None if limit == float("inf") else limit
        offers.append(Offer(name, 8 * one.nbytes / x.numel(), encode, decode, even, step, base / step))
    return offers
