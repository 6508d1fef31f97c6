"""`evenbits sweep` as people and scripts meet it: table, JSON, picture, refusals, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evenbits import errors
from evenbits.cli import main
from evenbits.reporting import png

FACTORY = """
import time, torch
from pathlib import Path
from torch import nn
class Slow(nn.Sequential):
    def forward(self, x):
        if len(x) == 32 and Path(__file__).with_name("slow").exists():
            time.sleep(0.5)
        return super().forward(x)
def build():
    torch.manual_seed(0)
    model = Slow(nn.LayerNorm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    with torch.no_grad():
        model[0].weight[3] = 50.0
    return model
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evenbits", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capfd.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A sweep of a tiny model: calibrated on 16 rows, scored on 64."""
    (tmp_path / "nets.py").write_text(FACTORY)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((80, 16)).astype(np.float32)
    np.savez(tmp_path / "calibration.npz", inputs=x[:16])
    np.savez(tmp_path / "evaluation.npz", inputs=x[16:], labels=generator.integers(0, 3, 64))
    return [
        "sweep", f"{tmp_path / 'nets.py'}:build", "--task", "classification", "--scheme", "W8A8_STATIC",
        "--data", str(tmp_path / "evaluation.npz"), "--calibration", str(tmp_path / "calibration.npz"),
        "--alpha", "0.2,0.8", "-o", str(tmp_path / "out"),
    ]  # fmt: skip


def test_a_table_a_picture_and_a_file(run: Run, words: list[str], tmp_path: Path) -> None:
    code, out, err = run(*words)
    assert code == 0, err
    assert "no smoothing" in out and "α = auto" in out and "0.2" in out and "n = 64" in out
    assert "two paired standard errors" in out and "α = auto minus the best α" in out
    assert "(5 of 5)" in err and "left" in err
    root = ET.parse(tmp_path / "out" / "sweep.svg").getroot()
    told = " ".join(text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text"))
    for part in ("build: accuracy over α", "float:", "no smoothing:", "α = auto:", "accuracy, % of inputs", "n = 64"):
        assert part in told
    kept = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["name"] for row in kept["rows"]] == ["float", "none", "auto", "0.2", "0.8"]
    assert kept["rows"][3]["regions"]["folded"] >= 1
    _, again, err = run(*words, "--json")
    assert json.loads(again) == kept and again.count("\n") == 1 and "done already" in err


def test_a_png_where_it_is_asked_for(run: Run, words: list[str], tmp_path: Path) -> None:
    code, _, err = run(*words, "--no-auto", "--plot", tmp_path / "my.png", "--json")
    assert code == 0, err
    assert (tmp_path / "my.png").read_bytes().startswith(b"\x89PNG") and not (tmp_path / "out" / "sweep.svg").exists()


def test_without_matplotlib_it_says_so_before_it_works(
    run: Run, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(errors.MissingExtraError):
        png.matplotlib_figure()
    code, out, err = run(*words, "--plot", tmp_path / "my.png")
    assert code == 1 and out == "" and "evenbits[report]" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "match"),
    [(["--alpha", "0.1:0.9"], "LOW:HIGH:STEP"), (["--alpha", "0.5,2"], "from 0 to 1"), (["--plot", "a.pdf"], ".svg or"),
     (["--method", "rtn"], "alpha"), (["--scheme", "W9"], "unknown scheme"), (["--task", "guess"], "unknown"),
     (["--data", "gone.npz"], "gone.npz"), (["--criterion", "best", "--alpha", "0.5"], "criterion")],
)  # fmt: skip
def test_what_is_given_wrongly_is_one_line(run: Run, words: list[str], given: list[str], match: str) -> None:
    code, out, err = run(*words, *given)
    assert code == 1 and out == "" and match in err.splitlines()[-1] and err.splitlines()[-1].startswith("evenbits: ")


def test_a_changed_key_is_refused_and_restart_begins_again(run: Run, words: list[str], tmp_path: Path) -> None:
    assert run(*words, "--no-auto")[0] == 0
    code, _, err = run(*words, "--no-auto", "--samples", "8")
    assert code == 1 and "another calibration data" in err and "--restart" in err
    code, _, err = run(*words, "--no-auto", "--samples", "8", "--restart")
    assert code == 0 and "done already" not in err


@pytest.mark.parametrize(("number", "expected", "jobs"), [("SIGINT", 130, 1), ("SIGTERM", 130, 2), ("SIGKILL", -9, 1)])
def test_a_kill_leaves_a_sweep_that_goes_on(
    run: Run, words: list[str], tmp_path: Path, number: str, expected: int, jobs: int
) -> None:
    (tmp_path / "slow").touch()
    more = ["--no-auto", "--alpha", "0.1:0.8:0.1", "--jobs", str(jobs)]  # 0.8 is far away
    command = [sys.executable, "-m", "evenbits", *words, *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    state, until = tmp_path / "out" / "state", time.monotonic() + 120
    while not (state / "point-none.json").exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, getattr(signal, number))
    _, err = process.communicate(timeout=60)
    assert process.returncode == expected, err
    assert expected == -9 or err.splitlines()[-1].startswith("evenbits: interrupted; finished points are kept in")
    assert not (state / "point-0.8.json").exists()
    (tmp_path / "slow").unlink()
    code, out, err = run(*words, "--no-auto", "--json")
    assert code == 0 and any(f"{n} of 4 points are done already" in err for n in (2, 3)), err
    assert len(json.loads(out)["rows"]) == 4


def test_two_jobs_give_the_same_figures(run: Run, words: list[str]) -> None:
    def figures(*more: str) -> list[Any]:
        code, out, err = run(*words, "--no-auto", "--restart", "--json", *more)
        assert code == 0, err
        return [(row["name"], row["metric"], row["mean_output_sqnr_db"]) for row in json.loads(out)["rows"]]

    assert figures("--jobs", "2") == figures()
