"""`evenbits comms plan` as people and scripts meet it."""

from __future__ import annotations

import json
import sys

import pytest

from evenbits.cli import main

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
