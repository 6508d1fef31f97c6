"""`evenbits evaluate MODEL_OR_OUT --task TASK --data FILE`"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evenbits.cli import options
from evenbits.cli.output import emit, working

if TYPE_CHECKING:
    from evenbits.evaluation.result import Evaluation


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A folder of ours, a Hugging Face folder, a hub id, or FILE.py:factory.")
    ],
    task: Annotated[str, typer.Option(help="perplexity or classification.")],
    data: Annotated[str, typer.Option(help="Text, labelled table (.tsv, .csv, .jsonl), arrays, or FILE.py:batches.")],
    factory: Annotated[
        str | None, typer.Option("--model", help="FILE.py:factory of a checkpoint that is no Hugging Face model.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Between documents (perplexity). Default: <|endoftext|> where it occurs.")
    ] = None,
    max_documents: Annotated[int | None, typer.Option(help="Score only the first N documents (perplexity).")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per forward (perplexity). Default: the model's.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="New tokens per forward when a document is longer (perplexity).")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Items per forward (classification). Default: 32.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per item (classification). Default: 128.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16, for float models.")] = "float32",
    fuse: Annotated[bool, typer.Option("--fuse", help="Run static int8 convolutions as byte chains.")] = False,
    calibration: Annotated[
        str | None, typer.Option(help="Of --fuse: arrays or FILE.py:batches. Default: the first 32 of --data.")
    ] = None,
    detach: options.Detach = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Score a float or quantized model, with a 95 % interval."""
    options: dict[str, Any] = {
        "max_documents": max_documents,
        "context": context,
        "stride": stride,
        "batch_size": batch_size,
        "max_length": max_length,
    }
    with working(detach):
        from evenbits.checkpoints.sources import open_model
        from evenbits.errors import EvenbitsError
        from evenbits.evaluation.tasks import evaluate as run
        from evenbits.evaluation.tasks import task_function

        task_function(task)  # an unknown task is refused before a model is loaded
        items = _items(data, separator)
        if calibration is not None and not fuse:
            raise EvenbitsError("--calibration is for byte chains; give --fuse, too, or leave it out.")
        source = open_model(model, factory=factory, dtype=dtype)
        scored, notes = source.model, list[str]()
        if fuse:
            from evenbits.pipeline.chains import fused_source

            fused = fused_source(source, data, calibration)
            scored, notes = fused.model, [fused.summary]
        given = {name: value for name, value in options.items() if value is not None}
        found = run(scored, task=task, data=items, tokenizer=source.tokenizer, **given)
        found = replace(found, notes=(*found.notes, *notes))
    if as_json:
        emit(found.to_json())
    else:
        _show(found)


def _items(data: str, separator: str | None) -> Any:
    """What `--data` names, for the task: the object of FILE.py:batches, a text cut by a separator, or the path."""
    from evenbits.checkpoints.sources import is_python, load_object
    from evenbits.data.text import read_text

    if is_python(data):
        found = load_object(data)
        return found() if callable(found) else found
    return data if separator is None else read_text(data, separator=separator)


def _show(found: Evaluation) -> None:
    from evenbits.reporting.tables import show, table

    interval = "–" if found.interval is None else f"{found.interval[0]:.4f} … {found.interval[1]:.4f}"
    rows = [(name, value, interval if index == 0 else "") for index, (name, value) in enumerate(found.metrics.items())]
    show(table(f"{found.task}, n = {found.n:,}", ["metric", "value", "95 % interval"], rows), *found.notes)
