"""Perplexity: how surprised a causal language model is by text.

loss = (sum over predicted tokens of -ln p(token | the tokens before it)) / (number of predicted tokens)
perplexity = exp(loss), bits per token = loss / ln 2. Lower is better; values compare only between models that share a
tokenizer, on the same text, treated alike. The treatment matters, so it is written into the notes of the result:

one document    as in most published tables, the token stream is cut in blocks of the context length, and the first
                token of each block, which has nothing before it, is not predicted. A `stride` below the context makes
                blocks overlap, so that all tokens but the first are predicted once, with more before them, for more
                time.
several         each is scored alone from its own start and truncated to the context length; truncate=False cuts long
                documents in blocks as above.

A document always goes through the model alone: no padding, no batch.
Source of the two treatments: Hugging Face, "Perplexity of fixed-length models".
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from evenbits.data.text import Documents, Tokenizer, read_text, token_ids
from evenbits.errors import EvenbitsError
from evenbits.evaluation.intervals import bootstrap_ratio
from evenbits.evaluation.result import Evaluation
from evenbits.evaluation.running import evaluating, logits_of, progress_bar

DEFAULT_CONTEXT = 1024
Source = str | os.PathLike[str] | Documents | Sequence[str] | Sequence[torch.Tensor]


def perplexity(
    model: torch.nn.Module,
    data: Source,
    *,
    tokenizer: Tokenizer | None = None,
    context: int | None = None,
    stride: int | None = None,
    truncate: bool | None = None,
    progress: bool = True,
    max_documents: int | None = None,
) -> Evaluation:
    """Perplexity of a causal language model, with a 95 % bootstrap interval over documents.

    model: takes ids int64 [1, T], answers logits [1, T, V] (a tensor, an object with .logits, a mapping).
    data: path of a text file (read_text says how it is split), Documents, a list of texts, or, without a tokenizer,
        a sequence of id tensors int64 [T].
    context: longest input in tokens; the model's config.max_position_embeddings by default, else 1024.
    stride: tokens between the starts of two blocks; the context by default, which means no overlap.
    truncate: whether a document ends at the context length; by default yes for several documents without a stride.
    max_documents: scores the first ones only.

    Metrics: perplexity, loss_per_token (nats), bits_per_token, tokens (predicted ones). n counts scored documents,
    items are (summed nats, predicted tokens) of each.
    Raises EvenbitsError for data that cannot be read or holds nothing to predict, options that contradict each other,
    and logits that are NaN or do not fit the ids, naming the document.
    """
    sequences = _sequences(data, tokenizer, max_documents)
    context = _context(model, context)
    truncate = _check_cut(stride, truncate, context, len(sequences))
    step = context if stride is None else stride
    kept = [ids[:context] for ids in sequences] if truncate else sequences
    items = _scores(model, kept, context, step, progress)
    if not items:
        raise EvenbitsError("no document has two tokens or more, so there is nothing to predict; give longer text")
    return _result(items, _notes([ids.numel() for ids in sequences], context, step, truncate))


def _scores(
    model: torch.nn.Module, sequences: Sequence[torch.Tensor], context: int, step: int, progress: bool
) -> list[tuple[float, int]]:
    """(nats, predicted tokens) of every id tensor [T] of two tokens or more."""
    items = []
    tokens = sum(ids.numel() for ids in sequences)
    with evaluating(model) as device, progress_bar("perplexity", tokens, "token", progress) as advance:
        for index, ids in enumerate(sequences, start=1):
            if ids.numel() < 2:
                continue
            try:
                _check_ids(ids, _config_number(model, "vocab_size"))
                items.append(_score(model, ids.to(device), context, step, advance))
            except EvenbitsError as err:
                raise EvenbitsError(f"document {index} of {len(sequences)}: {err}") from err
    return items


def _sequences(data: Source, tokenizer: Tokenizer | None, limit: int | None) -> list[torch.Tensor]:
    """The data as id tensors int64 [T], one per document, special tokens of the tokenizer included."""
    if limit is not None and limit < 1:
        raise EvenbitsError(f"max_documents={limit}; give a whole number from 1, or None for all")
    if isinstance(data, (str, os.PathLike)):
        data = read_text(data, max_documents=limit)
    documents: Iterable[Any] = data.texts if isinstance(data, Documents) else data
    found = [_ids(document, tokenizer, index) for index, document in enumerate(islice(documents, limit), start=1)]
    if not found:
        raise EvenbitsError("there are no documents to score; give at least one")
    return found


def _ids(document: Any, tokenizer: Tokenizer | None, index: int) -> torch.Tensor:
    """One document, text or id tensor, as int64 [T]."""
    if isinstance(document, str):
        if tokenizer is None:
            raise EvenbitsError("the data is text and there is no tokenizer; give tokenizer=, or id tensors as data")
        return torch.tensor(token_ids(tokenizer, document, special=True), dtype=torch.int64)
    if not isinstance(document, torch.Tensor) or document.dtype != torch.int64 or document.ndim != 1:
        shape = f" {document.dtype} {tuple(document.shape)}" if isinstance(document, torch.Tensor) else ""
        raise EvenbitsError(
            f"document {index} is a {type(document).__name__}{shape}; give texts, or tensors int64 [T] of token ids"
        )
    return document


def _context(model: torch.nn.Module, given: int | None) -> int:
    """The context length in tokens: the given one if the model has room for it, else the model's."""
    limit = _config_number(model, "max_position_embeddings")
    if given is None:
        return limit or DEFAULT_CONTEXT
    if given < 2:
        raise EvenbitsError(f"context={given}; give at least 2 tokens, one to read and one to predict")
    if limit is not None and given > limit:
        raise EvenbitsError(f"context={given} is more than the model's {limit} positions; give at most {limit}")
    return given


def _config_number(model: torch.nn.Module, name: str) -> int | None:
    """A positive whole number from the model's config; None where it has no such thing."""
    value = getattr(getattr(model, "config", None), name, None)
    return value if isinstance(value, int) and value > 0 else None


def _check_cut(stride: int | None, truncate: bool | None, context: int, documents: int) -> bool:
    """Whether documents are truncated; raises for a stride that is out of range or has nothing to do."""
    if stride is None:
        return documents > 1 if truncate is None else truncate
    if not 1 <= stride <= context:
        raise EvenbitsError(f"stride={stride}; give a number of tokens from 1 to the context, {context}")
    if truncate:
        raise EvenbitsError("truncate=True leaves one block per document and stride nothing to do; give one of the two")
    return False


def _blocks(length: int, context: int, step: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first predicted token) of the blocks that cover `length` tokens.

    No token is predicted twice, and the first token of a block is never predicted: nothing stands before it. Blocks
    that would predict nothing are left out.
    """
    done = 0
    for start in range(0, length, step):
        end = min(start + context, length)
        first = max(done, start + 1)
        if first < end:
            yield start, end, first
        done = end
        if end == length:
            return


def _score(
    model: torch.nn.Module, ids: torch.Tensor, context: int, step: int, advance: Callable[[int], Any]
) -> tuple[float, int]:
    """Summed negative log-likelihood in nats and number of predicted tokens of ids [T]."""
    nats, tokens = 0.0, 0
    for start, end, first in _blocks(ids.numel(), context, step):
        logits_TV = _logits(model, ids[start:end])[first - start - 1 : -1].float()
        targets_T = ids[first:end]
        _check_ids(targets_T, logits_TV.shape[1])
        loss = torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum").item()
        if not math.isfinite(loss):
            kind = "NaN" if bool(logits_TV.isnan().any()) else "infinite"
            raise EvenbitsError(f"the model's logits are {kind}; the model is broken, or its dtype overflows")
        nats, tokens = nats + loss, tokens + targets_T.numel()
        advance(targets_T.numel())
    return nats, tokens


def _check_ids(ids: torch.Tensor, classes: int | None) -> None:
    """Raises for ids that are not among the model's `classes` tokens; None where their number is not known."""
    if classes is not None and (int(ids.min()) < 0 or int(ids.max()) >= classes):
        raise EvenbitsError(
            f"token ids from {int(ids.min())} to {int(ids.max())} and a model of {classes} tokens; give the tokenizer "
            "that belongs to the model"
        )


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits [T, V] for ids [T]."""
    logits = logits_of(model(ids.unsqueeze(0)))
    if logits.ndim != 3 or logits.shape[:2] != (1, ids.numel()):
        raise EvenbitsError(
            f"{ids.numel()} tokens gave logits of shape {tuple(logits.shape)}; a causal language model gives "
            f"(1, {ids.numel()}, vocabulary)"
        )
    return logits[0]


def _notes(lengths: Sequence[int], context: int, step: int, truncate: bool) -> tuple[str, ...]:
    """What was done to documents that are longer than the context or too short to score."""
    notes = []
    longer = [length for length in lengths if length > context]
    if longer and truncate:
        lost = sum(longer) - context * len(longer)
        notes.append(
            f"{len(longer)} of {len(lengths)} documents were truncated to the context of {context} tokens; "
            f"{lost} of {sum(lengths)} tokens were not scored"
        )
    elif longer and step == context:
        notes.append(
            f"{len(longer)} of {len(lengths)} documents were cut in blocks of {context} tokens without overlap; the "
            "first token of each block was not predicted"
        )
    elif longer:
        notes.append(f"{len(longer)} of {len(lengths)} documents were cut in blocks of {context} tokens every {step}")
    unscored = sum(length < 2 for length in lengths)
    if unscored:
        notes.append(f"{unscored} of {len(lengths)} documents have fewer than 2 tokens and were not scored")
    return tuple(notes)


def _result(items: Sequence[tuple[float, int]], notes: tuple[str, ...]) -> Evaluation:
    nats, counts = [item[0] for item in items], [item[1] for item in items]
    loss = sum(nats) / sum(counts)
    interval = bootstrap_ratio(nats, counts, transform=np.exp)
    if interval is None:
        notes += ("one document: no interval, since it says nothing about how documents differ",)
    metrics = {
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "loss_per_token": loss,
        "bits_per_token": loss / math.log(2),
        "tokens": float(sum(counts)),
    }
    return Evaluation("perplexity", metrics, len(items), interval, tuple(items), notes)
