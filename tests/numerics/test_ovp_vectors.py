"""docs/ovp-vectors.json: what the tool writes now, and what an implementation written from docs/ovp-format.md makes.

tests/numerics/stranger.py imports nothing of the library: it is what a stranger with the document would write.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import stranger

ROOT = Path(__file__).resolve().parents[2]
KINDS = ["int", "flint", "flint_i8"]
POLICIES = ["optimal", "paper", "reference"]


def _vectors() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "docs" / "ovp-vectors.json").read_text(encoding="utf-8"))
    return loaded


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_ovp_vectors", ROOT / "tools" / "make_ovp_vectors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_is_what_the_tool_writes() -> None:
    assert json.loads(json.dumps(_tool().vectors())) == _vectors()


def _decode(kind: str, byte: int) -> list[int] | None:
    return stranger.decode_pair(kind, byte & 15, byte >> 4)


def _encode(kind: str, policy: str, a: float, b: float) -> int:
    even, odd = stranger.encode_pair(kind, policy, a, b)
    return even | odd << 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_means_what_the_document_says(kind: str) -> None:
    assert _vectors()["kinds"][kind]["decode"] == [_decode(kind, byte) for byte in range(256)]
    assert sum(_decode(kind, byte) is not None for byte in range(256)) == 253


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_of_the_document_writes_the_same_bytes(kind: str, policy: str) -> None:
    found = [entry for entry in _vectors()["kinds"][kind]["encode"] if entry["policy"] == policy]
    assert len(found) == 1
    numbers, written = found[0]["numbers"], found[0]["bytes"]
    assert len(numbers) == 2 * len(written) >= 128
    for index, byte in enumerate(written):
        a, b = numbers[2 * index : 2 * index + 2]
        assert _encode(kind, policy, a, b) == byte, (a, b)


def test_the_documents_example() -> None:
    rows = {
        (15.0, -30.0): [(0, -32), (0, -32), (16, 0)],
        (30.0, 15.0): [(32, 0), (32, 0), (32, 0)],
        (10.0, 7.0): [(7, 7), (12, 0), (12, 0)],
        (3.0, 40.0): [(0, 32), (0, 32), (0, 32)],
        (200.0, 1.0): [(96, 0), (96, 0), (96, 0)],
    }
    text = (ROOT / "docs" / "ovp-format.md").read_text(encoding="utf-8").replace("−", "-")
    for (a, b), expected in rows.items():
        for policy, pair in zip(POLICIES, expected, strict=True):
            assert _decode("int", _encode("int", policy, a, b)) == list(pair)
        cells = " | ".join(str(pair) for pair in expected)
        line = next(line for line in text.splitlines() if line.startswith(f"| ({a:g}, {b:g})"))
        assert " | ".join(cell.strip() for cell in line.split("|")[2:5]) == cells


TENSORS: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in _vectors()["tensors"]}


def test_the_tensors_are_those_that_need_an_example() -> None:
    entries = list(TENSORS.values())
    words = {entry["format"].split(":")[0] for entry in entries}
    assert words == {"ovp4-int", "ovp4-flint", "ovp4-flint_i8", "ovp4-mix", "ovp8"}
    assert {entry["scale_type"] for entry in entries} == {"float32", "float16", "e4m3"}
    assert {"tensor", "row", 16, 32, 128} <= {entry["group"] for entry in entries}
    assert {entry["policy"] for entry in entries} == set(POLICIES)
    assert any(entry["importance"] for entry in entries)
    assert any(entry["shape"][1] % 2 for entry in entries)
    assert any(not any(row) for entry in entries for row in entry["numbers"])
    assert any(entry["factor"] is not None and entry["scale_type"] == "float16" for entry in entries)
    mixed = [entry for entry in entries if entry["kinds"]]
    assert any(len(bytes.fromhex(entry["kinds"][0])) > 1 for entry in mixed)
    assert any(int(row, 16) for entry in mixed for row in entry["kinds"])


@pytest.mark.parametrize("name", TENSORS)
def test_a_stranger_decodes_whole_tensors(name: str) -> None:
    assert stranger.decode(TENSORS[name]) == TENSORS[name]["decoded"]


@pytest.mark.parametrize("name", TENSORS)
def test_a_stranger_writes_the_same_bytes_at_the_stored_scales(name: str) -> None:
    assert stranger.encode(TENSORS[name]) == TENSORS[name]["bytes"]
