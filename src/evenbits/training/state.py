"""A run's state in safetensors files: nested Python data with tensors in it, and folders that are whole or not there.

    OUT/checkpoints/step-00000100/rank0.safetensors … , then `complete`

Tensors keep their bits; floats pass through JSON as their shortest exact decimals. `complete` is written when all ranks
have written their files, so that a run killed in between continues from the checkpoint before.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evenbits.errors import CheckpointError

_KEPT = 2


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Nested dicts, lists, tuples, tensors and plain values → what JSON holds; tensors are put into `tensors`."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[pack(key, tensors), pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [pack(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"a checkpoint holds tensors, numbers, words and their lists; given {type(value).__name__}.")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {unpack(key, tensors): unpack(item, tensors) for key, item in inner}
    made = [unpack(item, tensors) for item in inner]
    return tuple(made) if kind == "tuple" else made


def write(file: Path, state: dict[str, Any]) -> None:
    """One file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    words = json.dumps(pack(state, tensors))
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    save_file(tensors, unfinished, metadata={"state": words})
    unfinished.replace(file)


def read(file: Path) -> dict[str, Any]:
    """What `write` wrote. Raises CheckpointError if it is missing or damaged."""
    try:
        with safe_open(file, "pt") as opened:
            words = (opened.metadata() or {})["state"]
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        made: dict[str, Any] = unpack(json.loads(words), tensors)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {file} cannot be read: {error}") from error
    return made


def folder_of(out: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return out / "checkpoints" / f"step-{step:08d}"


def complete(folder: Path) -> None:
    """All ranks have written: the checkpoint counts from here on, and old ones are dropped."""
    (folder / "complete").touch()
    for old in _whole(folder.parent)[:-_KEPT]:
        shutil.rmtree(old)


def newest(out: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    found = _whole(out / "checkpoints")
    return found[-1] if found else None


def _whole(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if re.fullmatch(r"step-\d{8}", f.name) and (f / "complete").exists())
