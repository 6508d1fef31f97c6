"""The bytes themselves: a change of any wire format shows here, and both ends of a link must then change together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta

GOLDEN: dict[str, str] = json.loads(Path(__file__).with_name("codec_golden.json").read_text(encoding="utf-8"))


def tensor() -> torch.Tensor:
    """48 eighths between −2.5 and 2.5, every fifth of them zero."""
    x = ((torch.arange(48) * 37 % 41) - 20) / 8
    x[::5] = 0
    return x


@pytest.mark.parametrize("spec", GOLDEN)
def test_the_bytes_are_these(spec: str) -> None:
    assert bytes(get(spec).encode(tensor()).tolist()).hex() == GOLDEN[spec]


@pytest.mark.parametrize("spec", GOLDEN)
def test_these_bytes_are_the_tensor(spec: str) -> None:
    payload = torch.tensor(list(bytes.fromhex(GOLDEN[spec])), dtype=torch.uint8)
    y = get(spec).decode(payload, Meta((48,), torch.float32))
    error = (y - tensor()).abs()
    # Two levels have an error of half the range, and what top-k leaves out is wholly lost; nothing is further off.
    assert float(error.max()) <= 2.5
    assert float(error.mean()) < 0.9
