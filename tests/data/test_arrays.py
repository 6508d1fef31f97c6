"""Array files to input and label tensors."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evenbits.data.arrays import batches, read_arrays
from evenbits.errors import EvenbitsError

INPUTS = np.arange(24, dtype=np.float32).reshape(4, 2, 3) / 7
LABELS = np.array([0, 2, 1, 0])


@pytest.fixture
def npz(tmp_path: pathlib.Path) -> Any:
    def write(**arrays: Any) -> pathlib.Path:
        np.savez(tmp_path / "a.npz", **arrays)
        return tmp_path / "a.npz"

    return write


@pytest.mark.parametrize(("inputs", "labels"), [("inputs", "labels"), ("images", "y"), ("x", "labels")])
def test_npz_and_safetensors_read_alike(tmp_path: pathlib.Path, npz: Any, inputs: str, labels: str) -> None:
    stored = tmp_path / "a.safetensors"
    save_file({inputs: torch.tensor(INPUTS), labels: torch.tensor(LABELS), "extra": torch.zeros(2)}, stored)
    for path in (npz(**{inputs: INPUTS, labels: LABELS, "extra": np.zeros(2)}), stored):
        read = read_arrays(path)
        assert read.inputs.equal(torch.tensor(INPUTS))
        assert read.labels is not None
        assert read.labels.dtype == torch.int64
        assert read.labels.tolist() == LABELS.tolist()


def test_npy_has_inputs_only(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "a.npy", INPUTS)
    read = read_arrays(tmp_path / "a.npy")
    assert read.inputs.equal(torch.tensor(INPUTS))
    assert read.labels is None


def test_bytes_become_zero_to_one(npz: Any) -> None:
    read = read_arrays(npz(images=np.array([[0, 51, 255]], dtype=np.uint8)))
    assert read.inputs.dtype == torch.float32
    assert read.inputs.tolist() == [[0.0, pytest.approx(0.2), 1.0]]


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_floats_become_float32(npz: Any, dtype: Any) -> None:
    read = read_arrays(npz(x=INPUTS.astype(dtype)))
    assert read.inputs.dtype == torch.float32
    torch.testing.assert_close(read.inputs, torch.tensor(INPUTS), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.uint16, np.uint64])
def test_integer_labels_of_any_width(npz: Any, dtype: Any) -> None:
    labels = read_arrays(npz(x=INPUTS, y=LABELS.astype(dtype))).labels
    assert labels is not None
    assert labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"data": INPUTS}, "no array named inputs, images or x; it has: data"),
        ({"x": INPUTS, "images": INPUTS}, "images and x, which mean the same"),
        ({"x": INPUTS, "y": LABELS, "labels": LABELS}, "labels and y, which mean the same"),
        ({"x": np.ones((2, 2), dtype=np.int64)}, "are int64; give floats"),
        ({"x": np.ones((2, 2), dtype=bool)}, "are bool; give floats"),
        ({"x": np.array([[1.0, np.nan]])}, "1 of 2 input values .* are NaN or infinite"),
        ({"x": np.array([[1e300, np.inf]])}, "2 of 2 input values"),
        ({"x": np.float32(3)}, r"have shape \(\)"),
        ({"x": np.ones((0, 3), dtype=np.float32)}, r"have shape \(0, 3\)"),
        ({"x": INPUTS, "y": LABELS.astype(float)}, "are float64; give integers"),
        ({"x": INPUTS, "y": LABELS[:3]}, r"have shape \(3,\) beside 4 inputs"),
        ({"x": INPUTS, "y": LABELS[:, None]}, r"have shape \(4, 1\)"),
        ({"x": np.array([{}], dtype=object)}, "not a readable .npz file of plain numbers"),
        ({"x": np.array(["a"])}, "not a readable .npz file of plain numbers"),
    ],
)
def test_arrays_that_are_refused(npz: Any, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(EvenbitsError, match=message):
        read_arrays(npz(**arrays))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 damaged", b"\x93NUMPY damaged"])
def test_damaged_files(tmp_path: pathlib.Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(EvenbitsError, match="not a readable"):
        read_arrays(path)


def test_paths_that_are_no_arrays(tmp_path: pathlib.Path) -> None:
    with pytest.raises(EvenbitsError, match=r"'.txt'; give a file that ends in .npy, .npz or .safetensors"):
        read_arrays(tmp_path / "a.txt")
    with pytest.raises(EvenbitsError, match="is not a file"):
        read_arrays(tmp_path / "absent.npz")


def test_batches_cover_every_row_once() -> None:
    inputs = torch.arange(10).view(5, 2)
    assert [part.shape[0] for part in batches(inputs, 2)] == [2, 2, 1]
    assert torch.cat(list(batches(inputs, 2))).equal(inputs)
    with pytest.raises(EvenbitsError, match="batch size of 0"):
        batches(inputs, 0)
