"""Calibration data from what a command line names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evenbits.errors import EvenbitsError
from evenbits.pipeline.calibration import calibration


class Bytes:
    """A tokenizer with the one method that is needed, and the call."""

    bos_token_id = eos_token_id = pad_token_id = None
    model_max_length = 1 << 30

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": list(text.encode())}
        return {"input_ids": [list(t.encode()) for t in text]}

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())


def model(context: Any = None) -> nn.Module:
    made = nn.Linear(1, 1)
    if context is not None:
        made.config = SimpleNamespace(max_position_embeddings=context)  # type: ignore[assignment]
    return made


def text_file(folder: Path, text: str) -> str:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_built_in_text_says_so() -> None:
    found = calibration(None, model(), Bytes(), samples=3, length=16, batch_size=2)
    assert found.builtin and "built-in" in found.description
    batches = list(found.batches)
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 16), (1, 16)]
    assert "3 blocks, 48 tokens" in found.description


def test_a_text_is_cut_into_blocks_of_one_length_per_batch(tmp_path: Path) -> None:
    found = calibration(text_file(tmp_path, "abcdefghij" * 4), model(), Bytes(), samples=99, length=16, batch_size=8)
    shapes = [tuple(b["input_ids"].shape) for b in found.batches]
    assert sum(rows * columns for rows, columns in shapes) <= 40
    assert shapes[0] == (2, 16) and not found.builtin and "text.txt" in found.description
    ids = torch.cat([b["input_ids"].reshape(-1) for b in found.batches])
    assert bytes(ids[:32].tolist()).decode() == ("abcdefghij" * 4)[:32]


def test_samples_limit_the_blocks(tmp_path: Path) -> None:
    found = calibration(text_file(tmp_path, "x" * 1000), model(), Bytes(), samples=5, length=10, batch_size=2)
    assert sum(len(b["input_ids"]) for b in found.batches) == 5


def test_blocks_are_no_longer_than_the_models_context(tmp_path: Path) -> None:
    found = calibration(text_file(tmp_path, "x" * 1000), model(12), Bytes(), samples=5, length=128, batch_size=2)
    assert {b["input_ids"].shape[1] for b in found.batches} == {12}


@pytest.mark.parametrize("context", [None, 0, -1, "many", 1.5])
def test_an_unreadable_context_is_no_limit(context: Any, tmp_path: Path) -> None:
    found = calibration(text_file(tmp_path, "x" * 400), model(context), Bytes(), samples=2, length=100, batch_size=2)
    assert {b["input_ids"].shape[1] for b in found.batches} == {100}


def test_a_table_gives_its_sentences(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("sentence\tlabel\nabcd\t1\nefgh\t0\n", encoding="utf-8")
    found = calibration(str(path), model(), Bytes(), samples=9, length=4, batch_size=1)
    texts = [bytes(row.tolist()).decode() for b in found.batches for row in b["input_ids"]]
    assert "abcd" in "".join(texts) and "efgh" in "".join(texts) and "label" not in "".join(texts)


def test_arrays_need_no_tokenizer(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", inputs=np.ones((10, 3), np.float32))
    found = calibration(str(tmp_path / "x.npz"), model(), None, samples=7, batch_size=3)
    assert [tuple(b.shape) if isinstance(b, torch.Tensor) else None for b in found.batches] == [(3, 3), (3, 3), (1, 3)]
    assert "7 inputs" in found.description


@pytest.mark.parametrize("body", ["made = [torch.ones(2)]", "def made():\n    yield torch.ones(2)"])
def test_a_python_file_gives_batches_or_a_function_of_them(body: str, tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(f"import torch\n{body}\n")
    found = calibration(f"{tmp_path}/data.py:made", model(), None)
    assert [tuple(b.shape) for b in found.batches] == [(2,)]


def test_a_python_file_that_gives_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text("made = 3\n")
    with pytest.raises(EvenbitsError, match=r"gave a int; calibration needs an iterable"):
        calibration(f"{tmp_path}/data.py:made", model(), None)


@pytest.mark.parametrize("spec", [None, "text"])
def test_text_without_a_tokenizer_is_refused(spec: str | None, tmp_path: Path) -> None:
    given = None if spec is None else text_file(tmp_path, "words")
    with pytest.raises(EvenbitsError, match="needs a tokenizer"):
        calibration(given, model(), None)


@pytest.mark.parametrize("content", ["", "   \n \n"])
def test_an_empty_text_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(EvenbitsError):
        calibration(text_file(tmp_path, content), model(), Bytes())


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for name in ("no.txt", "no.tsv", "no.npz", "no.safetensors", "no.py:made"):
        with pytest.raises(EvenbitsError):
            calibration(str(tmp_path / name), model(), Bytes())


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"length": 0}, {"batch_size": 0}, {"samples": -3}])
def test_sizes_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(EvenbitsError, match="at least 1"):
        calibration(None, model(), Bytes(), **wrong)
