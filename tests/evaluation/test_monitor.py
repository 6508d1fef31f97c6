"""Sampling real processes: memory that is taken is seen, children count, an ended process is an end, not an error."""

from __future__ import annotations

import importlib
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evenbits.errors import EvenbitsError, MissingExtraError
from evenbits.evaluation.monitor import Sample, Sampler, Timeline, follow

MEGABYTE = 2**20


@pytest.fixture
def started() -> Iterator[Any]:
    running: list[subprocess.Popen[bytes]] = []

    def start(code: str) -> subprocess.Popen[bytes]:
        running.append(subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def ready(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None and process.stdout.readline().strip() == b"ready"


def test_memory_of_children_counts_and_an_end_is_none(started: Any) -> None:
    child = f"x = b'1' * {80 * MEGABYTE}; print('ready', flush=True); input()"
    process = started(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    ready(process)
    sampler = Sampler(process.pid)
    sample = sampler.sample()
    assert sample is not None and sample.processes == 2 and sample.resident > 80 * MEGABYTE
    assert len(sampler.family()) == 2
    process.stdin.write(b"\n")
    process.stdin.flush()
    process.wait(timeout=10)
    assert sampler.sample() is None and sampler.family() == []


def test_a_busy_process_uses_cpu_and_a_sleeping_one_does_not(started: Any) -> None:
    busy = started("print('ready', flush=True)\nwhile True: pass")
    idle = started("print('ready', flush=True); input()")
    shares = []
    for process in (busy, idle):
        ready(process)
        sampler = Sampler(process.pid)
        time.sleep(0.5)
        sample = sampler.sample()
        assert sample is not None
        shares.append(sample.cpu)
    assert shares[0] > 15 and shares[1] < 5 and shares[0] < 150


def test_no_such_process() -> None:
    with pytest.raises(EvenbitsError, match="no process"):
        Sampler(2**22 + 5)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)  # importing it raises ModuleNotFoundError
    with pytest.raises(MissingExtraError, match=r"evenbits\[monitor\]"):
        Sampler(os.getpid())


@pytest.mark.parametrize(
    "words, gpu, nbytes",
    [("7, 100\n45, 28", 45.0, 128 * MEGABYTE), ("No devices were found", None, None)],
)
def test_gpu_figures_are_read_from_nvidia_smi(
    words: str, gpu: float | None, nbytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!{sys.executable}\nprint({words!r})\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    sampler = Sampler(os.getpid())
    sample = sampler.sample()
    assert "nvidia-smi" in sampler.gpu
    assert sample is not None and (sample.gpu, sample.gpu_bytes) == (gpu, nbytes)


def test_without_nvidia_smi_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sampler = Sampler(os.getpid())
    assert "none seen" in sampler.gpu
    sample = sampler.sample()
    assert sample is not None and sample.gpu is None and sample.gpu_bytes is None


def test_following_ends_when_asked(started: Any) -> None:
    sampler = Sampler(os.getpid())
    timeline, seen = Timeline("me", 0.01, sampler.gpu), []
    turns = iter([False, False, False, True])
    follow(sampler, timeline, lambda _: next(turns), seen.append)
    assert len(timeline.samples) == 3 and seen == timeline.samples


def test_peaks_are_in_the_json() -> None:
    samples = [Sample(0.0, 10.0, 5, 1), Sample(1.0, 30.0, 9, 2, 50.0, 7), Sample(2.0, 20.0, 4, 1, 10.0, 3)]
    found = Timeline("x", 1.0, "", samples).to_json()
    assert found["peak_resident_bytes"] == 9 and found["peak_gpu_bytes"] == 7
    assert found["mean_cpu_percent"] == 20.0 and found["seconds"] == 2.0 and len(found["samples"]) == 3
    empty = Timeline("x", 1.0, "").to_json()
    assert empty["peak_resident_bytes"] is None and empty["mean_cpu_percent"] is None
    assert importlib.import_module("json").dumps(found)
