"""Labelled sentences: tsv, csv and JSON lines -> texts, labels and, where there are two sentences, the second ones.

Formats, by suffix and first line:
  .jsonl               one object per line, keys named as the columns below
  .csv                 comma-separated with the usual quoting
  anything else        tab-separated; a quotation mark is a letter like any other, as in the GLUE files
  a header line        columns "label" and "sentence" or "text", or "sentence1" and "sentence2"
  two columns          no header: label, text (SST-2)
  four columns         no header: source, label, star, sentence (CoLA)
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenbits.data.text import json_lines, read_utf8
from evenbits.errors import EvenbitsError

TEXT_COLUMNS = ("sentence", "text", "sentence1")
SECOND_COLUMNS = {"sentence1": "sentence2"}
LABEL_COLUMN = "label"
HEADERLESS = {2: (LABEL_COLUMN, "text"), 4: ("source", LABEL_COLUMN, "star", "sentence")}
WHOLE_NUMBER = re.compile(r"-?[0-9]+")
Row = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class Labelled:
    """Sentences with their classes.

    texts, labels: N each; a label is the index of its class.
    text_pairs: N second sentences for tasks about two sentences (RTE); None for tasks about one.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    text_pairs: tuple[str, ...] | None = None


def read_labelled(
    path: str | os.PathLike[str],
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    limit: int | None = None,
) -> Labelled:
    """The labelled sentences of a .tsv, .csv or .jsonl file (formats: head of this module).

    text_column, label_column: names in the header line; a file read with either of them must have a header.
    label_names: for files whose labels are words: the word at index i is class i.
    limit: reads the first `limit` sentences only; None for all.

    Raises EvenbitsError for a file that cannot be read or recognised, and naming the line for a label that is not a
    whole number (or not in label_names), a missing text, and a line with too many or too few columns.
    """
    if limit is not None and limit < 1:
        raise EvenbitsError(f"limit={limit}; give a whole number from 1, or None for no limit")
    name = str(path)
    texts: list[str] = []
    pairs: list[str] = []
    labels: list[int] = []
    for number, row in _rows(path, named=bool(text_column or label_column)):
        where = f"{name}, line {number}"
        column = text_column or _text_column(row, where)
        texts.append(_text(row, column, where))
        second = SECOND_COLUMNS.get(column)
        if second in row:
            pairs.append(_text(row, second, where))
        labels.append(_label(row, label_column or LABEL_COLUMN, label_names, where))
        if len(texts) == limit:
            break
    if not texts:
        raise EvenbitsError(f"{name} has a header line and nothing below it; give a file with sentences")
    if pairs and len(pairs) != len(texts):
        raise EvenbitsError(
            f"{name}: {len(pairs)} of {len(texts)} lines have a second sentence; give it for all or none"
        )
    return Labelled(tuple(texts), tuple(labels), tuple(pairs) or None)


def _rows(path: str | os.PathLike[str], named: bool) -> Iterator[Row]:
    """(line number, row) of a file; `named` says that a table must have a header."""
    name, text = str(path), read_utf8(path)
    if Path(path).suffix == ".jsonl":
        return json_lines(text, name)
    return _table(text, name, Path(path).suffix == ".csv", named)


def _table(text: str, name: str, is_csv: bool, named: bool) -> Iterator[Row]:
    """Rows of a tsv or csv file as dicts from column name to string."""
    lines = _csv_lines(text, name) if is_csv else _tsv_lines(text)
    columns: Sequence[str] | None = None
    for number, fields in lines:
        if columns is None:
            lowered = [field.strip().lower() for field in fields]
            if named or (LABEL_COLUMN in lowered and any(column in lowered for column in TEXT_COLUMNS)):
                columns = [field.strip() for field in fields] if named else lowered
                continue
            columns = _headerless_columns(fields, f"{name}, line {number}")
        if len(fields) != len(columns):
            raise EvenbitsError(
                f"{name}, line {number}: {len(fields)} columns where {len(columns)} are expected ({', '.join(columns)})"
            )
        yield number, dict(zip(columns, fields, strict=True))


def _tsv_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.split("\t")


def _csv_lines(text: str, name: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield reader.line_num, fields
    except csv.Error as err:
        raise EvenbitsError(f"{name}, line {reader.line_num}: not csv ({err})") from None


def _headerless_columns(fields: Sequence[str], where: str) -> tuple[str, ...]:
    columns = HEADERLESS.get(len(fields))
    if columns is None:
        raise EvenbitsError(
            f"{where}: {len(fields)} columns and no header line that names {LABEL_COLUMN!r} and one of "
            f"{', '.join(TEXT_COLUMNS)}; add such a line, or name the columns with text_column and label_column"
        )
    return columns


def _text_column(row: dict[str, Any], where: str) -> str:
    for column in TEXT_COLUMNS:
        if column in row:
            return column
    raise EvenbitsError(
        f"{where}: none of the columns {', '.join(TEXT_COLUMNS)} among {list(row)}; name the right one with text_column"
    )


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise EvenbitsError(f"{where}: no text under {column!r}; the columns are {list(row)}")
    return value


def _label(row: dict[str, Any], column: str, names: Sequence[str] | None, where: str) -> int:
    if column not in row:
        raise EvenbitsError(f"{where}: no column {column!r} among {list(row)}; name the right one with label_column")
    value = row[column]
    if names is not None:
        if value not in names:
            raise EvenbitsError(f"{where}: label {value!r} is not in label_names: {', '.join(names)}")
        return list(names).index(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and WHOLE_NUMBER.fullmatch(value.strip()):
        return int(value)
    raise EvenbitsError(
        f"{where}: label {value!r} is not a whole number; give class indices from 0, or the class words in order as "
        "label_names"
    )
