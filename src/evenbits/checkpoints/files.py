"""Files written whole or not at all, and files read only if they are what was written.

A folder is built under a temporary name beside its place and renamed when it is complete; a failure removes it. Every
file is listed with its length and SHA-256, so that a truncated, altered or exchanged file is noticed before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evenbits.errors import CheckpointError, EvenbitsError

CONFIG = "evenbits.json"
WEIGHTS = "evenbits.safetensors"
_CONFIG_LIMIT = 256 * 1024 * 1024
_CHUNK = 1 << 20
_READ = (".json", ".safetensors", ".model", ".bin")  # what loaders read; a README beside them is nobody's business


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raises EvenbitsError unless a checkpoint may be written at `path`."""
    if path.exists() and not path.is_dir():
        raise EvenbitsError(f"{path} is a file; an output is a folder. Choose another name.")
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise EvenbitsError(f"the output folder {path} exists; choose another name or allow overwriting it.")
        if not (path / CONFIG).exists():
            raise EvenbitsError(f"{path} holds something other than an evenbits checkpoint; it is not overwritten.")
    if not path.absolute().parent.is_dir():
        raise EvenbitsError(f"the folder {path.absolute().parent} does not exist; make it first.")


@contextmanager
def whole_folder(path: Path, *, overwrite: bool, needed: int) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends, and is removed if it fails.

    needed: bytes about to be written. Raises EvenbitsError for a full disk (before and while writing) and for an
    existing output.
    """
    check_output(path, overwrite=overwrite)
    parent = path.absolute().parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise EvenbitsError(
            f"writing {path} needs {needed:,} bytes and {parent} has {free:,} free; nothing was written. "
            "Free some space or choose another disk."
        )
    partial = parent / f".{path.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        partial.mkdir()
        yield partial
        _sync(partial)
        _put_in_place(partial, path)
    except OSError as error:
        raise EvenbitsError(f"writing {path} failed ({error}); nothing was written.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    aside = partial.with_suffix(".old")
    path.rename(aside)
    try:
        partial.rename(path)
    except OSError:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes evenbits.json into `folder`, with the lengths and hashes of all other files and a checksum of itself."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())}
    config = {**config, "files": files}
    config["checksum"] = _checksum(config)
    (folder / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """Reads and checks evenbits.json (its own checksum; not the other files). Raises CheckpointError."""
    path = folder / CONFIG
    if not folder.is_dir() or not path.is_file():
        raise CheckpointError(f"{folder} is not an evenbits checkpoint: it has no {CONFIG}.")
    if path.stat().st_size > _CONFIG_LIMIT:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; a real one is far smaller.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Quantize the model again.") from error
    if not isinstance(config, dict) or config.get("format") != "evenbits":
        raise CheckpointError(f"{path} does not describe an evenbits checkpoint.")
    return config


def check_config(folder: Path, config: dict[str, Any], version: int) -> None:
    """Raises CheckpointError if evenbits.json is of another version or was altered after it was written."""
    if config.get("format_version") != version:
        raise CheckpointError(
            f"{folder} was written in format version {config.get('format_version')!r}; this evenbits reads version "
            f"{version}. Use the evenbits that wrote it ({config.get('evenbits_version')!r}) or quantize again."
        )
    try:
        checksum = _checksum(config)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}.") from error
    if config.get("checksum") != checksum:
        raise CheckpointError(f"{folder / CONFIG} was altered after it was written. Quantize the model again.")


def check_files(folder: Path, config: dict[str, Any]) -> None:
    """Raises CheckpointError if a listed file is missing, cut short or altered."""
    files = config.get("files")
    if not isinstance(files, dict) or WEIGHTS not in files:
        raise CheckpointError(f"{folder / CONFIG} does not list {WEIGHTS}.")
    for name, entry in files.items():
        path = folder / name
        if not _plain_name(name) or path.is_symlink() or not isinstance(entry, dict):
            raise CheckpointError(f"{folder / CONFIG} lists {name!r}, which is not a plain file of this folder.")
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {name}; it was removed or renamed. Quantize the model again.")
        if path.stat().st_size != entry.get("bytes"):
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes instead of {entry.get('bytes')!r}: it was cut short or "
                "altered. Copy it again or quantize again."
            )
        if sha256(path) != entry.get("sha256"):
            raise CheckpointError(f"{path} was altered after it was written (its SHA-256 differs). Copy it again.")
    strangers = sorted(p.name for p in folder.iterdir() if p.suffix in _READ and p.name not in (*files, CONFIG))
    if strangers:
        raise CheckpointError(f"{folder} holds {strangers[0]!r}, which evenbits did not write; take it out.")


def _plain_name(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and name not in (".", "..")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _checksum(config: dict[str, Any]) -> str:
    rest = {key: value for key, value in config.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()
