"""What a process and its children take while they run: resident memory, CPU time, and the GPU beside them.

Memory is the sum of what each process has resident; pages that they share are counted in each. CPU is time used over
time passed: 200 % are two cores busy. A child that comes and goes between two samples is missed. GPU figures are of the
whole device as nvidia-smi tells them, since inside containers process ids do not match.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from evenbits.errors import EvenbitsError, MissingExtraError

_QUERY = "--query-gpu=utilization.gpu,memory.used"
_GPU_SECONDS, _FIRST = 10, 0.1


@dataclass(frozen=True)
class Sample:
    """seconds since the start; cpu: percent of one core; resident: bytes; gpu: percent, of the busiest; gpu_bytes."""

    seconds: float
    cpu: float
    resident: int
    processes: int
    gpu: float | None = None
    gpu_bytes: int | None = None


@dataclass
class Timeline:
    """Samples of one command. ended: its exit code, "stopped", or "running" (a process that was only followed)."""

    command: str
    interval: float
    gpu: str
    samples: list[Sample] = field(default_factory=list)
    ended: int | str = "running"

    @property
    def peak(self) -> Sample | None:
        """The sample with most resident memory."""
        return max(self.samples, key=lambda sample: sample.resident, default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain data with the peaks in front."""
        peak, rows = self.peak, self.samples
        gpu = [row.gpu_bytes for row in rows if row.gpu_bytes is not None]
        return {
            "peak_resident_bytes": None if peak is None else peak.resident,
            "peak_gpu_bytes": max(gpu, default=None),
            "mean_cpu_percent": sum(row.cpu for row in rows) / len(rows) if rows else None,
            "seconds": rows[-1].seconds if rows else 0.0,
            **asdict(self),
        }


def library() -> Any:
    """The psutil package, or MissingExtraError."""
    try:
        return importlib.import_module("psutil")
    except ModuleNotFoundError as error:
        if error.name != "psutil":
            raise
        raise MissingExtraError("psutil", "monitor", "monitoring a process") from error


class Sampler:
    """Samples a process and everything it started. Raises EvenbitsError if there is no such process."""

    def __init__(self, pid: int) -> None:
        self._psutil = library()
        try:
            self._root = self._psutil.Process(pid)
        except (self._psutil.NoSuchProcess, ValueError) as error:
            raise EvenbitsError(f"there is no process {pid} to monitor.") from error
        self._nvidia = shutil.which("nvidia-smi")
        self._start = self._before = time.perf_counter()
        # A process is known by number and start: numbers are used again.
        self._used: dict[tuple[int, float], float] = {}
        self._take()

    @property
    def gpu(self) -> str:
        """Whether the GPU is seen, in words."""
        return "whole device, by nvidia-smi" if self._nvidia else "none seen (no nvidia-smi)"

    def sample(self) -> Sample | None:
        """A sample of now, or None if the process has ended."""
        now = time.perf_counter()
        busy, resident, count = self._take()
        if not count:
            return None
        cpu = 100 * busy / max(now - self._before, 1e-6)
        self._before = now
        return Sample(now - self._start, cpu, resident, count, *self._gpu())

    def family(self) -> list[Any]:
        """The process and its descendants that are there now."""
        try:
            return [self._root, *self._root.children(recursive=True)]
        except self._psutil.Error:
            return []

    def _take(self) -> tuple[float, int, int]:
        busy, resident, count = 0.0, 0, 0
        for process in self.family():
            try:
                with process.oneshot():
                    if process.status() == self._psutil.STATUS_ZOMBIE:
                        continue
                    times, key = process.cpu_times(), (process.pid, process.create_time())
                    resident += process.memory_info().rss
            except self._psutil.Error:
                continue  # it ended in between
            used = times.user + times.system
            busy += used - self._used.get(key, 0.0 if self._used else used)
            self._used[key] = used
            count += 1
        return busy, resident, count

    def _gpu(self) -> tuple[float | None, int | None]:
        if self._nvidia is None:
            return None, None
        command = [self._nvidia, _QUERY, "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_GPU_SECONDS, check=True)
            rows = [[float(cell) for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
        except (OSError, subprocess.SubprocessError, ValueError):
            return None, None
        return (max(r[0] for r in rows), int(sum(r[1] for r in rows) * 2**20)) if rows else (None, None)


def follow(sampler: Sampler, timeline: Timeline, wait: Callable[[float], bool], tell: Callable[[Sample], None]) -> None:
    """Adds samples to `timeline` until the process ends or `wait` (seconds to wait; whether to stop) says so."""
    if wait(min(_FIRST, timeline.interval)):  # CPU time ticks in hundredths: no share of no time
        return
    while (sample := sampler.sample()) is not None:
        timeline.samples.append(sample)
        tell(sample)
        if wait(timeline.interval):
            return
