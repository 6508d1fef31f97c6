"""`diagnose` for what a command line names: opens the model, the calibration data and the data to score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from evenbits.checkpoints.sources import is_python, load_object, open_model
from evenbits.errors import EvenbitsError
from evenbits.pipeline.calibration import calibration as open_calibration
from evenbits.pipeline.convergence import check_sizes
from evenbits.pipeline.diagnose import Diagnosis, diagnose
from evenbits.pipeline.methods import Methods, default_method
from evenbits.schemes.scheme import resolve

_SAMPLES = 128


def diagnose_named(
    model: str,
    *,
    scheme: str,
    method: str | None,
    options: dict[str, Any],
    calibration: str | None,
    samples: int | None,
    length: int,
    batch_size: int,
    ignore: tuple[str, ...],
    dtype: str,
    layers: Sequence[str],
    task: str | None,
    evaluation: str | None,
    sizes: Sequence[int],
    orders: int,
    seed: int,
    say: Callable[[str], None],
) -> tuple[Diagnosis, str]:
    """Returns the diagnosis and a sentence about the calibration data. `say` receives progress lines.

    samples: None for the largest size, or 128. Raises EvenbitsError for whatever cannot be opened or diagnosed.
    """
    resolved = resolve(scheme)
    resolved = replace(resolved, ignore=(*resolved.ignore, *ignore))
    Methods.parse(default_method(resolved) if method is None else method, options, resolved)
    if sizes:
        check_sizes(sizes, orders)
    count = samples if samples is not None else max([*sizes, 0]) or _SAMPLES
    source = open_model(model, dtype=dtype)
    if source.quantized:
        raise EvenbitsError(f"{model} is quantized already; diagnose the float model it came from.")
    opened = open_calibration(
        calibration, source.model, source.tokenizer, samples=count, length=length, batch_size=batch_size
    )
    say(f"Calibrating on {opened.description}.")
    items: Any = evaluation
    if evaluation is not None and is_python(evaluation):
        items = load_object(evaluation)
        items = items() if callable(items) else items
    found = diagnose(
        source.model,
        scheme=resolved,
        method=method,
        data=opened.batches,
        layers=layers,
        task=task,
        evaluation=items,
        tokenizer=source.tokenizer,
        sizes=sizes,
        orders=orders,
        seed=seed,
        progress=True,
        **options,
    )
    return found, opened.description
