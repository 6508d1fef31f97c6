"""Text files to documents, documents to blocks of token ids."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.data.text import Documents, builtin_calibration, read_text, special_ids, token_blocks, token_ids
from evenbits.errors import EvenbitsError


class Letters:
    """One id per character, between optional special ids; refuses to be called in a way that would warn."""

    def __init__(self, before: list[int], after: list[int]) -> None:
        self.before, self.after = before, after

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, Any]:
        assert not verbose
        body = [ord(letter) for letter in text]
        return {"input_ids": [*self.before, *body, *self.after] if add_special_tokens else body}


BERT_LIKE = Letters([1], [2])


def written(folder: pathlib.Path, content: str, name: str = "text.txt") -> pathlib.Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8"))
    return path


def test_plain_file_is_one_document_to_the_letter(tmp_path: pathlib.Path) -> None:
    assert read_text(written(tmp_path, " one\r\ntwo \n")) == Documents((" one\ntwo \n",), None)


def test_end_of_text_separates_and_blank_documents_are_dropped(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, "a b\n<|endoftext|>\n\n<|endoftext|> c <|endoftext|>")
    assert read_text(path) == Documents(("a b", "c"), "<|endoftext|>")
    assert read_text(path, max_documents=1).texts == ("a b",)
    assert read_text(path, separator="").texts == (path.read_text(),)


def test_own_separator(tmp_path: pathlib.Path) -> None:
    assert read_text(written(tmp_path, "a\n\nb\n\n\n\nc"), separator="\n\n") == Documents(("a", "b", "c"), "\n\n")


def test_characters_are_counted_before_splitting(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, "abc<|endoftext|>defg")
    assert read_text(path, max_characters=18).texts == ("abc", "de")
    lines = written(tmp_path, '{"text": "abc"}\n{"text": "defg"}\n{"text": "h"}', "a.jsonl")
    assert read_text(lines, max_characters=5).texts == ("abc", "de")
    assert read_text(lines, max_characters=3).texts == ("abc",)


def test_json_lines(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, '{"text": "a\\nb", "id": 1}\n\n{"text": "c"}\n', "a.jsonl")
    assert read_text(path) == Documents(("a\nb", "c"), "\n")


def test_byte_order_mark_is_dropped(tmp_path: pathlib.Path) -> None:
    assert read_text(written(tmp_path, "\ufeffabc")).texts == ("abc",)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "a.txt", "is empty"),
        (" \n", "a.txt", "is empty"),
        ("<|endoftext|> \n", "a.txt", "no text besides separators"),
        ('{"text": "a"}\n{"body": "b"}', "a.jsonl", r'line 2: no string under the key "text".*body'),
        ('{"text": "a"}\n["b"]', "a.jsonl", "line 2: a list"),
        ("plain", "a.jsonl", "line 1: not JSON"),
    ],
)
def test_files_without_documents(tmp_path: pathlib.Path, content: str, name: str, message: str) -> None:
    with pytest.raises(EvenbitsError, match=message):
        read_text(written(tmp_path, content, name))


def test_paths_that_are_no_text(tmp_path: pathlib.Path) -> None:
    with pytest.raises(EvenbitsError, match="there is no file"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(EvenbitsError, match="is a folder"):
        read_text(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 bar")
    with pytest.raises(EvenbitsError, match=r"not UTF-8 text \(byte 3 is 0xe9\)"):
        read_text(tmp_path / "latin.txt")


def test_options_that_make_no_sense(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, "abc")
    with pytest.raises(EvenbitsError, match="max_documents=0"):
        read_text(path, max_documents=0)
    with pytest.raises(EvenbitsError, match="max_characters=-1"):
        read_text(path, max_characters=-1)
    with pytest.raises(EvenbitsError, match="holds a document per line"):
        read_text(written(tmp_path, '{"text": "a"}', "a.jsonl"), separator="x")


def test_builtin_calibration_is_text_or_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: pathlib.Path(package))
    with pytest.raises(EvenbitsError, match="reinstall evenbits"):
        builtin_calibration()


def test_special_ids_are_found_around_a_probe() -> None:
    assert special_ids(BERT_LIKE) == ([1], [2])
    assert special_ids(Letters([7, 8], [])) == ([7, 8], [])
    assert special_ids(Letters([], [])) == ([], [])


def test_special_ids_use_the_text_when_the_probes_are_unknown() -> None:
    class Greek(Letters):
        def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, Any]:
            known = "".join(letter for letter in text if letter >= "α")
            return super().__call__(known, add_special_tokens=add_special_tokens, verbose=verbose)

    assert special_ids(Greek([1], [2]), "λόγος") == ([1], [2])
    with pytest.raises(EvenbitsError, match="cannot tell which special tokens"):
        special_ids(Greek([1], [2]))


def test_blocks_are_wrapped_and_the_short_one_is_kept() -> None:
    blocks = token_blocks(BERT_LIKE, ["abcde", "fg"], length=5)
    assert [block.tolist() for block in blocks] == [
        [[1, *map(ord, "abc"), 2]],
        [[1, *map(ord, "def"), 2]],
        [[1, ord("g"), 2]],
    ]
    assert {block.dtype for block in blocks} == {torch.int64}


def test_limit_counts_blocks() -> None:
    assert len(token_blocks(BERT_LIKE, ["abcdefgh"], length=4, limit=3)) == 3
    assert len(token_blocks(BERT_LIKE, ["abcdefgh"], length=4, limit=9)) == 4


@given(st.lists(st.text("abc", max_size=9), min_size=1), st.integers(3, 12), st.sampled_from([[], [1]]))
def test_no_token_is_lost_or_invented(texts: list[str], length: int, before: list[int]) -> None:
    joined = "".join(texts)
    if not joined:
        with pytest.raises(EvenbitsError, match="gave no tokens"):
            token_blocks(Letters(before, [2]), texts, length=length)
        return
    blocks = token_blocks(Letters(before, [2]), texts, length=length)
    assert all(block.shape == (1, length) for block in blocks[:-1])
    assert blocks[-1].shape[1] <= length
    assert "".join(chr(i) for block in blocks for i in block[0, len(before) : -1].tolist()) == joined


def test_blocks_refuse_what_cannot_work() -> None:
    with pytest.raises(EvenbitsError, match="leaves no room beside 2 special tokens"):
        token_blocks(BERT_LIKE, ["abc"], length=2)
    with pytest.raises(EvenbitsError, match="0 texts gave no tokens"):
        token_blocks(BERT_LIKE, [], length=8)
    with pytest.raises(EvenbitsError, match="one string; give a list"):
        token_blocks(BERT_LIKE, "abc", length=8)
    with pytest.raises(EvenbitsError, match="limit=0"):
        token_blocks(BERT_LIKE, ["abc"], length=8, limit=0)


@pytest.mark.data
@pytest.mark.parametrize(
    ("model", "before", "after"), [("stories260k_llama", [1], []), ("minilm_glue/sst2", [101], [102])]
)
def test_transformers_tokenizers(test_data: pathlib.Path, model: str, before: list[int], after: list[int]) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(test_data / model)
    texts = read_text(test_data / "caltext" / "tiny.utf8", max_characters=20_000).texts
    assert special_ids(tokenizer) == (before, after)
    blocks = token_blocks(tokenizer, texts, length=64)
    inner = [i for block in blocks for i in block[0, len(before) : block.shape[1] - len(after)].tolist()]
    assert inner == [i for text in texts for i in token_ids(tokenizer, text, special=False)]
    assert all(block[0, : len(before)].tolist() == before for block in blocks)
