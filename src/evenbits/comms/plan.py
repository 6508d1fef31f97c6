"""Is a codec worth it on my link? Timed on this machine, then put through the model of a step (simulate.py).

    plan(["raw", "int8:g128"], shape=(8, 128, 512), net=Network(bandwidth=1e9), stages=4, microbatches=16)

Two answers per codec. The break-even bandwidth needs nothing but the codec: below it, encoding + link + decoding of one
tensor takes less time than the link alone takes uncoded. The step time also counts what the schedule overlaps and what
it waits for; it needs the time a stage computes, which the user gives (0: link and codecs only).

The tensor is Gaussian with a fixed seed. Times of codecs depend on it little, except for top-k's index set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from evenbits.comms.simulate import Costs, Machine, Network, predict
from evenbits.comms.timing import Timing, break_even, timed
from evenbits.comms.wire import Edge
from evenbits.errors import EvenbitsError

CODECS = ("fp16", "int8:g128", "int4:g128", "int4:g128/int8:g128", "multi6x4", "top0.1+int8:g128")
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_MOST = 1 << 28  # elements: a gigabyte in float32


@dataclass(frozen=True)
class Offer:
    """One codec. bits: per element, both directions' mean, trailers included; encode, decode: seconds, both directions
    together; break_even: bit per second, None if it pays off on any link; step: predicted seconds.
    """

    codec: str
    bits: float
    encode: float
    decode: float
    break_even: float | None
    step: float
    speedup: float


def parse_link(text: str) -> float:
    """ "1Gbit", "100 Mbit/s", "25e6" → bit per second. Raises EvenbitsError for anything else, bytes included."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*(?:([kmgt])?(?:bit|b)(?:/s|ps)?)?", text.strip(), re.IGNORECASE)
    try:
        rate = float(found[1]) * _UNITS.get((found[2] or "").lower(), 1.0) if found else 0.0
    except ValueError:
        rate = 0.0
    if rate <= 0 or (found and re.search(r"B(?:/s|ps)?$", text.strip())):
        raise EvenbitsError(
            f"a link is given in bits, such as 1Gbit, 100Mbit or 25e6 (bit per second); given {text!r}."
        )
    return rate


def parse_shape(text: str) -> tuple[int, ...]:
    """ "8x128x512" → (8, 128, 512). Raises EvenbitsError for anything else and for more than 2^28 elements."""
    if not re.fullmatch(r"[0-9]+(x[0-9]+)*", text):
        raise EvenbitsError(f"a shape is sizes joined by x, such as 8x128x512; given {text!r}.")
    shape = tuple(map(int, text.split("x")))
    if not 0 < prod(shape) <= _MOST:
        raise EvenbitsError(f"a shape has between 1 and {_MOST:,} elements; {text} has {prod(shape):,}.")
    return shape


def plan(
    codecs: Sequence[str],
    *,
    shape: tuple[int, ...],
    net: Network,
    stages: int = 2,
    microbatches: int = 8,
    schedule: str = "1F1B",
    compute: float = 0.0,
    replicas: int = 1,
    parameters: int = 0,
    stragglers: float = 0.0,
    slowdown: float = 2.0,
    machine: Machine | None = None,
    repeats: int = 5,
) -> list[Offer]:
    """One offer per codec, "raw" first. shape: of the activation of one microbatch; compute: seconds of its forward
    pass on one stage, the backward pass is taken as twice that; parameters: of one stage, whose gradients replicas of
    the pipeline reduce uncoded (replicas.py plans that); stragglers, slowdown, machine: as `predict` takes them.

    Raises EvenbitsError for unknown codecs and schedules and for sizes that make no pipeline.
    """
    if stages < 2 or compute < 0:
        raise EvenbitsError(
            f"a pipeline has at least 2 stages and computes for 0 s or more; given {stages}, {compute}."
        )
    edges = [Edge.of(codec) for codec in ("raw", *(c for c in codecs if c != "raw"))]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    names = [name for edge in edges for name in (edge.forward[0], edge.backward[0])]
    timings = {name: timed(name, x, repeats) for name in dict.fromkeys(names)}
    offers: list[Offer] = []
    world = {"replicas": replicas, "stragglers": stragglers, "slowdown": slowdown, "machine": machine}
    line = {"stages": stages, "microbatches": microbatches, "gradient_bytes": 4 * parameters, "ahead": 1}
    for edge in edges:
        there, back = timings[edge.forward[0]], timings[edge.backward[0]]
        coding = (there.encode, there.decode, back.encode, back.decode)
        cost = Costs(compute, 2 * compute, there.nbytes, back.nbytes, *coding)
        step = predict(schedule, cost=cost, net=net, **line, **world).seconds  # type: ignore[arg-type]
        whole = Timing(there.encode + back.encode, there.decode + back.decode, there.nbytes + back.nbytes)
        offers.append(_offer(_name(edge), whole, timings["raw"], x.numel(), step, offers))
    return offers


def _name(edge: Edge) -> str:
    """The shorter spelling where both directions have one codec."""
    return edge.forward[0] if edge.forward[:1] == edge.backward[:1] else f"{edge.forward[0]}/{edge.backward[0]}"


def _offer(name: str, whole: Timing, raw: Timing, numel: int, step: float, before: list[Offer]) -> Offer:
    limit = break_even(whole, Timing(2 * raw.encode, 2 * raw.decode, 2 * raw.nbytes))
    return Offer(
        codec=name,
        bits=8 * whole.nbytes / (2 * numel),
        encode=whole.encode,
        decode=whole.decode,
        break_even=None if limit == float("inf") else limit,
        step=step,
        speedup=before[0].step / step if before else 1.0,
    )
