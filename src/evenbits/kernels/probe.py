"""How long a float layer takes on this machine, against what is to replace it. It takes shapes, not models.

A clock on a shared machine lies in three ways, and each has its answer here. Speed drifts: calls are alternated, in
changing order, inside one process. Other programs take the cores: with one thread the process's own CPU time counts;
with more, CPU time adds up over threads and waits, so the least of many wall times stands instead. The first calls pay
for packing and caches: they are run and not counted. `ratio` compares the 25th percentiles (or the minima); the
quartiles of round-by-round ratios say how far to trust it.
M: rows (tokens), I, O: channels in and out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from evenbits.errors import EvenbitsError

_SAMPLE_SECONDS = 0.001  # shorter calls are repeated: the CPU clock ticks in steps, and a call of it takes time
_WARM_UP, _FEWEST, _MOST = 3, 5, 60
_CONVOLVE = {"Conv1d": F.conv1d, "Conv2d": F.conv2d, "Conv3d": F.conv3d}

Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """What a float layer computes. kind: "Linear" or "Conv1d" … "Conv3d"; weight: [O, I] or [O, I/groups, k…];
    input: of one call, [M, I] or [N, I, …]; stride, padding, dilation: one number per spatial dimension."""

    kind: str
    weight: tuple[int, ...]
    input: tuple[int, ...]
    bias: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def __str__(self) -> str:
        weight, given = ("×".join(map(str, sizes)) for sizes in (self.weight, self.input))
        return f"{self.kind} {weight} on {given}"


@dataclass(frozen=True)
class Speed:
    """What was measured for one shape. seconds: of one call; ratio: float / deployed, above 1 the deployed one wins;
    low, high: quartiles of the rounds' own ratios; clock: "CPU" or "wall"; threads: torch's."""

    float_seconds: float
    deployed_seconds: float
    ratio: float
    low: float
    high: float
    rounds: int
    threads: int
    clock: str

    @property
    def wins(self) -> bool:
        """Whether the deployed operation is faster."""
        return self.ratio > 1

    @property
    def certain(self) -> bool:
        """Whether the middle half of the rounds says the same."""
        return (self.low > 1) == (self.high > 1) == self.wins


@dataclass
class Samples:
    """Seconds of one call each, round by round, one list per competitor. clock: "CPU" or "wall"."""

    seconds: list[list[float]]
    clock: str
    threads: int
    lengths: list[int] = field(default_factory=list)

    def typical(self, index: int) -> float:
        """The 25th percentile of CPU times; the least of wall times."""
        return quantile(self.seconds[index], 0.25) if self.clock == "CPU" else min(self.seconds[index])


def alternate(calls: Sequence[Call], *, seconds: float, most: int = _MOST, device: str = "cpu") -> Samples:
    """Times calls in turns, in an order that changes from round to round, for about `seconds` (a few rounds at least).

    With one torch thread on a CPU it is the process's CPU time, else wall time. Raises EvenbitsError without calls.
    """
    if not calls:
        raise EvenbitsError("there is nothing to time.")
    clock, threads = _clock(device), torch.get_num_threads()
    begin = time.perf_counter()
    lengths = [_warm(call, device, seconds / 4 / len(calls)) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(most):
        if turn >= _FEWEST and time.perf_counter() - begin > seconds:
            break
        for place in range(len(calls)):
            index = (place + turn) % len(calls)
            times[index].append(_timed(calls[index], lengths[index], clock, device))
    return Samples(times, "CPU" if clock is time.process_time else "wall", threads, lengths)


def probe(
    shapes: Iterable[Shape], deployed: Callable[[Shape], Callable[[torch.Tensor], Any]], *, seconds: float = 20.0
) -> dict[Shape, Speed]:
    """Measures each different shape once: torch's float operation against what `deployed` makes for the shape, which
    is called with the same random input. seconds: for all of them together, about.

    Raises EvenbitsError for a kind it does not know.
    """
    unique = list(dict.fromkeys(shapes))
    return {shape: _speed(shape, deployed(shape), min(2.0, seconds / len(unique))) for shape in unique}


@torch.no_grad()
def _speed(shape: Shape, deployed: Callable[[torch.Tensor], Any], seconds: float) -> Speed:
    x = torch.randn(shape.input, dtype=shape.dtype, device=shape.device)
    base = float_operation(shape)
    found = alternate([lambda: base(x), lambda: deployed(x)], seconds=seconds, device=shape.device)
    ratios = [a / b for a, b in zip(*found.seconds, strict=True)]
    ours, theirs = found.typical(1), found.typical(0)
    low, high = quantile(ratios, 0.25), quantile(ratios, 0.75)
    return Speed(theirs, ours, theirs / ours, low, high, len(ratios), found.threads, found.clock)


def float_operation(shape: Shape) -> Callable[[torch.Tensor], torch.Tensor]:
    """torch's own operation for a shape, with random weights. Raises EvenbitsError for a kind it does not know."""
    weight = torch.randn(shape.weight, dtype=shape.dtype, device=shape.device) / shape.weight[1]
    bias = torch.zeros(shape.weight[0], dtype=shape.dtype, device=shape.device) if shape.bias else None
    if shape.kind == "Linear":
        return lambda x: F.linear(x, weight, bias)
    if shape.kind not in _CONVOLVE:
        raise EvenbitsError(f"no float operation for a {shape.kind}; given one of Linear, {', '.join(_CONVOLVE)}.")
    where = (shape.stride or 1, shape.padding or 0, shape.dilation or 1, shape.groups)
    return lambda x: _CONVOLVE[shape.kind](x, weight, bias, *where)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, interpolated."""
    return float(torch.tensor(list(values), dtype=torch.float64).quantile(share))


def _clock(device: str) -> Callable[[], float]:
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _warm(call: Call, device: str, seconds: float) -> int:
    """Runs a call a few times; how many of it make one sample."""
    begin = time.perf_counter()
    once = float("inf")
    for turn in range(_WARM_UP):
        if turn and time.perf_counter() - begin > seconds:
            break
        once = min(once, _timed(call, 1, time.perf_counter, device))  # CPU time would let a call that waits repeat on
    return min(1000, max(1, round(_SAMPLE_SECONDS / max(once, 1e-7))))


def _timed(call: Call, times: int, clock: Callable[[], float], device: str) -> float:
    begin = clock()
    for _ in range(times):
        call()
    if device != "cpu":
        torch.get_device_module(device).synchronize()
    return max(clock() - begin, 1e-9) / times
