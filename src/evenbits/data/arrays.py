"""Arrays: npy, npz and safetensors files -> input and label tensors, and inputs -> batches."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from evenbits.errors import EvenbitsError

ARRAY_SUFFIXES = (".npy", ".npz", ".safetensors")
INPUT_NAMES = ("inputs", "images", "x")
LABEL_NAMES = ("labels", "y")


@dataclass(frozen=True)
class Arrays:
    """Inputs of a model and, where the file has them, their classes.

    inputs: float32 [N, ...], finite.
    labels: int64 [N], indices of classes; None where the file has none.
    """

    inputs: torch.Tensor
    labels: torch.Tensor | None = None


def read_arrays(path: str | os.PathLike[str]) -> Arrays:
    """The inputs and labels of a `.npz`, `.safetensors` or `.npy` (inputs only) file.

    The input array is named inputs, images or x, the labels labels or y. Floating-point inputs become float32; uint8
    inputs, as images are stored, become float32 value/255 in 0..1. No axis is moved and nothing is normalised: store
    the inputs as the model takes them. Pickled objects are never loaded.

    Raises EvenbitsError for a file that is missing or damaged, an array under another name, inputs of another dtype,
    NaN or infinite values, and labels that are not integers [N].
    """
    file = Path(path)
    tables = _read_tables(file)
    inputs = _as_float(next(tables[name] for name in INPUT_NAMES if name in tables), file)
    labels = next((tables[name] for name in LABEL_NAMES if name in tables), None)
    return Arrays(inputs, None if labels is None else _as_labels(labels, inputs.shape[0], file))


def batches(inputs: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Views of inputs [N, ...] of at most `size` rows each, in order, the last one shorter where N asks for it.

    Raises EvenbitsError for a size below 1.
    """
    if size < 1:
        raise EvenbitsError(f"a batch size of {size}; give a whole number from 1")
    return (inputs[start : start + size] for start in range(0, len(inputs), size))


def _read_tables(file: Path) -> dict[str, torch.Tensor]:
    """The input and label arrays of the file by name; the array of a .npy file is named `inputs`."""
    if file.suffix not in ARRAY_SUFFIXES:
        raise EvenbitsError(f"{file} ends in {file.suffix!r}; give a file that ends in {_or(ARRAY_SUFFIXES)}")
    if not file.is_file():
        raise EvenbitsError(f"{file} is not a file; give the path of an existing one")
    try:
        return _read_safetensors(file) if file.suffix == ".safetensors" else _read_numpy(file)
    except EvenbitsError:
        raise
    except (SafetensorError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as err:
        raise EvenbitsError(f"{file} is not a readable {file.suffix} file of plain numbers: {err}") from err


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as stored:
        return {name: stored.get_tensor(name) for name in _wanted(list(stored.keys()), file)}


def _read_numpy(file: Path) -> dict[str, torch.Tensor]:
    with file.open("rb") as stream:
        loaded = np.load(stream, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {INPUT_NAMES[0]: _as_tensor(loaded)}
        return {name: _as_tensor(loaded[name]) for name in _wanted(loaded.files, file)}


def _wanted(names: Sequence[str], file: Path) -> list[str]:
    """Which of the stored names are the inputs and the labels; the others are not read."""
    inputs, labels = ([name for name in wanted if name in names] for wanted in (INPUT_NAMES, LABEL_NAMES))
    for found in (inputs, labels):
        if len(found) > 1:
            raise EvenbitsError(f"{file} has {' and '.join(found)}, which mean the same; keep one of them")
    if not inputs:
        raise EvenbitsError(f"{file} has no array named {_or(INPUT_NAMES)}; it has: {', '.join(names) or 'none'}")
    return inputs + labels


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    """A torch tensor of the same values; big-endian numbers are turned round."""
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=False))


def _as_float(inputs: torch.Tensor, file: Path) -> torch.Tensor:
    """inputs [N, ...] as finite float32; uint8 scaled to 0..1."""
    if inputs.ndim < 1 or inputs.numel() == 0:
        raise EvenbitsError(f"the inputs in {file} have shape {tuple(inputs.shape)}; give at least one input, [N, ...]")
    if inputs.dtype == torch.uint8:
        return inputs.to(torch.float32) / 255
    if not inputs.is_floating_point():
        raise EvenbitsError(
            f"the inputs in {file} are {_dtype(inputs)}; give floats as the model takes them, or uint8 pixels, which "
            "are scaled to 0..1"
        )
    inputs = inputs.to(torch.float32)
    bad = int((~inputs.isfinite()).sum())
    if bad:
        raise EvenbitsError(f"{bad} of {inputs.numel()} input values in {file} are NaN or infinite; mend them first")
    return inputs


def _as_labels(labels: torch.Tensor, count: int, file: Path) -> torch.Tensor:
    """labels [N] as int64."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise EvenbitsError(f"the labels in {file} are {_dtype(labels)}; give integers, the indices of the classes")
    if labels.shape != (count,):
        raise EvenbitsError(
            f"the labels in {file} have shape {tuple(labels.shape)} beside {count} inputs; give one label per input, "
            f"shape ({count},)"
        )
    return labels.to(torch.int64)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _or(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]
