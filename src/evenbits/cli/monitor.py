"""`evenbits monitor -- CMD` and `evenbits monitor --pid PID`"""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from evenbits.cli.output import note

if TYPE_CHECKING:
    from evenbits.evaluation.monitor import Sample, Sampler, Timeline

_GRACE, _LOG_EVERY = 10.0, 10.0


def monitor(
    command: Annotated[list[str] | None, typer.Argument(help="The command to run, after --.")] = None,
    pid: Annotated[int | None, typer.Option(help="Follow a process that runs already.")] = None,
    interval: Annotated[float, typer.Option(help="Seconds between samples.", min=0.05)] = 1.0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the picture and the JSON.")] = Path(
        "evenbits-monitor"
    ),
    detach: Annotated[
        bool, typer.Option("--detach", help="Outlive the terminal: ignore its hang-up, print to OUTPUT/monitor.log.")
    ] = False,
) -> None:
    """Watch memory, CPU and GPU while a command runs; write a timeline; pass its exit code on."""
    from evenbits.errors import EvenbitsError
    from evenbits.evaluation.monitor import Timeline, library

    if (command is None) == (pid is None):
        raise EvenbitsError("give a command after -- or a process with --pid, one of the two.")
    psutil = library()
    output.mkdir(parents=True, exist_ok=True)
    log = _detached(output) if detach else None
    with _Watch(psutil, command, pid, log) as watch:
        name = shlex.join(command) if command else f"process {pid}"
        timeline = Timeline(name, interval, watch.sampler.gpu)
        try:
            watch.run(timeline)
        finally:
            timeline.ended = watch.end()
            files = _write(timeline, output)
    from evenbits.reporting.timeline import summary

    _say(summary(timeline, files), log)
    if isinstance(timeline.ended, int) and timeline.ended:
        raise typer.Exit(timeline.ended)


def _detached(output: Path) -> IO[str]:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the command inherits it
    log = (output / "monitor.log").open("a", encoding="utf-8", buffering=1)
    note(f"Detached: printing to {log.name}.")
    return log


class _Watch:
    """A process under watch: started here (and stopped with us), or only followed."""

    def __init__(self, psutil: Any, command: list[str] | None, pid: int | None, log: IO[str] | None) -> None:
        from evenbits.errors import EvenbitsError
        from evenbits.evaluation.monitor import Sampler

        self._psutil, self._ours, self._log = psutil, command is not None, log
        self._stopped: int | None = None
        self._last = float("-inf")
        try:
            self._process = psutil.Popen(command, stdout=log, stderr=log) if command else psutil.Process(pid)
        except (OSError, psutil.Error) as error:
            raise EvenbitsError(f"{shlex.join(command) if command else f'process {pid}'}: {error}") from error
        self.sampler: Sampler = Sampler(self._process.pid)

    def __enter__(self) -> _Watch:
        self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: object) -> None:
        self._stopped = number
        if self._ours:
            self._each(self.sampler.family(), lambda process: process.send_signal(number))

    def _each(self, processes: list[Any], act: Callable[[Any], object]) -> None:
        for process in processes:
            try:
                act(process)
            except self._psutil.Error:
                continue  # it ended in between

    def run(self, timeline: Timeline) -> None:
        """Samples until the process ends or a signal asks to stop."""
        from evenbits.evaluation.monitor import follow

        follow(self.sampler, timeline, self._wait, self._tell)

    def _wait(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self._stopped is None and (left := until - time.monotonic()) > 0:
            try:
                self._process.wait(timeout=min(left, 0.2))
            except self._psutil.TimeoutExpired:
                continue
            return True
        return self._stopped is not None

    def _tell(self, sample: Sample) -> None:
        from evenbits.reporting.tables import size

        gpu = "" if sample.gpu_bytes is None else f"  GPU {sample.gpu or 0:.0f} %, {size(sample.gpu_bytes)}"
        line = f"{sample.seconds:8.1f} s  {size(sample.resident):>10}  CPU {sample.cpu:4.0f} %{gpu}"
        if self._log is None and sys.stderr.isatty():
            sys.stderr.write(f"\r{line}\033[K")
            sys.stderr.flush()
        elif sample.seconds - self._last >= _LOG_EVERY:
            self._last = sample.seconds
            _say(line, self._log)

    def end(self) -> int | str:
        """Waits for a command of ours, with force after a while if we were asked to stop. Its exit code, as a shell
        has it: 128 + the signal that ended it."""
        if self._log is None and sys.stderr.isatty():
            sys.stderr.write("\n")
        if not self._ours:
            return "ended" if not self._process.is_running() else "running"
        family = self.sampler.family()
        if self._stopped is not None:
            _, left = self._psutil.wait_procs(family, timeout=_GRACE)
            self._each(left, lambda process: process.kill())
        code = self._process.wait()
        return 128 - code if code is not None and code < 0 else int(code or 0)


def _say(text: str, log: IO[str] | None) -> None:
    if log is None:
        note(text)
    else:
        log.write(f"{text}\n")


def _write(timeline: Timeline, output: Path) -> list[Path]:
    from evenbits.reporting.timeline import timeline_svg, write_png

    files = [output / "timeline.json", output / "timeline.svg"]
    files[0].write_text(json.dumps(timeline.to_json(), allow_nan=False), encoding="utf-8")
    files[1].write_text(timeline_svg(timeline), encoding="utf-8")
    if write_png(timeline, output / "timeline.png"):
        files.append(output / "timeline.png")
    return files
