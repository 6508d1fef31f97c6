"""`diagnose`: what a quantization run does to every layer, without keeping the quantized model.

    errors        per layer, isolated and cumulative                              (layer_errors.py)
    ranges        what each input quantizer spans before and after smoothing      (layer_ranges.py)
    looks         what the pictures of chosen layers show                         (layer_looks.py)
    accuracy      float, unsmoothed, smoothed, compared item by item              (scoring.py)
    convergence   the same calibration on 25, 50, 100, … samples                  (convergence.py)

The result is a value: the command line prints it, reporting/ draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from evenbits.errors import EvenbitsError
from evenbits.evaluation.result import Evaluation, finite
from evenbits.evaluation.tasks import evaluate, task_function
from evenbits.nn.layout import layout_of
from evenbits.pipeline.convergence import Convergence, check_sizes, convergence, samples_of, too_few
from evenbits.pipeline.layer_errors import LayerErrors, layer_errors
from evenbits.pipeline.layer_looks import LayerLook, layer_looks
from evenbits.pipeline.layer_ranges import RangeRow, layer_ranges
from evenbits.pipeline.prepare import Prepared, preparing
from evenbits.pipeline.result import RegionRow
from evenbits.pipeline.scoring import Accuracy, Score, accuracy
from evenbits.schemes.scheme import Scheme

_WORST = 3


@dataclass(frozen=True)
class Diagnosis:
    """Everything a diagnosis found. float_layers: layers and matrices that stay float, with the reason."""

    scheme: dict[str, Any]
    method: str
    options: dict[str, Any]
    errors: LayerErrors
    ranges: tuple[RangeRow, ...]
    regions: tuple[RegionRow, ...]
    looks: tuple[LayerLook, ...]
    float_layers: tuple[tuple[str, str], ...]
    accuracy: Accuracy | None
    convergence: Convergence | None
    calibration_batches: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; infinite and absent figures are null."""
        plain: dict[str, Any] = finite(asdict(self))
        return plain


def diagnose(
    model: nn.Module,
    *,
    scheme: str | Path | Mapping[str, Any] | Scheme = "W8A8",
    method: str | None = None,
    data: Iterable[Any],
    layers: Sequence[str] = (),
    task: str | None = None,
    evaluation: Any = None,
    tokenizer: Any = None,
    task_options: Mapping[str, Any] | None = None,
    sizes: Sequence[int] = (),
    orders: int = 3,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Diagnosis:
    """Quantizes beside the model, measures, and leaves the model as it was, bit for bit.

    scheme, method, data, options: as in `quantize`; the data is walked several times, so what can be walked only once
    is read into a list first (inputs, never activations).
    layers: which to look at closely; by default the three of the largest isolated L1 loss.
    task, evaluation: a task of `evaluate` and its data, to score the float model, the quantized one without the balance
    method and with it; task_options: further options of the task.
    sizes: numbers of calibration samples, ascending, to see whether the statistics settle; orders: random orders of the
    samples; seed: of the first order.

    Raises EvenbitsError as `quantize` does, and for a layer that is not quantized, a task without data, and sizes
    beyond the data.
    """
    if (task is None) != (evaluation is None):
        raise EvenbitsError("an end metric needs both a task and the data to score (--task and --data).")
    if task is not None:
        task_function(task)
    if sizes:
        check_sizes(sizes, orders)
    data = _again(data)
    _check(model, data, layers, sizes)
    given: dict[str, Any] = {"scheme": scheme, "method": method, "data": data, "progress": progress, "options": options}
    with preparing(model, "diagnose", keep=False, **given) as prepared:
        ranges = {} if prepared.watched is None else prepared.watched.ranges
        seen = [plan.name for plan in prepared.chosen if plan.name in ranges and ranges[plan.name].seen]
        for name in layers:
            _check_layer(name, prepared, seen)
        score = None if task is None else _scorer(task, _again(evaluation), tokenizer, task_options or {})
        return _measured(model, prepared, data, tuple(dict.fromkeys(layers)), score, sizes, orders, seed, progress)


def _measured(
    model: nn.Module,
    prepared: Prepared,
    data: Iterable[Any],
    layers: tuple[str, ...],
    score: Score | None,
    sizes: Sequence[int],
    orders: int,
    seed: int,
    progress: bool,
) -> Diagnosis:
    batches, watched = prepared.batches, prepared.watched
    assert batches is not None and watched is not None  # there is data

    def runs() -> Iterator[Callable[[], Any]]:
        return (lambda batch=batch: batches.run(batch) for batch in data)  # type: ignore[misc]

    total = len(data) if isinstance(data, Sized) else None
    errors = layer_errors(model, prepared, runs(), total=total, progress=progress)
    ranges = layer_ranges(model, prepared, watched)
    wanted = layers or tuple(row.name for row in errors.worst_first if row.isolated_l1 is not None)[:_WORST]
    rows = {row.name: row for row in ranges}
    first = next(samples_of(batches.kept))
    looks = layer_looks(
        model, prepared, watched.ranges, [rows[name] for name in wanted], runs(), lambda: batches.run(first),
        total=total, progress=progress,
    )  # fmt: skip
    scored = None if score is None else accuracy(model, prepared, score)
    settling = None
    if sizes:
        settling = convergence(
            model, prepared, watched, data, sizes, orders=orders, seed=seed, score=score, baseline=scored,
            run=batches.run, progress=progress,
        )  # fmt: skip
    return Diagnosis(
        scheme=prepared.scheme.to_json(),
        method=prepared.methods.name,
        options=prepared.methods.options,
        errors=errors,
        ranges=ranges,
        regions=prepared.balanced.rows,
        looks=looks,
        float_layers=tuple((plan.name, plan.reason) for plan in prepared.plans if plan.reason),
        accuracy=scored,
        convergence=settling,
        calibration_batches=watched.batches,
        notes=(*prepared.parts.notes(model), *prepared.norms, *prepared.balanced.notes),
    )


def _again(data: Any) -> Any:
    """Data that can be walked again; an iterator is read into a list."""
    return list(data) if isinstance(data, Iterator) else data


def _check(model: nn.Module, data: Any, layers: Sequence[str], sizes: Sequence[int]) -> None:
    """What can be refused before anything runs: a misspelt layer, sizes beyond a list of batches."""
    if isinstance(model, nn.Module):
        known = [name for name, module in model.named_modules() if layout_of(module) is not None]
        for name in layers:
            if name not in known:
                nearest = ", ".join(get_close_matches(name, known, n=3, cutoff=0.0)) or "none"
                raise EvenbitsError(f"the model has no layer {name!r}; the nearest names: {nearest}.")
    if sizes and isinstance(data, (list, tuple)):
        samples = sum(1 for _ in samples_of(data))
        if samples < sizes[-1]:
            raise too_few(samples, sizes[-1])


def _check_layer(name: str, prepared: Prepared, seen: Sequence[str]) -> None:
    if name not in seen:
        reasons = {plan.name: plan.reason for plan in prepared.plans}
        why = reasons.get(name) or "it did not run on the calibration data"
        raise EvenbitsError(f"there is nothing to draw of layer {name!r}: {why}.")


def _scorer(task: str, data: Any, tokenizer: Any, options: Mapping[str, Any]) -> Score:
    def score(model: nn.Module) -> Evaluation:
        return evaluate(model, task=task, data=data, tokenizer=tokenizer, **options)

    return score
