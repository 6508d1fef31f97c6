"""Pictures from folders, recipes from YAML, state in files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import CheckpointError, EvenbitsError
from evenbits.training import state
from evenbits.training.pictures import network_input, read_cifar10
from evenbits.training.recipe import Recipe, read_recipe, shipped
from evenbits.training.tasks import Examples, matthews, order


def test_the_binary_version(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tables = [torch.randint(256, (4, 3073), dtype=torch.uint8) for _ in range(5)]
    for i, table in enumerate(tables, 1):
        (tmp_path / f"data_batch_{i}.bin").write_bytes(bytes(table.flatten().tolist()))
    pictures, labels = read_cifar10(tmp_path, "train")
    whole = torch.cat(tables)
    assert torch.equal(labels, whole[:, 0].long())
    assert torch.equal(pictures[7, 1, 2, 3], whole[7, 1 + 1024 + 2 * 32 + 3])
    assert read_cifar10(tmp_path, "train", 3)[1].tolist() == whole[[0, 9, 19], 0].tolist()
    (tmp_path / "data_batch_5.bin").write_bytes(b"cut")
    with pytest.raises(EvenbitsError, match="records have 3073 bytes"):
        read_cifar10(tmp_path, "train")


def test_a_table_of_jpegs(tmp_path: Path) -> None:
    from PIL import Image

    files = []
    for value in (0, 255):
        opened = io.BytesIO()
        Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(opened, "JPEG")
        files.append(np.frombuffer(opened.getvalue(), np.uint8))
    offsets = np.array([0, len(files[0]), len(files[0]) + len(files[1])], np.uint32)
    np.savez(tmp_path / "test.npz", jpeg=np.concatenate(files), offsets=offsets, labels=np.array([3, 5], np.uint8))
    pictures, labels = read_cifar10(tmp_path, "test")
    assert pictures.shape == (2, 3, 32, 32) and labels.tolist() == [3, 5]
    made = network_input(pictures, 48)
    assert made.shape == (2, 3, 48, 48) and made[0].max() == -1 and made[1].min() == 1


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(EvenbitsError, match="nothing is downloaded"):
        read_cifar10(tmp_path, "test")


def test_every_recipe_of_the_package_is_one() -> None:
    assert shipped() == ["cifar10_mobilenetv2", "cifar10_mobilenetv2_full", "text_classification"]
    for name in shipped():
        assert read_recipe(name).cuts


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("taks: cola", "Did you mean 'task'"),
        ("task: imagenet", "Allowed: cifar10, cola, rte"),
        ("cuts: stem", "must be a list of names"),
        ("steps: many", "must be int"),
        ("steps: true", "must be int"),
        ("forward: int17:g128", "int17"),
        ("{batch: 10, microbatches: 4}", "cannot be cut into 4"),
        ("- a", "keys and values"),
        ("a: [", "is not YAML"),
    ],
)
def test_recipes_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(EvenbitsError, match=says):
        read_recipe(str(tmp_path / "r.yaml"))


def test_the_codec_between_replicas_is_spelled_with_its_feedback() -> None:
    recipe = Recipe(data_parallel="int4:g128+ef")
    assert recipe.replica_codec == "int4:g128" and recipe.feedback
    assert not Recipe(data_parallel="int8:g128").feedback


def test_every_epoch_sees_every_example_once_and_the_order_follows_from_the_step() -> None:
    examples = Examples((torch.arange(12),), torch.arange(12))
    epochs = [torch.cat([order(examples, 7, 4 * e + i, 3) for i in range(4)]) for e in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(12)) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(order(examples, 7, 5, 3), order(examples, 7, 5, 3))
    assert not torch.equal(order(examples, 8, 5, 3), order(examples, 7, 5, 3))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40))
def test_matthews_is_the_correlation_of_two_columns(pairs: list[tuple[int, int]]) -> None:
    a, b = (torch.tensor(column) for column in zip(*pairs, strict=True))
    if a.unique().numel() < 2 or b.unique().numel() < 2:
        assert matthews(a, b) == 0
    else:
        expected = float(torch.corrcoef(torch.stack([a, b]).double())[0, 1])
        assert matthews(a, b) == pytest.approx(expected, abs=1e-9)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.dictionaries(st.sampled_from(["tensor", "dict", "list"]), inner)
    ),
    max_leaves=12,
)


@given(values)
def test_nested_data_come_back_as_they_were(value: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    assert state.unpack(state.pack(value, tensors), tensors) == value


def test_files_keep_every_bit_and_only_whole_checkpoints_count(tmp_path: Path) -> None:
    x = torch.tensor([float("nan"), -0.0, 1e-45])
    for step in (1, 2, 3):
        folder = state.folder_of(tmp_path, step)
        state.write(folder / "rank0.safetensors", {"x": x, "step": step, "rate": 0.1})
        if step < 3:
            state.complete(folder)
    newest = state.newest(tmp_path)
    assert newest is not None and newest.name == "step-00000002"
    kept = state.read(newest / "rank0.safetensors")
    assert kept["rate"] == 0.1 and torch.equal(kept["x"].view(torch.int32), x.view(torch.int32))
    (newest / "rank0.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        state.read(newest / "rank0.safetensors")
