"""`sweep`: the score over α, with float, no smoothing and α = auto beside it, all on the same samples.

Points are finished one by one and kept in a state folder (sweep_state.py), so that a sweep that was interrupted
continues where it stood. A point that fails does not stop the others.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from evenbits.errors import EvenbitsError
from evenbits.nn.base import check_formats
from evenbits.pipeline.activations import is_searched
from evenbits.pipeline.methods import Methods
from evenbits.pipeline.points import Point, make_points, parse_alphas
from evenbits.pipeline.sweep_bench import Bench, Experiment
from evenbits.pipeline.sweep_result import Sweep, summarise
from evenbits.pipeline.sweep_state import State
from evenbits.pipeline.workers import run_here, run_in_processes, termination_as_interrupt
from evenbits.schemes.scheme import Scheme, resolve


def sweep(
    model: str | os.PathLike[str] | nn.Module | Callable[[], nn.Module],
    *,
    task: str,
    data: Any,
    alpha: str | float | Sequence[float] = "0.05:0.95:0.05",
    scheme: str | Path | Mapping[str, Any] | Scheme = "W8A8",
    method: str = "smoothquant",
    calibration: str | os.PathLike[str] | Iterable[Any] | None = None,
    samples: int = 128,
    sequence_length: int = 128,
    batch_size: int = 8,
    ignore: Sequence[str] = (),
    dtype: str = "float32",
    tokenizer: Any = None,
    separator: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
    auto: bool = True,
    state: str | os.PathLike[str] | None = None,
    restart: bool = False,
    jobs: int = 1,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Sweep:
    """Quantizes and scores a model for every α, and as float, without smoothing and (auto) with α by search.

    model:       what `evenbits quantize` takes, a function that makes the float module, or a module, which is copied
                 for each point. It must give the same weights each time.
    task, data:  as for `evaluate`; data may be FILE.py:batches, too. evaluation: further options of the task.
    alpha:       "LOW:HIGH:STEP", "0.3,0.5,0.7", or numbers from 0 to 1.
    scheme, method, options: as for `quantize`, the method with a balance method that has an α.
    calibration: a path or FILE.py:batches (samples, sequence_length, batch_size say how much of it is read) or batches.
    state:       folder that keeps finished points; a sweep of the same key continues there. restart throws them away.
    jobs:        processes; they share this process's threads. A module or function must then be one that can be sent.
    say:         receives a line for every finished point, with the time that is left.

    Raises EvenbitsError for whatever is given wrongly, for a state folder of another key, and, after all other points
    are done and kept, for points that failed, naming their α.
    """
    experiment = Experiment(
        model, task, data, _scheme(scheme, ignore), method, options, calibration, samples, sequence_length,
        batch_size, dtype, tokenizer, separator, dict(evaluation or {}),
    )  # fmt: skip
    points = make_points(parse_alphas(alpha), method, options, auto=auto)
    Methods.parse(method, points[-1].options, experiment.scheme)
    if auto and any(is_searched(formats) for formats in experiment.scheme.formats):
        raise EvenbitsError(
            "a search for alpha needs activations whose scale is not searched itself; pass auto=False (--no-auto)."
        )
    if jobs < 1:
        raise EvenbitsError(f"jobs={jobs}; give a whole number of processes from 1.")
    with ExitStack() as stack:
        stack.enter_context(termination_as_interrupt())
        experiment = _walked_once(experiment)
        bench = Bench(experiment)
        kept = Path(state) if state is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        opened = State(kept, bench.identity, restart=restart)
        run_points(experiment, bench, opened, points, jobs, say or (lambda _: None), lasting=state is not None)
        return summarise(
            points,
            opened.finished(),
            model=str(model) if isinstance(model, (str, os.PathLike)) else bench.identity["model"].split()[0],
            task=task,
            scheme=experiment.scheme.to_json(),
            method=method,
            options=dict(options),
            calibration=bench.calibrated_on,
            key=opened.digest,
        )


def run_points(
    experiment: Experiment,
    bench: Bench,
    state: State,
    points: Sequence[Point],
    jobs: int,
    say: Callable[[str], None],
    *,
    lasting: bool,
) -> None:
    """Runs the points that the state does not have. Raises EvenbitsError naming those that failed."""
    done = state.finished()
    missing = [point for point in points if point.name not in done]
    if len(missing) < len(points):
        say(f"{len(points) - len(missing)} of {len(points)} points are done already, in {state.folder}.")
    progress = _Progress(state, len(points), missing, jobs, say)
    if jobs == 1:
        run_here(bench, state, missing, progress)
    elif missing:
        run_in_processes(experiment, bench.identity, state, missing, jobs, progress)
    if progress.failed:
        listed = "; ".join(f"{point.label}: {reason}" for point, reason in progress.failed)
        kept = f"kept in {state.folder}; run the same sweep again for the rest" if lasting else "lost without a state"
        raise EvenbitsError(f"{len(progress.failed)} of {len(points)} points failed. {listed} (The others are {kept}.)")


class _Progress:
    """Says each point with its score and what is left, from the time that the points of this run took."""

    def __init__(
        self, state: State, total: int, missing: Sequence[Point], jobs: int, say: Callable[[str], None]
    ) -> None:
        self.failed: list[tuple[Point, str]] = []
        self._state, self._total, self._left, self._jobs, self._say = state, total, len(missing), jobs, say
        self._start, self._alike = time.perf_counter(), [0.0, 0]

    def __call__(self, point: Point, failure: str | None) -> None:
        self._left -= 1
        if failure is not None:
            self.failed.append((point, failure))
            self._say(f"{point.label} failed: {failure}")
            return
        found = self._state.finished()[point.name]
        metric, value = next(iter(found["evaluation"]["metrics"].items()))
        seconds = sum(found["seconds"].values())
        # What is left are mostly numbers; the search for `auto` and the float model would spoil the estimate.
        if point.alpha is not None or point.name == "none":
            self._alike = [self._alike[0] + seconds, self._alike[1] + 1]
        each = self._alike[0] / self._alike[1] if self._alike[1] else seconds
        rest = f", about {_duration(each * self._left / self._jobs)} left" if self._left else ""
        score = "infinite" if value is None else f"{value:.4f}"
        count = f"{self._total - self._left} of {self._total}"
        self._say(f"{point.label}: {metric} {score} in {seconds:.1f} s ({count}{rest})")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _scheme(scheme: str | Path | Mapping[str, Any] | Scheme, ignore: Sequence[str]) -> Scheme:
    resolved = resolve(scheme)
    resolved = replace(resolved, ignore=(*resolved.ignore, *ignore))
    for formats in resolved.formats:
        check_formats(formats.weights, formats.input_activations)
    return resolved


def _walked_once(experiment: Experiment) -> Experiment:
    """Generators as lists: they can be walked once only, and every point and process needs the same."""
    data, given = experiment.data, experiment.calibration
    return replace(experiment, data=_listed(data), calibration=_listed(given))


def _listed(value: Any) -> Any:
    return list(value) if hasattr(value, "__next__") else value
