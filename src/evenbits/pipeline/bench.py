"""`bench`: a model against the float model it came from and against what else is installed. Same process, in turns.

Latency is measured with all variants side by side in one process (evaluation/latency.py); peak memory with each in a
process of its own (peak.py). A checkpoint without its float model is timed against its own decoded weights: the same
shapes, so the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from evenbits.checkpoints.sources import Source, is_python, open_model
from evenbits.errors import EvenbitsError
from evenbits.evaluation.latency import Call, Latency, forward, is_causal, latencies, machine, one_token, threads_of
from evenbits.evaluation.memory import model_bytes
from evenbits.kernels import report
from evenbits.nn.conv import QConv2d
from evenbits.pipeline.bench_inputs import Inputs, items
from evenbits.pipeline.fuse import fuse
from evenbits.pipeline.peak import Job, Peak, measured_apart
from evenbits.pipeline.peers import peers
from evenbits.pipeline.variants import Variant, decoded, float_variants, on_device, served, to_type

OURS, FUSED, FLOAT = "evenbits", "evenbits byte chains", "float32"


@dataclass(frozen=True)
class SpeedRow:
    """One variant in one task. speedup: over float32 in the same run; throughput: `unit` per second; both by
    medians of CPU time or the least wall time (Latency.typical)."""

    task: str
    batch: int
    threads: int
    variant: str
    latency: Latency
    speedup: float | None
    throughput: float
    unit: str


@dataclass(frozen=True)
class MemoryRow:
    """One variant. weight_bytes: parameters and buffers; peak: None where it was not measured."""

    variant: str
    weight_bytes: int | None
    peak: Peak | None


@dataclass(frozen=True)
class Bench:
    """All that was measured, on what machine, and what was not, with the reason. layers: who computes each quantized
    one; kernels: device → backend and why."""

    model: str
    against: str
    machine: dict[str, Any]
    speed: tuple[SpeedRow, ...]
    memory: tuple[MemoryRow, ...]
    layers: dict[str, str]
    kernels: dict[str, str]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Wish:
    """What to measure. seconds: for each table of variants, about; device: "cpu" or "cuda"."""

    inputs: Inputs
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    seconds: float = 10.0
    device: str = "cpu"
    fuse: bool = True
    peers: bool = True
    memory: bool = True


def bench(
    model: str,
    wish: Wish,
    *,
    against: str | None = None,
    factory: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Bench:
    """Measures what `model` names (one of our checkpoints, or a float model). against: its float model.

    Raises EvenbitsError for what cannot be opened, inputs that do not fit, and a device that is not there.
    """
    if wish.device not in ("cpu", "cuda") or (wish.device == "cuda" and not torch.cuda.is_available()):
        raise EvenbitsError(f"the device is cpu, or cuda where torch finds one; given {wish.device!r}.")
    source = open_model(model, factory=factory)
    source.model.to(wish.device)
    base, name = _base(source, model, against)
    base.to(wish.device)
    notes: list[str] = []
    variants = [*_ours(source, wish, notes), *float_variants(base)]
    speed: list[SpeedRow] = []
    for threads in wish.threads:
        for size in wish.batches:
            say(f"Timing batch {size} with {threads} thread{'s' * (threads > 1)} …")
            speed += _timed(source, variants, base, wish, size, threads, notes)
    rows = _memory(model, factory, against, wish, variants, source.quantized, notes, say)
    kernels = {line.device: f"{line.backend} ({line.reason})" for line in report()}
    by = served(source.model)
    return Bench(model, name, machine(), tuple(speed), tuple(rows), by, kernels, tuple(dict.fromkeys(notes)))


def _base(source: Source, model: str, against: str | None) -> tuple[nn.Module, str]:
    if not source.quantized:
        if against is not None:
            raise EvenbitsError(f"{model} is a float model; --against is for a quantized checkpoint.")
        return source.model, model
    if against is None:
        return decoded(source.model), "its own weights, decoded (the float model: --against)"
    other = open_model(against)
    if other.quantized:
        raise EvenbitsError(f"{against} is quantized; --against takes the float model.")
    return other.model, against


def _ours(source: Source, wish: Wish, notes: list[str]) -> list[Variant]:
    """The quantized model, and its byte chains where convolutions are static. A float model has no variant of ours."""
    if not source.quantized:
        return []
    found = [Variant(OURS, source.model, model_bytes(source.model))]
    static = [m for m in source.model.modules() if isinstance(m, QConv2d) and m.input_scale is not None]
    if not static:
        return found
    if not wish.fuse:
        notes.append("byte chains: not measured (--no-fuse).")
        return found
    batch = on_device(wish.inputs.batch(source, wish.batches[0]), wish.device)
    try:
        fused = fuse(source.model, [batch])
    except EvenbitsError as error:
        notes.append(f"byte chains: not measured ({error}).")
        return found
    notes.append(fused.summary)
    return [*found, Variant(FUSED, fused.model, model_bytes(fused.model))]


def _timed(
    source: Source, variants: list[Variant], base: nn.Module, wish: Wish, size: int, threads: int, notes: list[str]
) -> list[SpeedRow]:
    batch = on_device(wish.inputs.batch(source, size), wish.device)
    others: list[Variant] = []
    if wish.peers and wish.device == "cpu":
        with threads_of(threads):
            others, missing = peers(base, batch)
        notes += missing
    count, unit = items(batch)
    causal = is_causal(source.model) and isinstance(batch, Mapping) and "input_ids" in batch
    runs = {v.name: forward(v.run, to_type(batch, v.dtype)) for v in [*variants, *others]}
    rows = _table("prefill" if causal else "forward", runs, size, threads, wish, count, unit)
    if not causal:
        return rows
    tokens: dict[str, Call] = {}
    for variant in [*variants, *(other for other in others if other.any_shape)]:
        try:
            tokens[variant.name] = one_token(variant.run, batch["input_ids"])
        except EvenbitsError as error:
            notes.append(f"one token, {variant.name}: not measured ({error})")
    if tokens:
        rows += _table("one token", tokens, size, threads, wish, size, "tokens")
    return rows


def _table(
    task: str, calls: Mapping[str, Call], size: int, threads: int, wish: Wish, count: int, unit: str
) -> list[SpeedRow]:
    found = latencies(calls, threads=threads, seconds=wish.seconds, device=wish.device)
    base = found.get(FLOAT)
    return [
        SpeedRow(
            task,
            size,
            threads,
            name,
            latency,
            None if base is None else base.typical / latency.typical,
            count / latency.typical,
            unit,
        )
        for name, latency in found.items()
    ]


def _memory(
    model: str,
    factory: str | None,
    against: str | None,
    wish: Wish,
    variants: list[Variant],
    quantized: bool,
    notes: list[str],
    say: Callable[[str], None],
) -> list[MemoryRow]:
    jobs = _jobs(model, factory, against, wish, quantized) if wish.memory else {}
    if quantized and against is None and wish.memory:
        notes.append("peak memory of the float model: not measured (give it with --against).")
    rows = []
    for variant in variants:
        job = jobs.get(variant.name)
        if job is not None:
            say(f"Measuring the memory of {variant.name} in a process of its own …")
        rows.append(MemoryRow(variant.name, variant.weight_bytes, None if job is None else measured_apart(job)))
    return rows


def _jobs(model: str, factory: str | None, against: str | None, wish: Wish, quantized: bool) -> dict[str, Job]:
    common = (wish.inputs.to_json(), wish.batches, wish.threads[0], wish.device)
    jobs = {}
    if quantized:
        jobs[OURS] = Job(model, factory, *common)
        jobs[FUSED] = Job(model, factory, *common, fused=True)
    if (plain := against if quantized else model) is not None:
        jobs[FLOAT] = Job(plain, None, *common)
        if not is_python(plain):
            jobs["bfloat16"] = Job(plain, None, *common, dtype="bfloat16")
    return jobs
