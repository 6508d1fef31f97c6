"""The table of evaluation tasks. A new task is one function that returns an Evaluation, and one line here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from evenbits.errors import unknown_name
from evenbits.evaluation.result import Evaluation

TASKS: dict[str, str] = {
    "perplexity": "evenbits.evaluation.perplexity:perplexity",
    "classification": "evenbits.evaluation.classification:classification",
}


def task_function(name: str) -> Callable[..., Evaluation]:
    """The function of a task, imported on first use.

    Raises EvenbitsError for a name that is not in TASKS.
    """
    if name not in TASKS:
        raise unknown_name("evaluation task", name, TASKS)
    module, _, function = TASKS[name].partition(":")
    found: Callable[..., Evaluation] = getattr(importlib.import_module(module), function)
    return found


def evaluate(model: torch.nn.Module, *, task: str, data: Any, tokenizer: Any = None, **options: Any) -> Evaluation:
    """Scores a model on one task; see the function of the task for `data` and the options.

    model: the module to score; it is left in the mode it was in.
    task: a name in TASKS.
    tokenizer: a transformers tokenizer where the data is text.

    Raises EvenbitsError for an unknown task, an option the task does not have, and whatever the task finds wrong.
    """
    function = task_function(task)
    allowed = set(inspect.signature(function).parameters) - {"model", "data", "tokenizer"}
    for option in options:
        if option not in allowed:
            raise unknown_name(f"option of task {task!r}", option, allowed)
    return function(model, data, tokenizer=tokenizer, **options)
