"""What is trained on what: the parts of a model, the examples, and the figure that says how good it has become."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from evenbits.data.labelled import Labelled, read_labelled
from evenbits.errors import EvenbitsError, MissingExtraError
from evenbits.evaluation import class_metrics
from evenbits.training.bert import bert
from evenbits.training.mobilenet import load_folded, mobilenet
from evenbits.training.pictures import network_input, read_cifar10
from evenbits.training.recipe import Recipe

_CALIBRATION = 64  # pictures from which BatchNorm starts


@dataclass(frozen=True)
class Examples:
    """The stored inputs of a split, N rows each, and their classes int64 [N]."""

    inputs: tuple[Tensor, ...]
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """parts: by name, in order; ready: stored inputs → what the first part takes; metric: (guesses, classes) → figure;
    metric_name: what the figure is called.
    """

    parts: dict[str, nn.Module]
    train: Examples
    test: Examples
    ready: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    metric: Callable[[Tensor, Tensor], float]
    metric_name: str


def build(recipe: Recipe, data: Path) -> Task:
    """The task of a recipe, from files below `data`; the model's new weights come from the recipe's seed.

    Raises EvenbitsError for what is missing or damaged.
    """
    torch.manual_seed(recipe.seed)
    return _pictures(recipe, data) if recipe.task == "cifar10" else _sentences(recipe, data)


def accuracy(guesses: Tensor, classes: Tensor) -> float:
    """Share of right guesses."""
    return float((guesses == classes).double().mean())


def matthews(guesses: Tensor, classes: Tensor) -> float:
    """Matthews correlation of two classes, 0 and 1; 0 if either side is constant."""
    found = float(class_metrics.matthews(class_metrics.count(guesses.tolist(), classes.tolist(), 2))[0])
    return 0.0 if math.isnan(found) else found


def _pictures(recipe: Recipe, data: Path) -> Task:
    def examples(split: str, limit: int) -> Examples:
        pictures, labels = read_cifar10(data / "cifar10", split, limit or None)
        return Examples((pictures,), labels)

    def ready(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (network_input(inputs[0], recipe.size),)

    train, parts = examples("train", recipe.train), mobilenet()
    if recipe.weights:
        spread = torch.linspace(0, len(train.labels) - 1, min(_CALIBRATION, len(train.labels))).long()
        load_folded(parts, data / recipe.weights, ready((train.inputs[0][spread],))[0])
    return Task(parts, train, examples("test", recipe.test), ready, accuracy, "accuracy")


def _sentences(recipe: Recipe, data: Path) -> Task:
    folder = data / recipe.weights
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "a text recipe") from error
    if not (folder / "config.json").is_file():
        raise EvenbitsError(f"{folder} is no folder of a BERT (config.json, model.safetensors, tokenizer files).")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)

    def examples(files: list[str], limit: int) -> Examples:
        found = [_labelled(data / recipe.task / name, recipe.task) for name in files]
        texts = [t for part in found for t in part.texts]
        seconds = [t for part in found for t in part.text_pairs or ()] or None
        labels = torch.tensor([label for part in found for label in part.labels])
        kept = slice(None, limit or None)
        coded = tokenizer(
            texts[kept],
            seconds if seconds is None else seconds[kept],
            padding="max_length",
            truncation=True,
            max_length=recipe.size,
            return_tensors="pt",
        )
        marks = coded["attention_mask"] * (1 + coded["token_type_ids"])
        return Examples((coded["input_ids"], marks), labels[kept])

    cola = recipe.task == "cola"
    train = examples(["in_domain_train.tsv"] if cola else ["train.tsv"], recipe.train)
    test = examples(["in_domain_dev.tsv", "out_of_domain_dev.tsv"] if cola else ["test.tsv"], recipe.test)
    figure, name = (matthews, "Matthews correlation") if cola else (accuracy, "accuracy")
    return Task(bert(folder, 2), train, test, lambda inputs: inputs, figure, name)


def _labelled(file: Path, task: str) -> Labelled:
    return read_labelled(file, label_names=["entailment", "not_entailment"] if task == "rte" else None)


def order(examples: Examples, seed: int, step: int, batch: int) -> Tensor:
    """The places of one step's examples. A function of its arguments alone, so that a resumed run continues with the
    same ones: a new permutation per epoch, the rest that fills no batch left out.
    """
    per_epoch = max(1, len(examples.labels) // batch)
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed << 20 | epoch)
    return torch.randperm(len(examples.labels), generator=generator)[place * batch : (place + 1) * batch]
