"""Long commands and the terminal they were started from: `--detach LOG`, and a clean end when the terminal goes.

    evenbits sweep … --detach sweep.log     goes on without the terminal, and says at once where

Two processes stay behind, in a session of their own, hang-ups ignored: the command, as it was typed, and one that waits
for it and writes into the log how it ended, also if the system killed it for want of memory. This file is that second
process's program: alone, it imports nothing but the standard library.

Without --detach a hang-up (SIGHUP) and SIGTERM interrupt a command as Ctrl-C does: files half written are removed, and
a sweep goes on later where it was.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_INSIDE = "EVENBITS_DETACHED"  # the command's own word that it runs detached already
_PROGRESS_EVERY = 30.0  # seconds
_REPEAT_EVERY = 1.0  # seconds
_PARTS = re.compile(r"([^\r\n]*)(\r?\n|\r|$)")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def is_inside() -> bool:
    """Whether this process is the detached command. Asked once: programs that it starts are not it."""
    return os.environ.pop(_INSIDE, None) is not None


def detach(log: Path) -> str:
    """Starts this very command again in a session of its own, printing to the end of `log`; what to tell the person.

    Raises EvenbitsError on Windows, outside the command line, and if the log cannot be written.
    """
    from evenbits.errors import EvenbitsError

    if os.name != "posix":
        raise EvenbitsError("--detach needs sessions, which Windows has not: leave it out, and keep the window open.")
    words = sys.argv[1:]
    if sys.orig_argv[len(sys.orig_argv) - len(words) :] != words:
        raise EvenbitsError("--detach starts a command line again; from Python, start a process of your own.")
    try:
        handle = log.open("a", encoding="utf-8")
    except OSError as error:
        raise EvenbitsError(f"the log {log} cannot be written: {error}.") from error
    with handle:
        process = subprocess.Popen(
            [sys.executable, "-I", __file__, sys.executable, *sys.orig_argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            start_new_session=True,
            env=os.environ | {_INSIDE: "1", "PYTHONUNBUFFERED": "1"},
        )
    name = shlex.quote(str(log))
    return f"Detached: process {process.pid}, printing to {log}.\nfollow: tail -f {name}\nstop:   kill {process.pid}"


def supervise(command: list[str]) -> int:
    """Runs a command with hang-ups ignored, hands SIGTERM on to it, and prints how it ended. Its exit code, as a shell
    has it: 128 + the signal that ended it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the command inherits it
    begin = time.monotonic()
    print(f"evenbits: {_now()}: process {os.getpid()} runs {shlex.join(command)}", flush=True)
    process = subprocess.Popen(command)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda heard, _: process.send_signal(heard))
    code = process.wait()
    ended = f"ended with exit code {code}"
    if code < 0:
        memory = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        ended = f"was killed by {signal.Signals(-code).name}{memory}"
    print(f"evenbits: {_now()}: it {ended} after {time.monotonic() - begin:.1f} s.", flush=True)
    return 128 - code if code < 0 else code


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


@contextlib.contextmanager
def ending_cleanly() -> Iterator[None]:
    """Inside the block SIGTERM and a lost terminal (SIGHUP) interrupt as Ctrl-C does, once: what is removed then is
    removed whole. Such a signal comes but once, so an interrupt that some library swallowed on its way is repeated. A
    hang-up that is ignored already (nohup, --detach) stays ignored."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.getsignal(number) for number in numbers}
    raised: list[KeyboardInterrupt] = []
    ended = threading.Event()

    def repeat(number: signal.Signals) -> None:
        while not ended.wait(_REPEAT_EVERY):
            _thread.interrupt_main(number)

    def interrupt(number: int, _: object) -> None:
        if not raised:
            threading.Thread(target=repeat, args=(signal.Signals(number),), daemon=True).start()
        elif _is_handled(raised[-1]):
            return
        raised[:] = [KeyboardInterrupt()]
        raise raised[-1]

    replaced = [number for number, handler in before.items() if handler == signal.SIG_DFL]
    for number in replaced:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        ended.set()
        for number in replaced:
            signal.signal(number, before[number])


def _is_handled(interrupt: KeyboardInterrupt) -> bool:
    """Whether the running code is cleaning up after this interrupt, or after an exception that arose from it."""
    error = sys.exc_info()[1]
    while error is not None and error is not interrupt:
        error = error.__context__
    return error is interrupt


class Lines:
    """A log that is written like a terminal: a progress bar, which a carriage return draws again and again, becomes a
    line every half minute."""

    def __init__(self, log: IO[str]) -> None:
        self._log, self._text, self._told = log, "", time.monotonic()

    def write(self, text: str) -> int:
        for part, end in _PARTS.findall(_ESCAPES.sub("", text)):
            self._text += part
            if end == "":
                break
            bar, whole = self._text.strip(), end.endswith("\n")
            late = time.monotonic() - self._told >= _PROGRESS_EVERY
            if whole or (bar and late):
                self._log.write(f"{self._text.rstrip()}\n")
                self._told = self._told if whole else time.monotonic()
            self._text = ""
        self._log.flush()
        return len(text)

    def flush(self) -> None:
        self._log.flush()

    def isatty(self) -> bool:
        """True, so that progress is shown at all."""
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


if __name__ == "__main__":
    raise SystemExit(supervise(sys.argv[1:]))
