"""`evenbits advise MODEL -o scheme.yaml`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evenbits.cli import options
from evenbits.cli.output import emit, note, working

if TYPE_CHECKING:
    from evenbits.pipeline.advice import Advice


def advise(
    model: options.Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Scheme file to write (.yaml). Default: none is written.")
    ] = None,
    bits: Annotated[float, typer.Option(help="True bits per weight that no layer may pass.")] = 4.25,
    activations: Annotated[
        str | None, typer.Option(help="Format of the layers' inputs, such as int8:row. Default: they stay float.")
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="A format to try, such as nf4:g*:mse (g*: the finest groups that fit). Repeatable."),
    ] = None,
    margin: Annotated[
        float, typer.Option(help="Decibels that count as equal: within them the format that engines like best wins.")
    ] = 0.1,
    calibration: options.Calibration = None,
    samples: options.Samples = 128,
    sequence_length: options.SequenceLength = 128,
    batch_size: options.BatchSize = 8,
    ignore: options.Ignore = None,
    dtype: options.Dtype = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at OUTPUT.")] = False,
    detach: options.Detach = None,
    as_json: options.AsJson = False,
) -> None:
    """Advise a number format for each layer, by its output error at equal true bits. The model is not changed."""
    with working(detach):
        from evenbits.checkpoints.sources import open_model
        from evenbits.pipeline.advise import advise as run
        from evenbits.pipeline.calibration import calibration as open_calibration

        _check_output(output, overwrite)
        source = open_model(model, dtype=dtype)
        opened = open_calibration(
            calibration, source.model, source.tokenizer, samples=samples, length=sequence_length, batch_size=batch_size
        )
        note(f"Measuring on {opened.description}.")
        advice = run(
            source.model,
            bits=bits,
            activations=activations,
            data=opened.batches,
            candidates=candidate or None,
            ignore=("lm_head", *(ignore or ())),
            margin_db=margin,
            progress=True,
        )
        if output is not None:
            output.write_text(_text(advice, model, opened.description), encoding="utf-8")
    if as_json:
        written = None if output is None else str(output)
        emit({**advice.to_json(), "calibration": opened.description, "output": written})
    else:
        _show(advice, model, output)


def _check_output(output: Path | None, overwrite: bool) -> None:
    from evenbits.errors import EvenbitsError

    if output is None:
        return
    if output.suffix not in (".yaml", ".yml"):
        raise EvenbitsError(f"a scheme file ends in .yaml, so that --scheme knows it for one; given {output}.")
    if not output.parent.is_dir():
        raise EvenbitsError(f"the folder {output.parent} does not exist.")
    if output.exists() and not overwrite:
        raise EvenbitsError(f"{output} exists; name another file or pass --overwrite.")


def _text(advice: Advice, model: str, description: str) -> str:
    about = f"# evenbits advise {model}: at most {advice.bits:g} true bits per weight, measured on {description}."
    return f"{about}\n# As measured: --method {advice.method}\n{advice.scheme().to_yaml()}"


def _show(advice: Advice, model: str, output: Path | None) -> None:
    from evenbits.reporting.tables import show, table

    rows = [(a.name, *(m.output_sqnr_db for m in a.candidates)) for a in advice.layers if a.candidates]
    show(table("Output error, SQNR in dB", ["layer", *advice.candidates], rows), "")
    chosen = [(a.name, a.chosen.format, a.why, a.chosen.bits, a.lead_db) for a in advice.advised if a.chosen]
    show(table("Advised", ["layer", "format", "why", "true bits", "lead dB"], chosen, left=3), "")
    floats = [(a.name, "×".join(map(str, a.shape)), a.reason) for a in advice.layers if a.chosen is None]
    if floats:
        show(table(f"{len(floats)} kept in float", ["layer", "shape", "why"], floats, left=3), "")
    unfit = {m.candidate: (a.name, m.reason) for a in advice.advised for m in a.candidates if m.reason}
    for name, (layer, reason) in unfit.items():
        show(f"{name} does not fit everywhere: on {layer} it {reason}.")
    ways: list[tuple[Any, ...]] = [(t.name, t.layers, t.bits, t.mean_error, t.mean_sqnr_db) for t in advice.totals]
    heads = ["the whole model", "layers", "true bits", "mean relative output error", "mean dB"]
    show(table("One format everywhere, and the advised mix", heads, ways), "")
    show(
        f"At most {advice.bits:g} true bits per weight, {advice.margin_db:g} dB count as equal, "
        f"{advice.calibration_batches} batches, {advice.seconds:.1f} s. σ: root mean square of a weight's row.",
        "Errors are those of single layers on the float model's inputs; what they do together, evaluation shows.",
    )
    scheme = "SCHEME.yaml (write it with -o)" if output is None else output
    show("", f"Next: evenbits quantize {model} --scheme {scheme} --method {advice.method}")
