"""Runs the points of a sweep, here or in several processes, and keeps what is finished whatever happens to the others.

A process is spawned (not forked: torch's threads do not survive a fork), opens its own bench and takes one point after
the other. It writes each finished point itself, so that nothing is lost if the parent is gone. If a process dies, its
point has failed and another process takes its place.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from evenbits.errors import EvenbitsError
from evenbits.pipeline.points import Point
from evenbits.pipeline.sweep_bench import Bench, Experiment
from evenbits.pipeline.sweep_state import State, key_digest, write_point

_PATIENCE = 20.0  # seconds for a process to end by itself: one operation of torch cannot be interrupted
Told = Callable[[Point, str | None], None]  # a point is finished, or the reason why it failed


def run_here(bench: Bench, state: State, points: Sequence[Point], told: Told) -> None:
    """Runs the points one after the other in this process."""
    for point in points:
        told(point, _attempt(bench, state.folder, state.digest, point))


def run_in_processes(
    experiment: Experiment, key: Mapping[str, str], state: State, points: Sequence[Point], jobs: int, told: Told
) -> None:
    """Runs the points in `jobs` processes that share this process's threads. Raises EvenbitsError if the experiment
    cannot be sent to another process."""
    threads = max(1, torch.get_num_threads() // jobs)
    waiting = list(points)
    workers: list[_Worker] = []

    def start() -> _Worker:
        return _Worker.started(experiment, dict(key), state.folder, threads)

    try:
        workers = [start() for _ in range(min(jobs, len(waiting)))]
        for worker in workers:
            worker.give(waiting.pop(0))
        while any(worker.point for worker in workers):
            ready = wait([worker.link for worker in workers if worker.point])
            for index, worker in enumerate(workers):
                if worker.link not in ready or worker.point is None:
                    continue
                point, failure, alive = worker.point, *worker.answer()
                told(point, failure)
                if not waiting:
                    worker.point = None
                    continue
                if not alive:
                    workers[index] = worker = start()
                worker.give(waiting.pop(0))
    finally:
        for worker in workers:
            worker.stop()


@dataclass
class _Worker:
    """A process, the pipe to it, and the point it works on."""

    process: Any
    link: Connection
    point: Point | None = None

    @staticmethod
    def started(experiment: Experiment, key: dict[str, str], folder: Path, threads: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(experiment, key, folder, threads, there), daemon=True)
        try:
            process.start()
        except Exception as error:
            raise EvenbitsError(
                f"the sweep cannot be sent to another process ({error}); name the model as FILE.py:factory or give a "
                "function of a module, or use jobs=1."
            ) from error
        there.close()
        return _Worker(process, here)

    def give(self, point: Point) -> None:
        """Hands a point over; a process that is gone already says so when its answer is read."""
        self.point = point
        try:
            self.link.send(point)
        except OSError:
            self.process.join()

    def answer(self) -> tuple[str | None, bool]:
        """(why the point failed, or None; whether the process lives on)."""
        try:
            failure: str | None = self.link.recv()
            return failure, True
        except (EOFError, OSError):
            self.process.join()
            return f"its process ended with exit code {self.process.exitcode} (−9: killed, perhaps for memory)", False

    def stop(self) -> None:
        """Ends the process: by itself if it waits for a point, else in the middle of one."""
        self.link.close()
        if self.point is not None:
            self.process.terminate()
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(experiment: Experiment, key: dict[str, str], folder: Path, threads: int, link: Connection) -> None:
    """The life of a process: opens the bench, then answers each point with None or the reason of its failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends this process
    signal.signal(signal.SIGTERM, _leave)
    torch.set_num_threads(threads)
    bench: Bench | None = None
    while True:
        try:
            point: Point = link.recv()
        except (EOFError, OSError):
            return
        try:
            bench = bench or _same_bench(experiment, key)
            failure = _attempt(bench, folder, key_digest(key), point)
        except EvenbitsError as error:
            failure = str(error)
        try:
            link.send(failure)
        except OSError:
            return


def _leave(_: int, __: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _same_bench(experiment: Experiment, key: Mapping[str, str]) -> Bench:
    bench = Bench(experiment)
    changed = [name for name, value in bench.identity.items() if key.get(name) != value]
    if changed:
        raise EvenbitsError(
            f"another process opened another {', '.join(changed)}; the model and the data must be the same each time "
            "(fix the seed)."
        )
    return bench


def _attempt(bench: Bench, folder: Path, digest: str, point: Point) -> str | None:
    """Runs and writes one point. Returns why it failed."""
    try:
        write_point(folder, digest, point, _run(bench, point))
    except EvenbitsError as error:
        return str(error)
    return None


def _run(bench: Bench, point: Point) -> dict[str, Any]:
    try:
        return bench.run(point)
    except EvenbitsError:
        raise
    except Exception as error:
        raise EvenbitsError(f"{type(error).__name__}: {error}") from error


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Inside the block SIGTERM interrupts as Ctrl-C does, so that processes are ended and nothing is half written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
