"""A diagnosis as a folder: diagnosis.json, and every picture as SVG and PNG. Written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evenbits.checkpoints.files import whole_folder
from evenbits.errors import EvenbitsError
from evenbits.pipeline.diagnose import Diagnosis
from evenbits.reporting.convergence_picture import convergence_picture
from evenbits.reporting.pictures import (
    drawing,
    errors_picture,
    histogram_picture,
    ranges_picture,
    require_matplotlib,
    surface_picture,
)

DATA = "diagnosis.json"
_DPI = 130
_SPACE = 64 * 2**20  # asked for before writing; a diagnosis takes a few megabytes


def check_folder(path: Path) -> None:
    """Raises EvenbitsError unless a diagnosis may be written at `path`, and MissingExtraError if it cannot be drawn."""
    require_matplotlib()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise EvenbitsError(f"{path} exists; a diagnosis is written to a new or empty folder. Choose another name.")
    if not path.absolute().parent.is_dir():
        raise EvenbitsError(f"the folder {path.absolute().parent} does not exist; make it first.")


def write_diagnosis(found: Diagnosis, path: Path, title: str) -> list[str]:
    """Draws and writes everything; returns the names of the files. Raises EvenbitsError, with nothing written, if the
    folder is taken or the disk is full."""
    check_folder(path)
    names = [DATA]
    with whole_folder(path, overwrite=False, needed=_SPACE) as folder, drawing():
        (folder / DATA).write_text(json.dumps(found.to_json(), allow_nan=False) + "\n", encoding="utf-8")
        for name, picture in _pictures(found, title):
            picture.savefig(folder / f"{name}.svg", metadata={"Date": None}, dpi=_DPI)
            picture.savefig(folder / f"{name}.png", metadata={"Software": None}, dpi=_DPI)
            names += [f"{name}.svg", f"{name}.png"]
    return names


def _pictures(found: Diagnosis, title: str) -> Iterator[tuple[str, Any]]:
    yield "errors", errors_picture(found.errors, title)
    for number, look in enumerate(found.looks, start=1):
        stem = f"layer{number}-{file_name(look.name)}"
        yield f"{stem}-ranges", ranges_picture(look)
        yield f"{stem}-histogram", histogram_picture(look)
        yield f"{stem}-surface", surface_picture(look)
    if found.convergence is not None:
        yield "convergence", convergence_picture(found.convergence, title)


def file_name(name: str) -> str:
    """A layer's name as part of a file's name: letters, digits, dots and dashes, at most 60 of them."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")[-60:] or "layer"
