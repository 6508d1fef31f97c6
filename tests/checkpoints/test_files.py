"""Folders written whole or not at all, and files that are noticed when they are not what was written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evenbits.checkpoints import files
from evenbits.checkpoints.files import (
    CONFIG,
    WEIGHTS,
    check_config,
    check_files,
    check_output,
    read_config,
    sha256,
    whole_folder,
    write_config,
)
from evenbits.errors import CheckpointError, EvenbitsError


def write(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"weights" * 100)
    write_config(folder, {"format": "evenbits", "format_version": 1, "x": "é α"})


def made(path: Path, *, overwrite: bool = False) -> Path:
    with whole_folder(path, overwrite=overwrite, needed=1) as folder:
        write(folder)
    return path


def test_a_folder_appears_whole_and_alone(tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == sorted([CONFIG, WEIGHTS])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    config = read_config(out)
    check_config(out, config, 1)
    check_files(out, config)
    assert config["x"] == "é α"


def test_inside_the_block_the_target_does_not_exist(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out", overwrite=False, needed=1) as folder:
        assert not (tmp_path / "out").exists() and folder.parent == tmp_path and folder.name.startswith(".")
        write(folder)


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt("x"), EvenbitsError("x")], ids=repr)
def test_a_failure_in_the_block_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), whole_folder(tmp_path / "out", overwrite=False, needed=1) as folder:
        write(folder)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_overwriting_leaves_the_old_one(tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    before = sha256(out / WEIGHTS)
    with pytest.raises(RuntimeError), whole_folder(out, overwrite=True, needed=1) as folder:
        (folder / WEIGHTS).write_bytes(b"new")
        raise RuntimeError
    assert sha256(out / WEIGHTS) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_of_the_last_rename_puts_the_old_one_back(tmp_path: Path, monkeypatch: Any) -> None:
    out = made(tmp_path / "out")
    before, original = sha256(out / WEIGHTS), Path.rename

    def rename(self: Path, target: Any) -> Any:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "broken disk")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(EvenbitsError, match=r"broken disk.*nothing was written"):
        made(out, overwrite=True)
    assert sha256(out / WEIGHTS) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_error_while_writing_is_an_evenbits_error(tmp_path: Path) -> None:
    with (
        pytest.raises(EvenbitsError, match=r"No space left.*nothing was written") as caught,
        whole_folder(tmp_path / "out", overwrite=False, needed=1) as folder,
    ):
        write(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert isinstance(caught.value.__cause__, OSError) and list(tmp_path.iterdir()) == []


def test_too_little_space_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    with (
        pytest.raises(EvenbitsError, match=r"needs 1,000 bytes and .* has 999 free; nothing was written"),
        whole_folder(tmp_path / "out", overwrite=False, needed=1000),
    ):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "out", overwrite=False, needed=999) as folder:
        write(folder)


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    (out / "stale").write_text("old")
    made(out, overwrite=True)
    assert not (out / "stale").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_may_be_written_over(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=overwrite)
    check_output(tmp_path / "new", overwrite=overwrite)
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    ours = made(tmp_path / "ours")
    for path in (tmp_path / "file", tmp_path / "foreign", tmp_path / "no" / "parent", tmp_path / "file" / "below"):
        with pytest.raises(EvenbitsError):
            check_output(path, overwrite=overwrite)
    if overwrite:
        check_output(ours, overwrite=True)
    else:
        with pytest.raises(EvenbitsError, match="exists; choose another name"):
            check_output(ours, overwrite=False)
    assert (tmp_path / "foreign" / "thesis.tex").exists()


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    made(tmp_path / "out")
    assert (tmp_path / "out" / CONFIG).exists()


def test_a_relative_name_with_dots_and_spaces_works(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a b.c", "v1.old", ".hidden", "ünïcode"):
        made(Path(name))
        made(Path(name), overwrite=True)
        assert (tmp_path / name / CONFIG).exists()
    assert len(list(tmp_path.iterdir())) == 4


def test_hashes_and_checksum_are_what_they_say(tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    data = (out / WEIGHTS).read_bytes()
    assert config["files"] == {WEIGHTS: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    rest = {key: value for key, value in config.items() if key != "checksum"}
    assert config["checksum"] == hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def test_infinite_numbers_are_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_config(tmp_path, {"format": "evenbits", "x": float("nan")})


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_nan_in_json_is_refused(value: str, tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    text = (out / CONFIG).read_text(encoding="utf-8")
    (out / CONFIG).write_text(text.replace('"é α"', value).replace('"\\u00e9 \\u03b1"', value), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{value} is not JSON"):
        read_config(out)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"3", b'"evenbits"', b"{}", b'{"format": "other"}', b"\xff\xfe{}", b"{" * 100_000,
     b'{"format":' + b"[" * 200_000, b'{"format": "evenbits", "n": ' + b"9" * 10_000 + b"}"],
)  # fmt: skip
def test_a_config_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        check_config(tmp_path, read_config(tmp_path), 1)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("depth", [10, 500, 900, 940, 960, 980, 990, 1000, 2000, 5000, 50_000])
def test_deep_nesting_is_a_checkpoint_error_at_every_depth(depth: int, tmp_path: Path) -> None:
    deep = "[" * depth + "]" * depth
    (tmp_path / CONFIG).write_text(f'{{"format": "evenbits", "format_version": 1, "checksum": "0", "deep": {deep}}}')
    with pytest.raises(CheckpointError):
        check_config(tmp_path, read_config(tmp_path), 1)


def test_a_giant_config_is_not_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(files, "_CONFIG_LIMIT", 10)
    (tmp_path / CONFIG).write_text('{"format": "evenbits"}')
    with pytest.raises(CheckpointError, match="far smaller"):
        read_config(tmp_path)


def test_a_folder_of_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dir" / CONFIG).mkdir(parents=True)
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file", tmp_path / "dir"):
        with pytest.raises(CheckpointError, match="is not an evenbits checkpoint"):
            read_config(path)


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5, [1]])
def test_another_version_is_refused(version: Any, tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    config = {**read_config(out), "format_version": version}
    with pytest.raises(CheckpointError, match="reads version 1"):
        check_config(out, config, 1)


def test_every_change_of_the_config_is_noticed(tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    config = read_config(out)
    for change in ({"x": "e"}, {"new": 1}, {"files": {}}, {"checksum": None}, {"checksum": "0" * 64}):
        with pytest.raises(CheckpointError, match="altered"):
            check_config(out, {**config, **change}, 1)
    without = {key: value for key, value in config.items() if key != "x"}
    with pytest.raises(CheckpointError, match="altered"):
        check_config(out, without, 1)


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "\ud800", "a\nb", "con/../x", "x/", "./x", "\\..\\x"],
)
def test_a_name_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    (tmp_path / "outside").write_text("secret")
    config = read_config(out)
    entry = {"bytes": 6, "sha256": sha256(tmp_path / "outside")}
    with pytest.raises(CheckpointError):
        check_files(out, {**config, "files": {**config["files"], name: entry}})


@pytest.mark.parametrize("files_table", [None, [], {}, "x", {"other": {"bytes": 1, "sha256": ""}}, 5])
def test_a_table_without_the_weights_is_refused(files_table: Any, tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    with pytest.raises(CheckpointError, match="does not list"):
        check_files(out, {"files": files_table})


@pytest.mark.parametrize("entry", [None, [], "x", {}, {"bytes": 700}, {"bytes": "700", "sha256": ""}, {"bytes": 700.5}])
def test_a_malformed_entry_is_refused(entry: Any, tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    with pytest.raises(CheckpointError):
        check_files(out, {"files": {WEIGHTS: entry}})


def test_a_link_is_refused_even_to_the_right_bytes(tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    (out / WEIGHTS).rename(tmp_path / "elsewhere")
    (out / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="not a plain file"):
        check_files(out, read_config(out))
