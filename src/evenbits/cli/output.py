"""Standard output belongs to the result. While a command works, whatever libraries print goes to standard error."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import typer

from evenbits.cli.detach import Lines, detach, is_inside


class Interrupted(SystemExit):
    """Ctrl-C in a command that has kept something, with the words that say what; main() prints them."""


@contextlib.contextmanager
def working(log: Path | None = None) -> Iterator[None]:
    """Sends prints inside the block to standard error.

    log: of --detach. The command then goes on in a session of its own, and this process ends here.
    """
    inside = is_inside()
    if log is not None and not inside:
        note(detach(log))
        raise typer.Exit
    lines = contextlib.redirect_stderr(cast(IO[str], Lines(sys.stderr))) if inside else contextlib.nullcontext()
    with lines, contextlib.redirect_stdout(sys.stderr):
        yield


def emit(data: dict[str, Any]) -> None:
    """Prints one JSON object."""
    print(json.dumps(data, allow_nan=False))


def note(text: str) -> None:
    """A line for the person at the terminal, on standard error."""
    print(text, file=sys.stderr)
