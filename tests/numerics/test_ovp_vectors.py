"""docs/ovp-vectors.json: what the tool writes now, and what an implementation written from docs/ovp-format.md makes.

The second half imports nothing of the library: it is what a stranger with the document would write.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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


# --- from the document alone

NORMALS = {
    "int": {**{code: code for code in range(8)}, **{code: code - 16 for code in range(9, 16)}},
    "flint": dict(zip([*range(8), *range(9, 16)], [0, 1, 2, 3, 16, 8, 4, 6, -1, -2, -3, -16, -8, -4, -6], strict=True)),
}
NORMALS["flint_i8"] = NORMALS["flint"]
OUTLIER_MAGNITUDES = {
    "int": [12, 16, 24, 32, 48, 64, 96],
    "flint": [24, 32, 48, 64, 96, 128, 192],
    "flint_i8": [20, 24, 32, 48, 64, 96, 120],
}
OUTLIERS = {
    kind: {code | sign: -value if sign else value for sign in (0, 8) for code, value in enumerate(values, 1)}
    for kind, values in OUTLIER_MAGNITUDES.items()
}


def _decode(kind: str, byte: int) -> list[int] | None:
    low, high = byte & 15, byte >> 4
    if high == 8:
        return None if low in (0, 8) else [OUTLIERS[kind][low], 0]
    if low == 8:
        return None if high == 0 else [0, OUTLIERS[kind][high]]
    return [NORMALS[kind][low], NORMALS[kind][high]]


def _nearest(number: float, codes: dict[int, int], *, even: bool = False) -> tuple[int, int]:
    """(code, value) of the nearest value; ties to the even value, or to the smaller magnitude."""
    return min(codes.items(), key=lambda item: (abs(item[1] - number), item[1] % 2 if even else abs(item[1])))


def _encode(kind: str, policy: str, a: float, b: float) -> int:
    """Scale 1. Differences are exact in Python's floats for the numbers that the vectors have."""
    normal = [_nearest(number, NORMALS[kind], even=kind == "int") for number in (a, b)]
    outlier = [_nearest(number, OUTLIERS[kind]) for number in (a, b)]
    as_normal, as_even, as_odd = normal[0][0] | normal[1][0] << 4, outlier[0][0] | 0x80, 8 | outlier[1][0] << 4
    if policy == "optimal":
        choices = [
            (as_normal, (normal[0][1] - a) ** 2 + (normal[1][1] - b) ** 2),
            (as_even, (outlier[0][1] - a) ** 2 + b**2),
            (as_odd, a**2 + (outlier[1][1] - b) ** 2),
        ]
        if max(abs(a), abs(b)) > 1e6:  # far squares cancel: compare what is left of them
            choices = [(code, float(_exact(kind, code, a, b))) for code, _ in choices]
        return min(choices, key=lambda choice: choice[1])[0]  # the first of equals
    edge = (max(NORMALS[kind].values()) + min(OUTLIER_MAGNITUDES[kind])) / 2
    far = [abs(a) >= edge, abs(b) >= edge]
    if not any(far):
        return as_normal
    even_stays = far[0] and (not far[1] or policy == "reference" or abs(a) >= abs(b))
    return as_even if even_stays else as_odd


def _exact(kind: str, byte: int, a: float, b: float) -> int:
    """Squared error in 1/65536, in integers."""
    decoded = _decode(kind, byte)
    assert decoded is not None
    return sum(int((value - int(number * 256) / 256) * 256) ** 2 for value, number in zip(decoded, (a, b), strict=True))


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
