"""`evenbits diagnose MODEL -o FOLDER`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evenbits.cli import options
from evenbits.cli.output import emit, note, working

if TYPE_CHECKING:
    pass


_Samples = Annotated[
    int | None, typer.Option(help="Calibration blocks or rows. Default: 128, or the largest size.", min=1)
]
_Ignore = Annotated[
    list[str] | None, typer.Option(help="A layer to keep in float: name, last part or glob. Repeatable.")
]
_Layer = Annotated[
    list[str] | None, typer.Option(help="A layer to draw. Repeatable. Default: the three of the largest L1 loss.")
]
_Sizes = Annotated[str | None, typer.Option(help="Numbers of calibration samples to compare, such as 25,50,100,200.")]


def diagnose(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, or FILE.py:factory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures and diagnosis.json.")],
    scheme: Annotated[str, typer.Option(help="A preset or a YAML file, as in quantize.")] = "W8A8",
    method: Annotated[str | None, typer.Option(help="As in quantize. Default: by the scheme.")] = None,
    alpha: Annotated[str | None, typer.Option(help="SmoothQuant's migration strength, as in quantize.")] = None,
    criterion: Annotated[str | None, typer.Option(help="Of --alpha auto, as in quantize.")] = None,
    scope: Annotated[str | None, typer.Option(help="Of --alpha auto, as in quantize.")] = None,
    sequential: Annotated[bool, typer.Option("--sequential", help="Of --alpha auto, as in quantize.")] = False,
    policy: Annotated[str | None, typer.Option(help="Of outlier-victim pairs, as in quantize.")] = None,
    bias_correction: options.BiasCorrection = False,
    calibration: Annotated[str | None, typer.Option(help="As in quantize. Default: a small built-in text.")] = None,
    samples: _Samples = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per block of calibration text.", min=2)] = 128,
    batch_size: Annotated[int, typer.Option(help="Calibration batch size.", min=1)] = 8,
    ignore: _Ignore = None,
    dtype: Annotated[str, typer.Option(help="Type of what stays float: float32, float16, bfloat16.")] = "float32",
    layer: _Layer = None,
    task: Annotated[str | None, typer.Option(help="perplexity or classification: score float and quantized.")] = None,
    data: Annotated[str | None, typer.Option(help="What to score on, as in evaluate.")] = None,
    sizes: _Sizes = None,
    orders: Annotated[int, typer.Option(help="Of --sizes: random orders of the samples.", min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Of --sizes: seed of the first order.", min=0)] = 0,
    detach: options.Detach = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Show what quantizing a model does to every layer: errors, ranges, pictures. Nothing is quantized for good."""
    chosen = {"alpha": _number(alpha), "policy": policy, "criterion": criterion, "scope": scope}
    chosen |= {"sequential": sequential or None, "bias_correction": bias_correction or None}
    with working(detach):
        from evenbits.pipeline.diagnose_named import diagnose_named
        from evenbits.reporting.diagnosis import check_folder, write_diagnosis

        check_folder(output)
        found, described = diagnose_named(
            model,
            scheme=scheme,
            method=method,
            options={name: value for name, value in chosen.items() if value is not None},
            calibration=calibration,
            samples=samples,
            length=sequence_length,
            batch_size=batch_size,
            ignore=tuple(ignore or ()),
            dtype=dtype,
            layers=tuple(layer or ()),
            task=task,
            evaluation=data,
            sizes=_sizes(sizes),
            orders=orders,
            seed=seed,
            say=note,
        )
        title = f"{Path(model).name}: {scheme}, {found.method}"
        files = write_diagnosis(found, output, title)
    if as_json:
        emit({**found.to_json(), "calibration": described, "output": str(output), "files": files})
        return
    from evenbits.cli.diagnose_tables import show_diagnosis

    show_diagnosis(found, described, output, files)


def _number(alpha: str | None) -> float | str | None:
    try:
        return None if alpha is None else float(alpha)
    except ValueError:
        return alpha


def _sizes(text: str | None) -> tuple[int, ...]:
    from evenbits.errors import EvenbitsError

    if text is None:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise EvenbitsError(f"--sizes takes whole numbers with commas, such as 25,50,100; given {text!r}.") from None
