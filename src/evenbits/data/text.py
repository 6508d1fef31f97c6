"""Text: files -> documents, documents -> blocks of token ids.

A tokenizer is any callable with the signature of a transformers tokenizer,
`tokenizer(text, add_special_tokens=..., verbose=...)["input_ids"] -> list[int]`; it is handed in, never loaded here.
"""

from __future__ import annotations

import importlib.resources
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evenbits.errors import EvenbitsError

if TYPE_CHECKING:
    import torch

END_OF_TEXT = "<|endoftext|>"
PROBES = ("a", "the", "0", ".")


class Tokenizer(Protocol):
    """What evenbits asks of a tokenizer: to be called as a transformers tokenizer is."""

    def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
        """A mapping with at least the key `input_ids`."""


@dataclass(frozen=True)
class Documents:
    """Texts that are scored or tokenized one by one.

    texts: the documents, none of them empty.
    separator: the string that stood between them in the file; None where the file is one document.
    """

    texts: tuple[str, ...]
    separator: str | None = None


def read_utf8(path: str | os.PathLike[str]) -> str:
    """The whole text of a file: UTF-8, a leading byte-order mark dropped, line ends as "\\n".

    Raises EvenbitsError for a path that is missing, a folder, unreadable, empty or not UTF-8.
    """
    file = Path(path)
    if file.is_dir():
        raise EvenbitsError(f"{file} is a folder; give a file in it")
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise EvenbitsError(f"there is no file {file}; give the path of an existing text file") from None
    except OSError as err:
        raise EvenbitsError(f"{file} cannot be read: {err.strerror or err}") from err
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise EvenbitsError(
            f"{file} is not UTF-8 text (byte {err.start} is 0x{raw[err.start]:02x}); save it as UTF-8"
        ) from None
    if not text.strip():
        raise EvenbitsError(f"{file} is empty; give a file with text in it")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_lines(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) for every line of `text` that is not blank.

    Raises EvenbitsError naming file `name` and line for a line that is not one JSON object.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as err:
            raise EvenbitsError(f"{name}, line {number}: not JSON ({err}); give one JSON object per line") from None
        if not isinstance(record, dict):
            raise EvenbitsError(f"{name}, line {number}: a {type(record).__name__}; give one JSON object per line")
        yield number, record


def read_text(
    path: str | os.PathLike[str],
    *,
    separator: str | None = None,
    max_documents: int | None = None,
    max_characters: int | None = None,
) -> Documents:
    """The documents of a text file.

    A `.jsonl` file holds one document per line under the key "text" and takes no separator. Any other file is split at
    `separator`; without one it is split at <|endoftext|> where that occurs and is one document otherwise, and
    separator="" keeps it one document always. Documents are stripped of surrounding blanks and empty ones are dropped;
    a file that is one document is kept to the letter. `max_characters` cuts the text before it is split (of a `.jsonl`
    file: the texts counted together), `max_documents` counts documents after.

    Raises EvenbitsError for a file that is missing, a folder, empty or not UTF-8, and for a limit below 1.
    """
    _check_limit("max_documents", max_documents)
    _check_limit("max_characters", max_characters)
    text = read_utf8(path)
    if Path(path).suffix == ".jsonl":
        if separator is not None:
            raise EvenbitsError(
                f"separator {separator!r} was given for {path}: a .jsonl file holds a document per line"
            )
        pieces, split_at = _clip(_jsonl_texts(text, str(path)), max_characters), "\n"
    else:
        found = (END_OF_TEXT if END_OF_TEXT in text else None) if separator is None else (separator or None)
        text = text[:max_characters]
        if found is None:
            return Documents((text,), None)
        pieces, split_at = iter(text.split(found)), found
    documents = (piece.strip() for piece in pieces if piece.strip())
    texts = tuple(itertools.islice(documents, max_documents))
    if not texts:
        raise EvenbitsError(f"{path} holds no text besides separators; give a file with text in it")
    return Documents(texts, split_at)


def _check_limit(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise EvenbitsError(f"{name}={value}; give a whole number from 1, or None for no limit")


def _jsonl_texts(text: str, name: str) -> Iterator[str]:
    for number, record in json_lines(text, name):
        value = record.get("text")
        if not isinstance(value, str):
            raise EvenbitsError(f'{name}, line {number}: no string under the key "text"; its keys are {list(record)}')
        yield value


def _clip(texts: Iterable[str], characters: int | None) -> Iterator[str]:
    """The texts up to `characters` characters in all; the one that passes the limit is cut."""
    left = characters
    for text in texts:
        yield text[:left]
        if left is not None:
            left -= len(text)
            if left <= 0:
                return


def builtin_calibration() -> str:
    """The calibration text that ships inside the package, for users who bring none of their own.

    Raises EvenbitsError where the installation lacks the file.
    """
    file = importlib.resources.files("evenbits.data").joinpath("calibration.txt")
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise EvenbitsError("this installation lacks data/calibration.txt; reinstall evenbits") from None


def token_ids(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
    """The ids of one text, neither padded nor truncated; `special` adds what the tokenizer puts around a text.

    verbose=False keeps a transformers tokenizer from warning that the text is longer than its model takes: what is
    made of the ids is cut to the model's length afterwards.
    """
    return [int(i) for i in tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]]


def special_ids(tokenizer: Tokenizer, text: str = "") -> tuple[list[int], list[int]]:
    """The ids a tokenizer puts before and after a text: ([CLS], [SEP]) for BERT, ([bos], []) for Llama.

    Found by encoding a short probe with and without special tokens, since not every tokenizer can be asked; `text`
    gives a further probe for vocabularies that know none of the usual ones.

    Raises EvenbitsError when no probe shows up unchanged between its special tokens.
    """
    for probe in (*PROBES, text[:64]):
        plain, wrapped = (token_ids(tokenizer, probe, special=special) for special in (False, True))
        for start in range(len(wrapped) - len(plain) + 1 if plain else 0):
            if wrapped[start : start + len(plain)] == plain:
                return wrapped[:start], wrapped[start + len(plain) :]
    raise EvenbitsError(
        f"cannot tell which special tokens {type(tokenizer).__name__} adds: the ids of {PROBES[0]!r} with and without "
        "add_special_tokens do not agree; give token ids instead of text"
    )


def token_blocks(
    tokenizer: Tokenizer, texts: Iterable[str], *, length: int, limit: int | None = None
) -> list[torch.Tensor]:
    """Texts cut into blocks of token ids for calibration, without padding.

    tokenizer: called as a transformers tokenizer is.
    texts: documents; their ids are joined in order, nothing between them.
    length: longest block in tokens, special tokens included.
    limit: largest number of blocks; None for all of them.

    Returns int64 [1, T] tensors with T = length, the last one shorter where the ids run out; each block stands between
    the tokenizer's special tokens ([CLS] ... [SEP] for BERT, bos for Llama).
    Raises EvenbitsError for texts without a token, a limit below 1 and a length that leaves no room for the text.
    """
    import torch

    if isinstance(texts, str):
        raise EvenbitsError("texts is one string; give a list of documents: [text]")
    _check_limit("limit", limit)
    documents = list(texts)
    before, after = special_ids(tokenizer, documents[0] if documents else "")
    room = length - len(before) - len(after)
    if room < 1:
        raise EvenbitsError(
            f"length={length} leaves no room beside {len(before) + len(after)} special tokens; give a larger length"
        )
    ids = _joined_ids(tokenizer, documents, None if limit is None else limit * room)
    if not ids:
        raise EvenbitsError(f"{len(documents)} texts gave no tokens; give calibration text that is not empty")
    bodies = (ids[start : start + room] for start in range(0, len(ids), room))
    return [torch.tensor([[*before, *body, *after]], dtype=torch.int64) for body in bodies]


def _joined_ids(tokenizer: Tokenizer, texts: Sequence[str], enough: int | None) -> list[int]:
    """Ids of the texts one after the other; stops reading at `enough` ids."""
    ids: list[int] = []
    for text in texts:
        ids += token_ids(tokenizer, text, special=False)
        if enough is not None and len(ids) >= enough:
            return ids[:enough]
    return ids
