"""Standard output belongs to the result. While a command works, whatever libraries print goes to standard error."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any


class Interrupted(SystemExit):
    """Ctrl-C in a command that has kept something, with the words that say what; main() prints them."""


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Sends prints inside the block to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def emit(data: dict[str, Any]) -> None:
    """Prints one JSON object."""
    print(json.dumps(data, allow_nan=False))


def note(text: str) -> None:
    """A line for the person at the terminal, on standard error."""
    print(text, file=sys.stderr)
