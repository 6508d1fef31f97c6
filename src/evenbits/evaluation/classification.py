"""Classification: how often the class with the largest logit is the right one.

Accuracy with a 95 % Wilson interval, the Matthews correlation and, for two classes, F1 (evaluation/class_metrics.py).
Sentences are tokenized batch by batch in the order of the data, padded to the longest of the batch and truncated.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch

from evenbits.data.arrays import ARRAY_SUFFIXES, Arrays, batches, read_arrays
from evenbits.data.labelled import Labelled, read_labelled
from evenbits.data.text import Tokenizer
from evenbits.errors import EvenbitsError
from evenbits.evaluation.class_metrics import METRICS, count
from evenbits.evaluation.intervals import wilson
from evenbits.evaluation.result import Evaluation
from evenbits.evaluation.running import evaluating, logits_of, progress_bar

Batch = tuple[Any, torch.Tensor]
Source = str | os.PathLike[str] | Labelled | Arrays | Iterable[Batch]


def classification(
    model: torch.nn.Module,
    data: Source,
    *,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 32,
    max_length: int = 128,
    log_probabilities: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Accuracy of a classifier, with a 95 % Wilson interval.

    model: takes inputs [N, ...], or what the tokenizer gives as keywords, and answers logits [N, classes] (a tensor, an
        object with .logits, a mapping).
    data: path of a .tsv, .csv or .jsonl file of labelled sentences, or of a .npz or .safetensors file of arrays;
        Labelled; Arrays; or an iterable of (inputs, labels) batches, where inputs is a tensor or a mapping of keyword
        arguments and labels is a tensor of integers [N].
    batch_size: inputs per call of the model; batches handed in keep their own size.
    max_length: longest sentence in tokens; the rest is truncated.
    log_probabilities: keep those of every class for every input (4 bytes each), so that two models can be compared by
        their divergence (evaluation/divergence.py).

    Metrics: accuracy, matthews and, for two classes, f1. items are 1 (right) or 0 (wrong) per input, outcomes the
    predicted and the true class.
    Raises EvenbitsError for unreadable or empty data, sentences without a tokenizer, labels that are not classes of the
    model, and logits that are NaN or not [N, classes].
    """
    pairs, total = _batches(data, tokenizer, batch_size, max_length)
    predicted: list[torch.Tensor] = []
    true: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    classes = 0
    with evaluating(model) as device, progress_bar("classification", total, "batch", progress) as advance:
        for inputs, labels in pairs:
            logits = _logits(model, inputs, device)
            classes = logits.shape[1]
            labels = labels.to(device)
            _check(logits, labels, done=sum(len(part) for part in true))
            predicted.append(logits.argmax(dim=1).cpu())
            true.append(labels.cpu().to(torch.int64))
            kept.extend([logits.float().log_softmax(dim=1).cpu()] if log_probabilities else [])
            advance(1)
    if not true:
        raise EvenbitsError("there is nothing to classify: the data gave no batches")
    return _result(torch.cat(predicted), torch.cat(true), classes, torch.cat(kept) if kept else None)


def _batches(
    data: Source, tokenizer: Tokenizer | None, size: int, max_length: int
) -> tuple[Iterable[Batch], int | None]:
    """The data as (inputs, labels) batches, and how many there are where that is known."""
    if size < 1:
        raise EvenbitsError(f"batch_size={size}; give a whole number from 1")
    if isinstance(data, (str, os.PathLike)):
        data = read_arrays(data) if Path(data).suffix in ARRAY_SUFFIXES else read_labelled(data)
    if isinstance(data, Labelled):
        if tokenizer is None:
            raise EvenbitsError("the data is sentences and there is no tokenizer; give tokenizer=")
        if size > 1 and getattr(tokenizer, "pad_token", "") is None:
            raise EvenbitsError("the tokenizer has no pad_token, so sentences cannot be batched; give batch_size=1")
        return _sentence_batches(data, tokenizer, size, max_length), math.ceil(len(data.texts) / size)
    if isinstance(data, Arrays):
        if data.labels is None:
            raise EvenbitsError("the arrays have no labels; store them as 'labels' or 'y' beside the inputs")
        parts = zip(batches(data.inputs, size), batches(data.labels, size), strict=True)
        return parts, math.ceil(len(data.inputs) / size)
    return _checked_batches(data), len(data) if isinstance(data, Sized) else None


def _sentence_batches(data: Labelled, tokenizer: Tokenizer, size: int, max_length: int) -> Iterator[Batch]:
    for start in range(0, len(data.texts), size):
        cut = slice(start, start + size)
        sentences = [list(data.texts[cut])] + ([list(data.text_pairs[cut])] if data.text_pairs else [])
        inputs = tokenizer(
            *sentences, padding=size > 1, truncation=True, max_length=max_length, return_tensors="pt", verbose=False
        )
        yield inputs, torch.tensor(data.labels[cut], dtype=torch.int64)


def _checked_batches(data: Iterable[Any]) -> Iterator[Batch]:
    for index, batch in enumerate(data, start=1):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], torch.Tensor):
            raise EvenbitsError(
                f"batch {index} is a {type(batch).__name__}; give (inputs, labels) pairs with a tensor of labels [N]"
            )
        labels = batch[1]
        if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
            raise EvenbitsError(
                f"the labels of batch {index} are {labels.dtype} {tuple(labels.shape)}; give integers [N]"
            )
        if labels.numel():
            yield batch[0], labels


def _logits(model: torch.nn.Module, inputs: Any, device: torch.device) -> torch.Tensor:
    """The model's logits [N, classes] for one batch, moved to the model's device."""
    if isinstance(inputs, torch.Tensor):
        output = model(inputs.to(device))
    elif isinstance(inputs, Mapping):
        output = model(
            **{name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        )
    else:
        raise EvenbitsError(f"the inputs are a {type(inputs).__name__}; give a tensor or a mapping of keyword tensors")
    logits = logits_of(output)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise EvenbitsError(
            f"the model gave logits of shape {tuple(logits.shape)}; a classifier gives [N, two classes or more]"
        )
    return logits


def _check(logits: torch.Tensor, labels: torch.Tensor, done: int) -> None:
    """Raises for logits and labels that do not fit each other; `done` inputs came before these."""
    count, classes = logits.shape
    if len(labels) != count:
        raise EvenbitsError(f"a batch of {len(labels)} labels gave logits for {count} inputs; give one label per input")
    broken = logits.isnan().any(dim=1).nonzero()
    if len(broken):
        raise EvenbitsError(
            f"the logits of input {done + int(broken[0]) + 1} are NaN; the model is broken, or its dtype overflows"
        )
    outside = ((labels < 0) | (labels >= classes)).nonzero()
    if len(outside):
        first = int(outside[0])
        raise EvenbitsError(
            f"input {done + first + 1} has label {int(labels[first])}; the model has {classes} classes, so labels go "
            f"from 0 to {classes - 1}"
        )


def _result(
    predicted: torch.Tensor, true: torch.Tensor, classes: int, log_probabilities: torch.Tensor | None
) -> Evaluation:
    """Metrics of predicted [N] and true [N] classes."""
    outcomes = tuple(zip(predicted.tolist(), true.tolist(), strict=True))
    items, counts = tuple(int(a == b) for a, b in outcomes), count(predicted.tolist(), true.tolist(), classes)
    metrics = {name: float(metric(counts)[0]) for name, metric in METRICS.items() if name != "f1" or classes == 2}
    notes: tuple[str, ...] = ()
    if math.isnan(metrics["matthews"]):
        metrics["matthews"] = 0.0
        notes = ("matthews is 0 by convention: the predictions or the labels are all one class",)
    interval = wilson(sum(items), len(items))
    return Evaluation("classification", metrics, len(items), interval, items, notes, outcomes, log_probabilities)
