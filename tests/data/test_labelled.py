"""Labelled sentences in the formats people have."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from evenbits.data.labelled import Labelled, read_labelled
from evenbits.errors import EvenbitsError


def written(folder: pathlib.Path, name: str, content: str) -> pathlib.Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sst.tsv", "0\t\"dull\n1\ta 'joy'\n"),
        ("sst.tsv", "\ufeff0\t\"dull\r\n\r\n1\ta 'joy'\r\n"),
        ("cola.tsv", "\ngj04\t0\t*\t\"dull\ngj04\t1\t\ta 'joy'"),
        ("header.tsv", "Sentence\tLabel\n\"dull\t0\na 'joy'\t1\n"),
        ("header.csv", 'id,text,label\n7,"""dull",0\n8,a \'joy\',1\n'),
        ("bare.csv", '0,"""dull"\n1,a \'joy\'\n'),
        ("lines.jsonl", '{"text": "\\"dull", "label": 0}\n{"text": "a \'joy\'", "label": "1"}\n'),
    ],
)
def test_every_format_reads_alike(tmp_path: pathlib.Path, name: str, content: str) -> None:
    assert read_labelled(written(tmp_path, name, content)) == Labelled(('"dull', "a 'joy'"), (0, 1))


def test_line_separators_inside_a_sentence_are_letters(tmp_path: pathlib.Path) -> None:
    assert read_labelled(written(tmp_path, "a.tsv", "0\ta\u2028b\x85c\n")).texts == ("a\u2028b\x85c",)


def test_limit_stops_reading(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, "a.tsv", "0\ta\n1\tb\noops\tc\n")
    assert read_labelled(path, limit=2).labels == (0, 1)


def test_sentence_pairs_and_label_words(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, "rte.tsv", "index\tsentence1\tsentence2\tlabel\n5\ta\tb\tyes\n6\tc\td\tno\n")
    expected = Labelled(("a", "c"), (1, 0), ("b", "d"))
    assert read_labelled(path, label_names=("no", "yes")) == expected
    with pytest.raises(EvenbitsError, match=r"line 2: label 'yes' is not a whole number.*label_names"):
        read_labelled(path)
    with pytest.raises(EvenbitsError, match="line 3: label 'no' is not in label_names: yes"):
        read_labelled(path, label_names=("yes",))


def test_named_columns(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, "a.csv", "Review,Stars\ngood,5\nbad,1\n")
    assert read_labelled(path, text_column="Review", label_column="Stars") == Labelled(("good", "bad"), (5, 1))
    with pytest.raises(EvenbitsError, match=r"line 2: no column 'label' among .*label_column"):
        read_labelled(path, text_column="Review")
    with pytest.raises(EvenbitsError, match=r"line 2: no text under 'body'"):
        read_labelled(path, text_column="body", label_column="Stars")
    with pytest.raises(EvenbitsError, match=r"line 2: none of the columns sentence, text.*text_column"):
        read_labelled(path, label_column="Stars")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "0\ta\nx\tb\n", "line 2: label 'x' is not a whole number"),
        ("a.tsv", "0\ta\n\n1.0\tb\n", "line 3: label '1.0'"),
        ("a.tsv", "0\ta\n\tb\n", "line 2: label ''"),
        ("a.tsv", "0\ta\n1\tb\tc\n", "line 2: 3 columns where 2 are expected"),
        ("a.tsv", "0\ta\n1\n", "line 2: 1 columns where 2"),
        ("a.tsv", "a b c\n", "line 1: 1 columns and no header"),
        ("a.csv", 'text,label\n"open,1\n', "line 2: not csv"),
        ("a.csv", "text,label\n", "nothing below"),
        ("a.jsonl", '{"text": "a", "label": true}', "line 1: label True"),
        ("a.jsonl", '{"text": "a", "label": 1.5}', "line 1: label 1.5"),
        ("a.jsonl", '{"text": "a"}', "line 1: no column 'label'"),
        ("a.jsonl", '{"text": 3, "label": 1}', "line 1: no text under 'text'"),
        ("a.jsonl", '{"sentence1": "a", "sentence2": "b", "label": 1}\n{"sentence1": "a", "label": 1}', "1 of 2 lines"),
        ("a.tsv", "", "is empty"),
    ],
)
def test_faults_are_named_with_their_line(tmp_path: pathlib.Path, name: str, content: str, message: str) -> None:
    with pytest.raises(EvenbitsError, match=message):
        read_labelled(written(tmp_path, name, content))


def test_limit_must_be_positive(tmp_path: pathlib.Path) -> None:
    with pytest.raises(EvenbitsError, match="limit=0"):
        read_labelled(written(tmp_path, "a.tsv", "0\ta\n"), limit=0)


@pytest.mark.data
@pytest.mark.parametrize(
    ("file", "options", "count", "ones"),
    [
        ("sst2/dev.tsv", {}, 872, 444),
        ("cola/in_domain_dev.tsv", {}, 527, 365),
        ("rte/dev.tsv", {"label_names": ("entailment", "not_entailment")}, 139, None),
    ],
)
def test_glue_files(test_data: pathlib.Path, file: str, options: dict[str, Any], count: int, ones: int | None) -> None:
    read = read_labelled(test_data / file, **options)
    assert len(read.texts) == len(read.labels) == count
    assert set(read.labels) == {0, 1}
    assert ones is None or sum(read.labels) == ones
    assert (read.text_pairs is not None) == file.startswith("rte")
