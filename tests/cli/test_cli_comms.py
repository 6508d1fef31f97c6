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


@pytest.mark.parametrize(
    ("more", "says"),
    [(["--schedule", "2f2b"], "Did you mean"), (["--link", "1GB"], "in bits"), (["--shape", "a"], "sizes joined by x")],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    code, out, err = call(monkeypatch, capfd, *more)
    assert code == 1 and not out and says in err and err.startswith("evenbits: ")
