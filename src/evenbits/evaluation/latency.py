"""How long a forward takes: several models in turns inside one process, with medians, quartiles and the clock named.

Which clock, and why turns, is in kernels/probe.py: CPU time with one thread, wall time with more or on another device.
For a causal language model there are two figures: a prefill, and one token behind a cache. The cache is cut back to its
length after each token, so that every call does the same work; cutting makes views and is part of the time.
"""

from __future__ import annotations

import inspect
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evenbits.errors import EvenbitsError
from evenbits.kernels.probe import alternate, quantile

Call = Callable[[], Any]


@dataclass(frozen=True)
class Latency:
    """Seconds of one call: median, quartiles, least, of how many samples, with what clock and how many threads."""

    median: float
    low: float
    high: float
    least: float
    samples: int
    clock: str
    threads: int

    @property
    def typical(self) -> float:
        """What to compare: the median of CPU times; the least of wall times, whose median tells of other programs."""
        return self.median if self.clock == "CPU" else self.least


def latencies(calls: Mapping[str, Call], *, threads: int, seconds: float, device: str = "cpu") -> dict[str, Latency]:
    """Times named calls in turns with `threads` torch threads, for about `seconds` in all."""
    with threads_of(threads), torch.inference_mode():
        found = alternate(list(calls.values()), seconds=seconds, device=device)
    return {
        name: Latency(
            median=quantile(times, 0.5),
            low=quantile(times, 0.25),
            high=quantile(times, 0.75),
            least=min(times),
            samples=len(times),
            clock=found.clock,
            threads=threads,
        )
        for name, times in zip(calls, found.seconds, strict=True)
    }


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """So many torch threads inside the block. Raises EvenbitsError for less than one."""
    if count < 1:
        raise EvenbitsError(f"at least one thread; given {count}.")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forward(model: Callable[..., Any], batch: Any) -> Call:
    """One forward of a batch: a tensor, positional arguments or keyword arguments."""
    if isinstance(batch, Mapping):
        return lambda: model(**batch)
    return (lambda: model(*batch)) if isinstance(batch, (tuple, list)) else (lambda: model(batch))


def is_causal(model: Any) -> bool:
    """Whether a model writes text token by token, with a cache (transformers' word for it)."""
    return bool(getattr(model, "can_generate", lambda: False)())


@torch.inference_mode()
def one_token(model: Callable[..., Any], ids: torch.Tensor) -> Call:
    """One token of each sequence behind a cache of `ids` [B, T]. Raises EvenbitsError if the cache cannot be cut."""
    word = _cache_word(model)
    cache = getattr(model(input_ids=ids, use_cache=True), word)
    if not hasattr(cache, "crop"):
        raise EvenbitsError(f"a {type(cache).__name__} cannot be cut back: one token cannot be timed again and again.")
    last = ids[:, -1:]

    def call() -> Any:
        answer = model(input_ids=last, use_cache=True, **{word: cache})
        cache.crop(-1)  # the one token off again
        return answer

    return call


def _cache_word(model: Callable[..., Any]) -> str:
    """What a model calls its cache: "cache" from transformers 5.24 on, where the older word is a deprecated one."""
    parameters = inspect.signature(getattr(getattr(model, "_orig_mod", model), "forward", model)).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def machine() -> dict[str, Any]:
    """Processor, cores and versions, as plain data."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "vnni": torch.cpu._is_vnni_supported(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": str(torch.__version__),
    }
