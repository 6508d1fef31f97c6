"""`evenbits quantize MODEL -o OUT`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evenbits.cli import options
from evenbits.cli.output import emit, note, working

if TYPE_CHECKING:
    from rich.table import Table

    from evenbits.pipeline.result import Result
    from evenbits.pipeline.run import Run


def quantize(
    model: options.Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write. Default: ./NAME-SCHEME.")
    ] = None,
    scheme: options.Scheme = "W8A8",
    method: options.Method = None,
    alpha: options.Alpha = None,
    criterion: options.Criterion = None,
    scope: options.Scope = None,
    sequential: options.Sequential = False,
    bias_correction: options.BiasCorrection = False,
    policy: options.Policy = None,
    calibration: options.Calibration = None,
    samples: options.Samples = 128,
    sequence_length: options.SequenceLength = 128,
    batch_size: options.BatchSize = 8,
    ignore: options.Ignore = None,
    head: options.Head = False,
    dtype: options.Dtype = "float32",
    probe: options.Probe = False,
    only_faster: options.OnlyFaster = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an evenbits folder at OUT.")] = False,
    detach: options.Detach = None,
    as_json: options.AsJson = False,
) -> None:
    """Quantize a model, write it, read it back, compare, and say what was done layer by layer."""
    with working(detach):
        from evenbits.pipeline.run import quantize_to_folder

        run = quantize_to_folder(
            model,
            output,
            scheme=scheme,
            method=method,
            options=options.given(
                alpha=alpha,
                policy=policy,
                criterion=criterion,
                scope=scope,
                sequential=sequential or None,
                bias_correction=bias_correction or None,
            ),
            calibration=calibration,
            samples=samples,
            length=sequence_length,
            batch_size=batch_size,
            ignore=tuple(ignore or ()),
            head=head,
            dtype=dtype,
            overwrite=overwrite,
            probe=probe,
            only_faster=only_faster,
            say=note,
        )
    if as_json:
        emit(run.to_json())
    else:
        _show(run, model)


def _show(run: Run, model: str) -> None:
    from evenbits.checkpoints.sources import is_python
    from evenbits.reporting.tables import show, size

    result = run.result
    _show_layers(result)
    if result.probe:
        show(_speeds(result), "")
    if result.notes:
        show(*result.notes, "")
    ratio = result.weight_bytes / result.float_weight_bytes
    show(
        f"Quantized weights: {size(result.float_weight_bytes)} in float32 → {size(result.weight_bytes)} in memory "
        f"({ratio:.4f}), {size(run.weight_bytes_on_disk)} on disk. Whole folder: {size(run.file_bytes)}.",
        f"{result.seconds:.1f} s ({result.search.seconds:.1f} s of it scale search), peak memory "
        f"{size(result.peak_bytes)}, products: {result.backend}.",
        f"Written to {run.path}, read back, equal bit for bit ({run.compared}).",
        "",
        f"Next: evenbits inspect {run.path}",
        f"      evenbits evaluate {run.path} --task … --data FILE{f' --model {model}' if is_python(model) else ''}",
    )
    given = ", the_float_model" if is_python(model) else ""
    show(f"      python -c \"import evenbits; model = evenbits.load('{run.path}'{given})\"")


def _show_layers(result: Result) -> None:
    """What became of every layer and region, and the largest errors."""
    from evenbits.reporting.tables import notes, show, table

    columns = ["layer", "weights", "inputs", "bits", "SQNR dB", "output SQNR dB"]
    quantized = [
        (row.name, row.format, row.input_format, row.bits_per_weight, row.sqnr_db, row.output_sqnr_db)
        for row in result.quantized
    ]
    show(table(f"{len(quantized)} layers quantized", columns, quantized, left=3), "")
    show(*notes((row.name, row.reason) for row in result.quantized))
    floats = [(row.name, "×".join(map(str, row.shape)), row.reason) for row in result.layers if row.status == "float"]
    if floats:
        show(table(f"{len(floats)} kept in float", ["layer", "shape", "why"], floats, left=3), "")
    if result.regions:
        rows: list[tuple[Any, ...]] = [(row.name, row.status, row.alpha, row.reason) for row in result.regions]
        show(table(f"{len(rows)} regions", ["region", "status", "α", "why"], rows, left=4), "")
    worst = sorted((row for row in result.quantized if row.output_sqnr_db is not None), key=_output_sqnr)[:5]
    if worst:
        show(
            "Largest output errors: "
            + ", ".join(f"{row.name} ({row.output_sqnr_db:.1f} dB)" for row in worst)
            + ". To keep one in float: --ignore NAME."
        )


def _speeds(result: Result) -> Table:
    from evenbits.reporting.tables import table

    columns = ["layers", "shape", "work", "float µs", "quantized µs", "×", "quartiles"]
    rows = [
        (
            row.layers[0] if len(row.layers) == 1 else f"{row.layers[0]} and {len(row.layers) - 1} more",
            row.shape,
            row.work,
            row.float_seconds * 1e6,
            row.quantized_seconds * 1e6,
            f"{row.ratio:.2f}",
            f"{row.low:.2f} … {row.high:.2f}",
        )
        for row in result.probe
    ]
    return table("Speed of each shape, measured before conversion", columns, rows, left=3)


def _output_sqnr(row: Any) -> float:
    return float(row.output_sqnr_db)
