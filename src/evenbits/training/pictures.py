"""CIFAR-10 from a folder, in either of two forms: the binary version, or one npz of JPEG files per split.

    data_batch_1.bin … data_batch_5.bin, test_batch.bin     a label byte and 3,072 bytes, red, green, blue
    train.npz, test.npz                                     jpeg (all files joined), offsets, labels; needs Pillow

The Python version of the data set is pickled, and pickles are not read here.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evenbits.errors import EvenbitsError

_RECORD, _SIDE = 3073, 32


def read_cifar10(folder: Path, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [N, 3, 32, 32] and classes int64 [N]; split: train or test.

    limit: at most so many, evenly spaced over the file (whose classes may be sorted).
    Raises EvenbitsError if the folder has neither form, or a file is damaged.
    """
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    inside = folder / "cifar-10-batches-bin"
    for place in (folder, inside):
        if all((place / name).is_file() for name in names):
            return _thinned(*_binary([place / name for name in names]), limit)
    packed = folder / f"{split}.npz"
    if packed.is_file():
        return _jpegs(packed, limit)
    raise EvenbitsError(
        f"{folder} holds no CIFAR-10 ({split}): neither {names[0]} … (the binary version) nor {split}.npz was found. "
        "Give the folder of the extracted binary version; nothing is downloaded."
    )


def _places(count: int, limit: int | None) -> Tensor:
    return torch.arange(count) if limit is None or limit >= count else torch.linspace(0, count - 1, limit).long()


def _thinned(pictures: Tensor, classes: Tensor, limit: int | None) -> tuple[Tensor, Tensor]:
    kept = _places(len(classes), limit)
    return pictures[kept], classes[kept]


def _binary(files: list[Path]) -> tuple[Tensor, Tensor]:
    raw = b"".join(file.read_bytes() for file in files)
    if not raw or len(raw) % _RECORD:
        raise EvenbitsError(f"{files[0].parent}: CIFAR-10 records have {_RECORD} bytes; {len(raw)} are no multiple.")
    table = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, _RECORD)
    return table[:, 1:].reshape(-1, 3, _SIDE, _SIDE), table[:, 0].long()


def _jpegs(file: Path, limit: int | None) -> tuple[Tensor, Tensor]:
    try:
        from PIL import Image
    except ImportError as error:
        raise EvenbitsError(f"{file} holds JPEG files, which Pillow decodes: pip install pillow.") from error
    try:
        with np.load(file, allow_pickle=False) as table:
            packed, offsets, labels = table["jpeg"], table["offsets"], table["labels"]
        kept = _places(len(labels), limit)
        made = []
        for i in kept.tolist():
            with Image.open(io.BytesIO(packed[offsets[i] : offsets[i + 1]].tobytes())) as picture:
                made.append(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise EvenbitsError(f"{file} is not a table of JPEG files (jpeg, offsets, labels): {error}") from error
    return torch.stack(made), torch.from_numpy(labels.astype(np.int64))[kept]


def network_input(pictures_NCHW: Tensor, size: int) -> Tensor:
    """uint8 [N, 3, h, w] → float32 [N, 3, size, size] in −1 … 1, enlarged bilinearly."""
    x = pictures_NCHW.float() / 127.5 - 1
    return x if x.shape[-1] == size else F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
