"""Results as terminal tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, left: int = 1) -> Table:
    """A table whose first `left` columns are text and the others right-aligned figures."""
    # Text, not str: a bracket in a name is no markup.
    made = Table(
        title=Text(title), title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False
    )
    for index, column in enumerate(columns):
        # Names fold rather than vanish in a narrow terminal.
        made.add_column(
            Text(column), justify="left" if index < left else "right", overflow="fold", no_wrap=index >= left
        )
    for row in rows:
        made.add_row(*(Text(figure(cell)) for cell in row))
    return made


def figure(value: Any) -> str:
    """A cell: floats with sensible digits, None as a dash, whole numbers with thousands separators."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def size(nbytes: int) -> str:
    """Bytes as a person reads them: 10.7 MB (decimal units)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} bytes"


def notes(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of (name, what to know about it), names with the same note together: "33 columns stored as 34: a, b."."""
    together: dict[str, list[str]] = {}
    for name, note in pairs:
        if note:
            together.setdefault(note, []).append(name)
    lines = []
    for note, names in together.items():
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        lines.append(f"{note}: {', '.join(names[:8])}{more}.")
    return [*lines, ""] if lines else []


def show(*parts: Any) -> None:
    """Prints tables and lines to standard output; wide tables are not cut when output is piped."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    for part in parts:
        # Lines are not wrapped: a path must survive copying.
        console.print(part, markup=False, soft_wrap=True) if isinstance(part, str) else console.print(part)
