"""Long commands and terminals that go: real processes, hung up on, stopped and killed."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from evenbits import errors
from evenbits.cli import detach

NETS = """
import time, torch
from pathlib import Path
from torch import nn
class Slow(nn.Sequential):
    def forward(self, x):
        if Path(__file__).with_name("slow").exists():
            time.sleep(0.3)
        return super().forward(x)
def build():
    torch.manual_seed(0)
    return Slow(nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
def batches():
    for index in range(1000):
        Path(__file__).with_name("begun").touch()
        yield torch.randn(4, 8)
"""
EVENBITS = [sys.executable, "-m", "evenbits"]


@pytest.fixture
def sweep(tmp_path: Path) -> list[str]:
    """A sweep of four points (and more) that takes its time as long as there is a file "slow"."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "rows.py").write_text(
        "import numpy as np\nr = np.random.default_rng(0)\n"
        f"np.savez(r'{tmp_path}/data.npz', inputs=r.standard_normal((16, 8)).astype('f'),\n"
        "         labels=r.integers(0, 3, 16))\n"
    )
    subprocess.run([sys.executable, str(tmp_path / "rows.py")], check=True, timeout=60)
    data = str(tmp_path / "data.npz")
    return [
        *EVENBITS, "sweep", f"{tmp_path / 'nets.py'}:build", "--task", "classification", "--data", data,
        "--calibration", data, "--batch-size", "4", "--alpha", "0.1:0.9:0.1", "--no-auto", "-o", str(tmp_path / "out"),
    ]  # fmt: skip


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def started(command: list[str], log: Path) -> int:
    """Starts a command with --detach; the process to follow and to stop."""
    done = subprocess.run([*command, "--detach", str(log)], capture_output=True, text=True, check=True, timeout=60)
    found = re.match(rf"Detached: process (\d+), printing to {re.escape(str(log))}\.\nfollow: tail", done.stderr)
    assert found is not None and done.stdout == ""
    return int(found[1])


def test_a_detached_sweep_outlives_the_terminal_and_a_stopped_one_goes_on(sweep: list[str], tmp_path: Path) -> None:
    log, state, slow = tmp_path / "log.txt", tmp_path / "out" / "state", tmp_path / "slow"
    slow.touch()
    process = started(sweep, log)
    assert os.getsid(process) == process  # no terminal is its
    until(lambda: (state / "point-none.json").exists())
    os.killpg(process, signal.SIGHUP)  # what a terminal sends to all of a session when it goes
    finished = len(list(state.glob("point-*.json")))
    until(lambda: len(list(state.glob("point-*.json"))) > finished)
    os.kill(process, signal.SIGTERM)
    until(lambda: "it ended with" in log.read_text())
    words = log.read_text()
    assert "it ended with exit code 130 after" in words.splitlines()[-1] and "\r" not in words
    assert words.splitlines()[-2].startswith("evenbits: interrupted; finished points are kept in")
    assert not (tmp_path / "out" / "sweep.json").exists() and not list(state.glob(".*"))

    slow.unlink()
    started(sweep, log)
    until(lambda: log.read_text().count("it ended with") == 2)
    again = log.read_text().removeprefix(words)
    assert "points are done already" in again and again.splitlines()[-1].count("exit code 0 after") == 1
    assert (tmp_path / "out" / "sweep.json").exists() and "Written to" in again


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_without_it_a_lost_terminal_ends_a_command_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "slow").touch()
    nets = tmp_path / "nets.py"
    words = ["quantize", f"{nets}:build", "--calibration", f"{nets}:batches", "-o", str(tmp_path / "out")]
    process = subprocess.Popen([*EVENBITS, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until((tmp_path / "begun").exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert err.splitlines()[-1] == "evenbits: interrupted; nothing was written."
    assert {path.name for path in tmp_path.iterdir()} <= {"nets.py", "slow", "begun", "__pycache__"}


def test_an_interrupt_that_was_swallowed_comes_again_and_leaves_cleaning_up_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(detach, "_REPEAT_EVERY", 0.05)
    swallowed = cleaned = 0
    with pytest.raises(ValueError), detach.ending_cleanly():
        for _ in range(2):
            try:
                if not swallowed:
                    os.kill(os.getpid(), signal.SIGTERM)
                until(lambda: False)
            except BaseException as error:  # what some library does
                assert isinstance(error, KeyboardInterrupt)
                swallowed += 1
        try:
            until(lambda: False)
        finally:  # Six repeats come in here, and do nothing.
            for _ in range(30):
                time.sleep(0.01)
                cleaned += 1
            raise ValueError("that a command raised instead")
    assert (swallowed, cleaned) == (2, 30)


def test_an_ignored_hang_up_stays_ignored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), detach.ending_cleanly():
            os.kill(os.getpid(), signal.SIGHUP)
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # the second does not disturb the end
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize(
    ("code", "expected", "words"),
    [("raise SystemExit(3)", 3, "ended with exit code 3"), ("import os; os.abort()", 134, "was killed by SIGABRT"),
     ("import os; os.kill(os.getpid(), 9)", 137, "was killed by SIGKILL, perhaps for want of memory"),
     ("import os, signal; os.kill(os.getpid(), signal.SIGHUP)", 0, "ended with exit code 0")],
)  # fmt: skip
def test_the_log_says_how_a_command_ended(code: str, expected: int, words: str) -> None:
    command = [sys.executable, "-I", detach.__file__, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == expected and words in done.stdout.splitlines()[-1]


def test_a_progress_bar_becomes_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = io.StringIO(), [0.0]
    monkeypatch.setattr(detach, "time", SimpleNamespace(monotonic=lambda: now[0]))
    lines = detach.Lines(log)
    for step in range(1, 100):
        now[0] = float(step)
        lines.write(f"\r\x1b[Kbar {step}")
    lines.write("\r            \rnext ")
    lines.write("line\r\nlast\n")
    # A bar is known to be whole when the next one begins: the one drawn at 29 s is written at 30 s.
    assert log.getvalue() == "bar 29\nbar 59\nbar 89\nnext line\nlast\n" and lines.isatty()


def test_what_cannot_be_detached_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evenbits", "quantize", "x", "--detach", "log"])
    with pytest.raises(errors.EvenbitsError, match="from Python, start a process"):
        detach.detach(tmp_path / "log")
    monkeypatch.setattr(sys, "orig_argv", ["python", *sys.argv])
    with pytest.raises(errors.EvenbitsError, match="cannot be written"):
        detach.detach(tmp_path / "gone" / "log")
    monkeypatch.setattr(detach, "os", SimpleNamespace(name="nt"))
    with pytest.raises(errors.EvenbitsError, match="Windows"):
        detach.detach(tmp_path / "log")
    assert not list(tmp_path.iterdir())
