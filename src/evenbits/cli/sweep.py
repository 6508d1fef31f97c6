"""`evenbits sweep MODEL --alpha LOW:HIGH:STEP --task TASK --data FILE`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evenbits.cli import options
from evenbits.cli.output import Interrupted, emit, note, working

if TYPE_CHECKING:
    from evenbits.pipeline.sweep_result import Sweep

_Task = Annotated[str, typer.Option(help="perplexity or classification.")]
_Scored = Annotated[str, typer.Option(help="To score on: text, labelled table, arrays, or FILE.py:batches.")]
_Alpha = Annotated[str, typer.Option(help="LOW:HIGH:STEP, or a list such as 0.3,0.5,0.7.")]
_Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write. Default: ./NAME-SCHEME-sweep.")]
_Method = Annotated[str, typer.Option(help="A method with an α: smoothquant, smoothquant+olive.")]
_Auto = Annotated[bool, typer.Option("--auto/--no-auto", help="Whether α = auto is a point.")]
_Separator = Annotated[
    str | None, typer.Option(help="Between documents (perplexity). Default: <|endoftext|> where it occurs.")
]
_MaxDocuments = Annotated[int | None, typer.Option(help="Score only the first N documents (perplexity).")]
_Context = Annotated[int | None, typer.Option(help="Tokens per forward (perplexity). Default: the model's.")]
_Stride = Annotated[int | None, typer.Option(help="New tokens per forward when a document is longer (perplexity).")]
_EvaluationBatchSize = Annotated[
    int | None, typer.Option(help="Items per forward of scoring (classification). Default: 32.")
]
_MaxLength = Annotated[int | None, typer.Option(help="Tokens per item (classification). Default: 128.")]
_Jobs = Annotated[int, typer.Option(help="Processes, which share the processor's cores.", min=1)]
_Restart = Annotated[bool, typer.Option("--restart", help="Throw away the points of an earlier sweep.")]
_Plot = Annotated[Path | None, typer.Option(help="FILE.svg or FILE.png. Default: OUT/sweep.svg.")]


def sweep(
    model: options.Model,
    task: _Task,
    data: _Scored,
    alpha: _Alpha = "0.05:0.95:0.05",
    output: _Output = None,
    scheme: options.Scheme = "W8A8",
    method: _Method = "smoothquant",
    criterion: options.Criterion = None,
    scope: options.Scope = None,
    sequential: options.Sequential = False,
    bias_correction: options.BiasCorrection = False,
    policy: options.Policy = None,
    auto: _Auto = True,
    calibration: options.Calibration = None,
    samples: options.Samples = 128,
    sequence_length: options.SequenceLength = 128,
    batch_size: options.BatchSize = 8,
    ignore: options.Ignore = None,
    dtype: options.Dtype = "float32",
    separator: _Separator = None,
    max_documents: _MaxDocuments = None,
    context: _Context = None,
    stride: _Stride = None,
    evaluation_batch_size: _EvaluationBatchSize = None,
    max_length: _MaxLength = None,
    jobs: _Jobs = 1,
    restart: _Restart = False,
    plot: _Plot = None,
    detach: options.Detach = None,
    as_json: options.AsJson = False,
) -> None:
    """Score a model for every α of SmoothQuant, with float, no smoothing and α = auto beside; resumable."""
    folder = output if output is not None else _default_output(model, scheme)
    picture = plot if plot is not None else folder / "sweep.svg"
    chosen = _given(criterion=criterion, scope=scope, sequential=sequential or None, policy=policy)
    chosen |= {"bias_correction": True} if bias_correction else {}
    evaluation = _given(
        max_documents=max_documents, context=context, stride=stride, batch_size=evaluation_batch_size,
        max_length=max_length,
    )  # fmt: skip
    found = _sweep(
        detach, folder, picture, model, task=task, data=data, alpha=alpha, scheme=scheme, method=method,
        calibration=calibration, samples=samples, sequence_length=sequence_length, batch_size=batch_size,
        ignore=tuple(ignore or ()), dtype=dtype, separator=separator, evaluation=evaluation, auto=auto,
        restart=restart, jobs=jobs, **chosen,
    )  # fmt: skip
    emit(found.to_json()) if as_json else _show(found, folder, picture)


def _sweep(detach: Path | None, folder: Path, picture: Path, model: str, **words: Any) -> Sweep:
    with working(detach):
        from evenbits.pipeline.sweep import sweep as run
        from evenbits.pipeline.sweep_state import write_json
        from evenbits.reporting.sweep import check_plot
        from evenbits.reporting.sweep import plot as draw

        check_plot(picture)  # before hours of work, not after
        state = folder / "state"
        try:
            found = run(model, state=state, say=note, **words)
        except KeyboardInterrupt:
            raise Interrupted(f"finished points are kept in {state}; the same command goes on from there.") from None
        write_json(folder / "sweep.json", found.to_json())
        draw(found, picture)
    return found


def _default_output(model: str, scheme: str) -> Path:
    _, colon, name = model.rpartition(".py:")
    stem = name if colon else Path(model).name or Path(model).resolve().name
    return Path(f"{stem}-{Path(scheme).stem}-sweep")


def _given(**words: Any) -> dict[str, Any]:
    return {name: value for name, value in words.items() if value is not None}


def _show(found: Sweep, folder: Path, picture: Path) -> None:
    from evenbits.reporting.sweep import search_verdict, sweep_table, verdict
    from evenbits.reporting.tables import show

    show(sweep_table(found), "", verdict(found), *search_verdict(found), *found.notes)
    show(
        "minus none: against no smoothing on the same samples; ±: one paired standard error; p: exact McNemar test, or "
        "sign flips over documents.",
        f"Written to {folder / 'sweep.json'} and {picture}; calibrated on {found.calibration}.",
    )
