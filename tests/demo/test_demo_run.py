"""`evenbits demo`: the claims it prints, checked on what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

import evenbits
from evenbits.demo.model import ByteLM


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run(
        [sys.executable, "-m", "evenbits", "demo", "-o", str(folder), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rows(demo: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in demo["rows"]}


def test_naive_static_int8_loses_and_smoothquant_does_not(demo: dict[str, Any]) -> None:
    found = rows(demo)
    float_perplexity = found["float"]["perplexity"]
    assert 2 < float_perplexity < 5
    assert found["w8a8_naive"]["perplexity"] >= 1.10 * float_perplexity
    assert found["w8a8_smoothquant"]["perplexity"] <= 1.005 * float_perplexity


def test_rows_have_their_figures(demo: dict[str, Any]) -> None:
    found = rows(demo)
    assert set(found["float"]) == {"name", "perplexity", "bits_per_weight", "weight_bytes", "milliseconds"}
    assert found["float"]["bits_per_weight"] == 32
    for name in ("w8a8_naive", "w8a8_smoothquant", "w8a8_dynamic"):
        assert 8 < found[name]["bits_per_weight"] < 8.2
        assert found[name]["weight_bytes"] < 0.26 * found["float"]["weight_bytes"]
        assert found[name]["milliseconds"] > 0


def test_the_planting_is_said(demo: dict[str, Any]) -> None:
    assert len(demo["planted"]) == 8
    assert all("64" in line for line in demo["planted"])


def test_digits_keep_their_accuracy(demo: dict[str, Any]) -> None:
    accuracy = {row["name"]: row["accuracy"] for row in demo["digits"]}
    assert accuracy["float"] > 0.95
    assert abs(accuracy["w8a8_static"] - accuracy["float"]) <= 0.01
    assert abs(accuracy["w8a8_dynamic"] - accuracy["float"]) <= 0.01


def test_the_checkpoint_loads_and_the_text_is_the_reloaded_models(demo: dict[str, Any]) -> None:
    model = evenbits.load(demo["checkpoint"], ByteLM())
    with torch.inference_mode():
        assert model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 256)
    assert len(demo["text"].strip()) > 50


def test_the_picture_is_well_formed_and_complete(demo: dict[str, Any]) -> None:
    picture = ElementTree.parse(Path(demo["picture"])).getroot()
    bars = picture.findall(".//{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 2 * 192
    words = " ".join(text.text or "" for text in picture.iter("{http://www.w3.org/2000/svg}text"))
    assert "before" in words
    assert "after" in words


def test_a_folder_that_is_not_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    foreign = tmp_path / "out" / "checkpoint"
    foreign.mkdir(parents=True)
    (foreign / "precious.txt").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-m", "evenbits", "demo", "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "not overwritten" in done.stderr
    assert (foreign / "precious.txt").read_text() == "mine"
