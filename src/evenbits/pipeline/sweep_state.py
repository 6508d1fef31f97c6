"""What an interrupted sweep leaves: one file per finished point, and the key that they belong to.

    STATE/key.json          what the results depend on, hash by hash
    STATE/point-0.05.json   one finished point, with the digest of its key

A file is written under another name, synced and renamed: it is there whole, or not at all. The values of α are no part
of the key, so a finer grid later takes over the points it shares with a coarser one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evenbits.errors import EvenbitsError
from evenbits.pipeline.points import Point

_KEY = "key.json"


class State:
    """A state folder opened for one key. `finished`: name → point, for those that are done."""

    def __init__(self, folder: Path, key: Mapping[str, str], *, restart: bool = False) -> None:
        """Raises EvenbitsError if the folder belongs to another key, naming what changed (unless restart)."""
        self.folder, self.digest = folder, key_digest(key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvenbitsError(f"the state folder {folder} cannot be made: {error}") from error
        if restart:
            for path in self._files():
                path.unlink()
        known = self._known()
        changed = [name for name in sorted({*key, *known}) if known.get(name) != key.get(name)]
        if known and changed:
            raise EvenbitsError(
                f"{folder} holds a sweep with another {', '.join(changed)}. Give another output folder, or --restart "
                "(restart=True) to throw its points away."
            )
        write_json(folder / _KEY, dict(key))

    def finished(self) -> dict[str, dict[str, Any]]:
        """The finished points by name. Raises EvenbitsError for a damaged file."""
        found = {}
        for path in sorted(self.folder.glob("point-*.json")):
            point = _read(path)
            if point.get("key") != self.digest or path != self.path(str(point.get("name"))):
                raise EvenbitsError(f"{path} does not belong to this sweep; take it out, or --restart.")
            found[str(point["name"])] = point
        return found

    def path(self, name: str) -> Path:
        """The file of a point."""
        return self.folder / f"point-{name}.json"

    def _files(self) -> list[Path]:
        return [path for path in (self.folder / _KEY, *self.folder.glob("point-*.json")) if path.exists()]

    def _known(self) -> dict[str, Any]:
        path = self.folder / _KEY
        if path.exists():
            return _read(path)
        if self._files():
            raise EvenbitsError(f"{self.folder} holds points and no {_KEY}; give another output folder, or --restart.")
        return {}


def key_digest(key: Mapping[str, str]) -> str:
    """One hash for a key."""
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()


def write_point(folder: Path, digest: str, point: Point, found: Mapping[str, Any]) -> None:
    """Writes a finished point, whole or not at all."""
    write_json(folder / f"point-{point.name}.json", {"key": digest, **found})


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes one JSON object, whole or not at all. Raises EvenbitsError if the file cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as handle:
            json.dump(data, handle, allow_nan=False)
            handle.write("\n")
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
    except OSError as error:
        raise EvenbitsError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvenbitsError(f"{path} is damaged ({error}); take it out, or --restart.") from error
    if not isinstance(data, dict):
        raise EvenbitsError(f"{path} is damaged; take it out, or --restart.")
    return data
