"""Tables for a terminal: figures, sizes, and text that survives whatever it contains."""

from __future__ import annotations

from typing import Any

import pytest

from evenbits.reporting.tables import figure, notes, show, size, table


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        ("", "–"),
        ("name", "name"),
        (0, "0"),
        (1234567, "1,234,567"),
        (True, "True"),
        (0.0, "0.0000"),
        (0.12345, "0.1235"),
        (-9.99, "-9.9900"),
        (10.0, "10.00"),
        (-123.456, "-123.46"),
        (float("inf"), "inf"),
    ],
)
def test_figures(value: Any, expected: str) -> None:
    assert figure(value) == expected


def test_notes_name_layers_together() -> None:
    assert notes([("a", ""), ("b", "")]) == []
    assert notes([("a", "odd"), ("b", ""), ("c", "odd"), ("d", "late")]) == ["odd: a, c.", "late: d.", ""]
    assert notes([(f"l{i}", "odd") for i in range(10)])[0].endswith("l7 and 2 more.")


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (10_700_000, "10.70 MB"), (2_500_000_000, "2.50 GB")],
)
def test_sizes(nbytes: int, expected: str) -> None:
    assert size(nbytes) == expected


def test_a_table_shows_title_columns_and_cells(capsys: pytest.CaptureFixture[str]) -> None:
    show(table("Two layers", ["layer", "bits"], [("a", 8.25), ("b", None)]))
    out = capsys.readouterr().out
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[0] == "Two layers" and lines[1].split() == ["layer", "bits"]
    assert lines[2].split() == ["a", "8.2500"] and lines[3].split() == ["b", "–"]
    assert lines[2].index("8.2500") + len("8.2500") == lines[3].index("–") + 1  # figures are right-aligned


@pytest.mark.parametrize("text", ["[bold]", "[/x]", "a[0]", "[red]x[/red]", "\\[x]", "[link=file:///etc]y"])
def test_brackets_are_no_markup_anywhere(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder called [/x] once crashed the table of its layers."""
    show(table(f"title {text}", [f"column {text}"], [(f"cell {text}",)]), f"line {text}")
    out = capsys.readouterr().out
    for part in ("title", "column", "cell", "line"):
        assert f"{part} {text}" in out


def test_a_long_line_is_not_broken_when_piped(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/a" * 200
    show(f"Written to {path}, read back")
    assert capsys.readouterr().out == f"Written to {path}, read back\n"


def test_long_names_are_kept_whole_across_lines(capsys: pytest.CaptureFixture[str]) -> None:
    name = "".join(f"layer{index}." for index in range(60))
    show(table("t", ["layer", "bits"], [(name, 8.0)]))
    out = capsys.readouterr().out
    assert "".join(out.split()).replace("8.0000", "").endswith(name)
    assert "8.0000" in out and "…" not in out


def test_an_empty_table_has_its_head(capsys: pytest.CaptureFixture[str]) -> None:
    show(table("none", ["a", "b"], []), "")
    assert capsys.readouterr().out.split() == ["none", "a", "b"]


def test_nothing_but_text_is_written_when_piped(capsys: pytest.CaptureFixture[str]) -> None:
    show(table("t", ["a"], [("x",)]))
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out and captured.err == ""
