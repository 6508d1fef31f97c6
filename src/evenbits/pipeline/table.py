"""A table from a recipe: each run on a fresh model, scored on the same items, compared with float item by item."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from evenbits.checkpoints.sources import Source, open_model
from evenbits.errors import EvenbitsError, unknown_name
from evenbits.evaluation.class_metrics import METRICS, bootstrap_errors
from evenbits.evaluation.divergence import Divergence, divergences, summary
from evenbits.evaluation.paired import paired
from evenbits.evaluation.result import Evaluation, finite
from evenbits.evaluation.tasks import evaluate
from evenbits.pipeline.calibration import calibration
from evenbits.pipeline.methods import Methods, default_method
from evenbits.pipeline.quantize import quantize
from evenbits.pipeline.result import Result
from evenbits.schemes.recipe import Recipe, RecipeRun


@dataclass(frozen=True)
class TableRow:
    """One run. metric: the recipe's figure, or the task's first; standard_error: binomial of accuracy, by bootstrap of
    Matthews and F1; difference, paired_error, p: against float on the same items (p of accuracy only); divergence: from
    float, in nats per item, beside that of the recipe's reference run (classes only)."""

    name: str
    metric: float
    standard_error: float | None
    difference: float | None
    paired_error: float | None
    p: float | None
    bits_per_weight: float
    weight_bytes: int | None
    seconds: float | None
    published: float | None
    divergence: Divergence | None = None


@dataclass(frozen=True)
class Table:
    """A finished table. metric: the figure's name; n: items scored; reference: the run that the divergences of others
    are compared with."""

    title: str
    metric: str
    n: int
    rows: tuple[TableRow, ...]
    reference: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; infinite figures (a perplexity) are null."""
        plain: dict[str, Any] = finite(asdict(self))
        return plain


def make_table(recipe: Recipe, data: Path, *, model: str | None = None, say: Callable[[str], None]) -> Table:
    """Runs a recipe. data: the folder its relative names are below; model: another model in place of the recipe's.

    Raises EvenbitsError for whatever a run raises, naming the run.
    """
    name = model or _below(data, recipe.model)
    source = open_model(name)
    baseline = _scored(recipe, source, data)
    metric = _metric(recipe, baseline)
    if recipe.reference is not None and baseline.log_probabilities is None:
        raise EvenbitsError(
            f"'reference: {recipe.reference}' compares divergences of class probabilities, and task {recipe.task!r} "
            "has none; leave it out."
        )
    rows = [_row("float", metric, baseline, None, None, recipe.published)]
    lost: dict[str, torch.Tensor] = {}
    for run in recipe.runs:
        say(f"{run.name} …")
        try:
            scored, result = _run(recipe, run, name, data)
        except EvenbitsError as error:
            raise EvenbitsError(f"run {run.name!r}: {error}") from error
        rows.append(_row(run.name, metric, scored, baseline, result, run.published))
        if baseline.log_probabilities is not None and scored.log_probabilities is not None:
            lost[run.name] = divergences(baseline.log_probabilities, scored.log_probabilities)
    return Table(recipe.title, metric, baseline.n, _with_divergences(rows, lost, recipe.reference), recipe.reference)


def _with_divergences(
    rows: list[TableRow], lost: dict[str, torch.Tensor], reference: str | None
) -> tuple[TableRow, ...]:
    """The rows with what each lost of float, beside the reference's once all are known."""
    found = {}
    for name, values in lost.items():
        found[name] = summary(values, lost[reference] if reference in lost and name != reference else None)
    return tuple(replace(row, divergence=found.get(row.name)) for row in rows)


def _scored(recipe: Recipe, source: Source, data: Path) -> Evaluation:
    kept = {"log_probabilities": True} if recipe.task == "classification" else {}
    evaluation = _below(data, recipe.evaluation)
    return evaluate(source.model, task=recipe.task, data=evaluation, tokenizer=source.tokenizer, **kept)


def _run(recipe: Recipe, run: RecipeRun, model: str, data: Path) -> tuple[Evaluation, Result]:
    method = run.method or default_method(run.scheme)
    # Before anything is loaded, and so that no option is taken for an argument.
    Methods.parse(method, run.options, run.scheme)
    source = open_model(model)
    given = None if recipe.calibration is None else _below(data, recipe.calibration)
    batches = calibration(given, source.model, source.tokenizer, samples=recipe.samples).batches
    result = quantize(source.model, scheme=run.scheme, method=method, data=batches, progress=True, **dict(run.options))
    return _scored(recipe, source, data), result


def _below(data: Path, name: str) -> str:
    """A name of the recipe as a path below the data folder if there is such a thing, else as it is (a hub id)."""
    return str(data / name) if (data / name).exists() else name


def _metric(recipe: Recipe, baseline: Evaluation) -> str:
    if recipe.metric is None:
        return next(iter(baseline.metrics))
    if recipe.metric not in baseline.metrics:
        raise unknown_name(f"metric of task {recipe.task!r}", recipe.metric, baseline.metrics)
    return recipe.metric


def _row(
    name: str,
    metric: str,
    scored: Evaluation,
    baseline: Evaluation | None,
    result: Result | None,
    published: float | None,
) -> TableRow:
    value = scored.metrics[metric]
    error, paired_error, p = _errors(metric, scored, scored if baseline is None else baseline)
    return TableRow(
        name=name,
        metric=value,
        standard_error=error,
        difference=None if baseline is None else value - baseline.metrics[metric],
        paired_error=None if baseline is None else paired_error,
        p=None if baseline is None else p,
        bits_per_weight=32.0 if result is None else 32 * result.weight_bytes / result.float_weight_bytes,
        weight_bytes=None if result is None else result.weight_bytes,
        seconds=None if result is None else result.seconds,
        published=published,
    )


def _errors(metric: str, scored: Evaluation, baseline: Evaluation) -> tuple[float | None, float | None, float | None]:
    """Standard error of the figure and of its difference to float, and McNemar's p. A share of items has closed forms;
    other figures of classes are drawn again, and have no p; a perplexity has neither here."""
    if metric == "accuracy":
        share, compared = scored.metrics[metric], paired(baseline.items, scored.items)
        return sqrt(share * (1 - share) / scored.n), compared.standard_error, compared.p
    if metric in METRICS and scored.outcomes:
        return (*bootstrap_errors(metric, baseline.outcomes, scored.outcomes), None)
    return None, None, None
