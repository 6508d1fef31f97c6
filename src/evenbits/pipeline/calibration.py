"""Calibration batches from what a command line names: a text, a labelled table, arrays, FILE.py:batches, or nothing.

Text is cut into blocks of equal length without padding: a padding token would leave its own activations in the
statistics.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenbits.checkpoints.sources import is_python, load_object
from evenbits.data.arrays import ARRAY_SUFFIXES, read_arrays
from evenbits.data.arrays import batches as array_batches
from evenbits.data.labelled import read_labelled
from evenbits.data.text import builtin_calibration, read_text, token_blocks
from evenbits.errors import EvenbitsError

_TABLES = (".tsv", ".csv")


@dataclass(frozen=True)
class Calibration:
    """Batches for `quantize` and a sentence that says what they are."""

    batches: Iterable[Any]
    description: str
    builtin: bool = False


def calibration(
    spec: str | None, model: nn.Module, tokenizer: Any, *, samples: int = 128, length: int = 128, batch_size: int = 8
) -> Calibration:
    """Opens calibration data.

    spec: a text (.txt, .jsonl, …), a table (.tsv, .csv: its sentences), arrays (.npz, .npy, .safetensors),
    FILE.py:batches (an iterable, or a function that returns one), or None for the built-in text.
    samples: how many blocks or array rows; length: tokens per block (at most the model's context).
    Raises EvenbitsError if the file cannot be read, is empty, or the model has no tokenizer and the data is text.
    """
    if min(samples, length, batch_size) < 1:
        raise EvenbitsError("samples, sequence length and batch size of the calibration must be at least 1.")
    if spec is not None and is_python(spec):
        made = load_object(spec)
        made = made() if callable(made) else made
        if not isinstance(made, Iterable):
            raise EvenbitsError(f"{spec} gave a {type(made).__name__}; calibration needs an iterable of batches.")
        return Calibration(made, f"batches of {spec}")
    if spec is not None and Path(spec).suffix in ARRAY_SUFFIXES:
        inputs = read_arrays(spec).inputs[:samples]
        return Calibration(list(array_batches(inputs, batch_size)), f"{len(inputs)} inputs of {spec}")
    if tokenizer is None:
        given = "the built-in text" if spec is None else f"the text {spec}"
        raise EvenbitsError(
            f"calibration on {given} needs a tokenizer, and the model has none; pass arrays (.npz, .safetensors) or "
            "FILE.py:batches as --calibration."
        )
    texts = _texts(spec, samples)
    length = min(length, _context(model) or length)
    blocks = token_blocks(tokenizer, texts, length=length, limit=samples)
    batches = _stack(blocks, batch_size)
    name = "the built-in text" if spec is None else spec
    tokens = sum(block.numel() for block in blocks)
    return Calibration(batches, f"{len(blocks)} blocks, {tokens:,} tokens of {name}", builtin=spec is None)


def _texts(spec: str | None, samples: int) -> tuple[str, ...]:
    if spec is None:
        return (builtin_calibration(),)
    if Path(spec).suffix in _TABLES:
        table = read_labelled(spec)
        return tuple(table.texts)
    return tuple(read_text(spec).texts)


def _context(model: nn.Module) -> int | None:
    value = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _stack(blocks: list[torch.Tensor], batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Blocks of one length share a batch; the shorter last one makes its own."""
    batches: list[list[torch.Tensor]] = []
    for block in blocks:
        full = not batches or len(batches[-1]) == batch_size or batches[-1][0].shape != block.shape
        if full:
            batches.append([])
        batches[-1].append(block)
    return [{"input_ids": torch.cat(batch)} for batch in batches]
