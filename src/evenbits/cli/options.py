"""Options that several commands share: one wording, one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, or FILE.py:factory.")]
Scheme = Annotated[
    str, typer.Option(help="A preset (W8A8, W8A8_STATIC, W4A16_OVP, W4A8_OVP, W4A4_OVP, …) or a YAML file.")
]
Method = Annotated[
    str | None,
    typer.Option(help="smoothquant, olive, ant, rtn, by_format, or smoothquant+olive. Default: by the scheme."),
]
Alpha = Annotated[
    str | None,
    typer.Option(help="SmoothQuant's migration strength: 0..1, auto or auto:LOW:HIGH:STEP. Default: 0.5."),
]
Criterion = Annotated[
    str | None, typer.Option(help="Of --alpha auto: loss (of the outputs), or min, max, mean of the layers' own α.")
]
Scope = Annotated[
    str | None, typer.Option(help="Of --alpha auto: region (each its own α), or block (one α, by its output).")
]
BiasCorrection = Annotated[
    bool, typer.Option("--bias-correction", help="Take what rounding adds to each output on average off its bias.")
]
Sequential = Annotated[
    bool, typer.Option("--sequential", help="Of --alpha auto: later blocks are tuned on quantized inputs.")
]
Policy = Annotated[
    str | None, typer.Option(help="Of outlier-victim pairs (method olive): optimal, paper or reference.")
]
Calibration = Annotated[
    str | None,
    typer.Option(help="Text, table, arrays or FILE.py:batches. Default: a small built-in text, for models of text."),
]
Samples = Annotated[int, typer.Option(help="Calibration blocks of text, or array rows.", min=1)]
SequenceLength = Annotated[int, typer.Option(help="Tokens per block of calibration text.", min=2)]
BatchSize = Annotated[int, typer.Option(help="Calibration batch size.", min=1)]
Ignore = Annotated[
    list[str] | None, typer.Option(help="A layer to keep in float: name, last part or glob. Repeatable.")
]
Head = Annotated[
    bool, typer.Option("--head", help="Quantize the output head (lm_head) too, also one tied to the embedding.")
]
Dtype = Annotated[str, typer.Option(help="Type of what stays float: float32, float16, bfloat16.")]
Probe = Annotated[
    bool, typer.Option("--probe", help="Time each layer's shape here first; name layers slower quantized.")
]
OnlyFaster = Annotated[
    bool, typer.Option("--only-faster", help="Keep layers in float that are slower quantized on this machine.")
]
Detach = Annotated[
    Path | None, typer.Option("--detach", metavar="LOG", help="Go on without the terminal, printing to LOG.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def given(*, alpha: str | None, **others: Any) -> dict[str, Any]:
    """Options of the methods that were given; alpha as a number where it is one."""
    try:
        number: float | str | None = None if alpha is None else float(alpha)
    except ValueError:
        number = alpha
    return {name: value for name, value in {"alpha": number, **others}.items() if value is not None}
