"""`evenbits comms plan` and `evenbits comms watch` as people and scripts meet them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from evenbits.cli import main
from evenbits.comms.telemetry import Telemetry
from evenbits.comms.wire import Lane

BASE = ["comms", "plan", "--link", "10Mbit", "--shape", "4x16x64", "--codec", "int8:g128"]


def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evenbits", *BASE, *more])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capfd.readouterr()
    return int(end.value.code or 0), out, err


def test_json_is_one_object(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(monkeypatch, capfd, "--stages", "3", "--microbatches", "4", "--schedule", "GPipe", "--json")
    made = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert made["link"] == 1e7 and made["shape"] == [4, 16, 64] and made["stages"] == 3
    assert [o["codec"] for o in made["offers"]] == ["raw", "int8:g128"]
    assert made["offers"][1]["bits"] < 9 < made["offers"][0]["bits"]


def test_the_table_names_every_codec(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(monkeypatch, capfd, "--codec", "fp16")
    assert code == 0 and all(word in out for word in ("raw", "int8:g128", "fp16", "pays off below", "10 Mbit/s"))


REPLICAS = ["comms", "plan", "--link", "100Mbit", "--parameters", "100000", "--codec", "int8:g128"]


def test_replicas_without_a_pipeline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.modules[__name__], "BASE", REPLICAS)
    more = ("--replicas", "4", "--per-machine", "2", "--cores", "1", "--tensors", "5", "--feedback", "--json")
    code, out, _ = call(monkeypatch, capfd, *more)
    made = json.loads(out)
    assert code == 0 and made["replicas"] == {"count": 4, "per_machine": 2, "cores": 1} and made["feedback"]
    assert [o["codec"] for o in made["offers"]] == ["raw", "int8:g128"]
    code, out, _ = call(monkeypatch, capfd, "--replicas", "2")
    assert code == 0 and "100,000 parameters, 2 replicas" in out and "pays" in out
    for wrong, says in (([], "to plan data parallelism"), (["--replicas", "2", "--stragglers", "0.1"], "of pipelines")):
        code, out, err = call(monkeypatch, capfd, *wrong)
        assert code == 1 and not out and says in err


def test_links_of_the_internet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Jitter, stragglers and more replicas make the same step longer; so does one core for all stages."""
    steps = []
    for more in (
        ["--latency", "30"],
        ["--latency", "30", "--jitter", "20"],
        ["--latency", "30", "--jitter", "20", "--replicas", "50", "--parameters", "10000"],
        [
            "--latency",
            "30",
            "--jitter",
            "20",
            "--replicas",
            "50",
            "--parameters",
            "10000",
            "--stragglers",
            "0.1",
            "--slowdown",
            "9",
        ],
        ["--latency", "30", "--cores", "1"],
    ):
        code, out, _ = call(monkeypatch, capfd, "--compute", "5", "--stages", "8", *more, "--json")
        assert code == 0
        steps.append(json.loads(out)["offers"][0]["step"])
    calm, jitter, many, slow, one_core = steps
    assert calm < jitter < many < slow and calm < one_core


@pytest.mark.parametrize(
    ("more", "says"),
    [(["--schedule", "2f2b"], "Did you mean"), (["--link", "1GB"], "in bits"), (["--shape", "a"], "sizes joined by x")],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    code, out, err = call(monkeypatch, capfd, *more)
    assert code == 1 and not out and says in err and err.startswith("evenbits: ")


def traffic(path: Path, steps: range) -> None:
    """A log as a stage between two others leaves it."""
    telemetry = Telemetry(path)
    for step in steps:
        for edge, direction, spec in ((0, "backward", "int8:g16"), (1, "forward", "int4:g16")):
            telemetry.encode(Lane(edge, direction, (spec,)), torch.randn(4, 6, 16), step=step)
        telemetry.close_step()
    telemetry.close()


def watch(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evenbits", "comms", "watch", *words])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capfd.readouterr()
    return int(end.value.code or 0), out, err


def test_a_log_is_shown_and_drawn(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log, picture = tmp_path / "figures.jsonl", tmp_path / "out.svg"
    traffic(log, range(3))
    code, out, _ = watch(monkeypatch, capfd, str(log), "--once", "--plot", str(picture))
    assert code == 0 and all(word in out for word in ("int8:g16", "int4:g16", "worst channel", "encode ms"))
    drawn = picture.read_text()
    assert drawn.startswith("<svg") and "edge 1, forward: SNR, dB" in drawn and "DC ratio of its worst channel" in drawn
    code, out, _ = watch(monkeypatch, capfd, str(log), "--once", "--json")
    lanes = json.loads(out)["lanes"]
    assert code == 0 and [(f["edge"], f["direction"], f["step"]) for f in lanes] == [
        (0, "backward", 2),
        (1, "forward", 2),
    ]
    assert lanes[0]["snr_db"] > lanes[1]["snr_db"] + 15


def test_a_training_log_is_one_too_and_another_file_is_not(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "log-rank0.jsonl"
    traffic(log, range(1))
    lanes = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text(json.dumps({"step": 0, "loss": 1.0, "codecs": lanes}) + "\n" + '{"step": 1, "cod')
    code, out, _ = watch(monkeypatch, capfd, str(log), "--once", "--json")
    assert code == 0 and json.loads(out)["lanes"] == lanes  # the line that is being written is waited for
    log.write_text("a line\n")
    code, _, err = watch(monkeypatch, capfd, str(log), "--once")
    assert code == 1 and "is no log of coded traffic" in err
    code, _, err = watch(monkeypatch, capfd, str(tmp_path / "none.jsonl"), "--once")
    assert code == 1 and "cannot be read" in err
    log.write_text("")
    code, _, err = watch(monkeypatch, capfd, str(log), "--once", "--plot", str(tmp_path / "a.svg"))
    assert code == 1 and "no figures yet" in err


def test_a_log_is_followed_while_it_grows(tmp_path: Path) -> None:
    log, picture = tmp_path / "figures.jsonl", tmp_path / "out.svg"
    traffic(log, range(1))
    words = ["-m", "evenbits", "comms", "watch", str(log), "--plot", str(picture), "--interval", "0.05"]
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(picture, "<circle", 3 * 2)
        traffic(log, range(1, 4))
        wait_for(picture, "<circle", 3 * 2 * 4)
    finally:
        process.terminate()
        process.wait(timeout=20)


def wait_for(file: Path, word: str, count: int) -> None:
    until = time.monotonic() + 60
    while not file.exists() or file.read_text().count(word) < count:
        assert time.monotonic() < until, f"{word} is not {count} times in {file.name}"
        time.sleep(0.05)
