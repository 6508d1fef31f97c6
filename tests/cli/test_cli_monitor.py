"""`evenbits monitor` as a process: exit codes, signals, files written whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

MONITOR = [sys.executable, "-m", "evenbits", "monitor", "--interval", "0.1"]
SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


def timeline(folder: Path) -> dict[str, Any]:
    assert (folder / "timeline.svg").read_text().startswith("<svg")
    found: dict[str, Any] = json.loads((folder / "timeline.json").read_text())
    return found


def start(*words: str, **kwargs: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([*MONITOR, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_output_and_exit_code_are_the_command_s(tmp_path: Path) -> None:
    code = "import time; x = b'1' * 50_000_000; print('hello', flush=True); time.sleep(0.6); raise SystemExit(7)"
    done = start("-o", str(tmp_path / "out"), "--", sys.executable, "-c", code)
    out, err = done.communicate(timeout=30)
    assert done.returncode == 7 and out == "hello\n" and "peak memory" in err
    found = timeline(tmp_path / "out")
    assert found["ended"] == 7 and found["peak_resident_bytes"] > 50_000_000 and found["samples"]


def test_sigterm_stops_the_command_and_writes_what_was_measured(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    process = start("-o", str(tmp_path), "--", sys.executable, "-c", code)
    pid = int(first_line(process))
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and not alive(pid)
    assert timeline(tmp_path)["ended"] == 128 + signal.SIGTERM and timeline(tmp_path)["samples"]


def test_detached_it_outlives_a_lost_terminal(tmp_path: Path) -> None:
    code = "import time; print('working', flush=True); time.sleep(1.5); print('finished', flush=True)"
    process = start("--detach", "-o", str(tmp_path), "--", sys.executable, "-c", code, start_new_session=True)
    log = tmp_path / "monitor.log"
    for _ in range(100):
        if log.exists() and "working" in log.read_text():
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGHUP)  # what a terminal sends to all of a session when it goes
    process.communicate(timeout=30)
    assert process.returncode == 0 and timeline(tmp_path)["ended"] == 0
    words = log.read_text()
    assert "finished" in words and "peak memory" in words


def test_a_followed_process_is_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen(SLEEP, stdout=subprocess.PIPE, text=True)
    try:
        assert first_line(other) == "up"
        process = start("--pid", str(other.pid), "-o", str(tmp_path))
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert other.poll() is None and timeline(tmp_path)["ended"] == "running" and timeline(tmp_path)["samples"]
    finally:
        other.kill()
        other.communicate()


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "one of the two"),
        (["--pid", "1", "--", "true"], "one of the two"),
        (["--", "no-such-program-1"], "no-such"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    process = start("-o", str(tmp_path), *words)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1 and message in err and len(err.strip().splitlines()) == 1
