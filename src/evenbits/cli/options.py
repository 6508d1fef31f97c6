"""Options that more than one command has, each with its words."""

from __future__ import annotations

from typing import Annotated

import typer

FloatModel = Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, or FILE.py:factory.")]
Task = Annotated[str, typer.Option(help="perplexity or classification.")]
Scored = Annotated[str, typer.Option(help="To score on: text, labelled table, arrays, or FILE.py:batches.")]
SchemeName = Annotated[str, typer.Option(help="A preset (W8A8, W8A8_STATIC, W4A8_OVP, …) or a YAML file.")]
Criterion = Annotated[
    str | None, typer.Option(help="Of α = auto: loss (of the outputs), or min, max, mean of the layers' own α.")
]
Scope = Annotated[
    str | None, typer.Option(help="Of α = auto: region (each its own α), or block (one α, by its output).")
]
Sequential = Annotated[
    bool, typer.Option("--sequential", help="Of α = auto: later blocks are tuned on quantized inputs.")
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
Dtype = Annotated[str, typer.Option(help="Type of what stays float: float32, float16, bfloat16.")]
Separator = Annotated[
    str | None, typer.Option(help="Between documents (perplexity). Default: <|endoftext|> where it occurs.")
]
MaxDocuments = Annotated[int | None, typer.Option(help="Score only the first N documents (perplexity).")]
Context = Annotated[int | None, typer.Option(help="Tokens per forward (perplexity). Default: the model's.")]
Stride = Annotated[int | None, typer.Option(help="New tokens per forward when a document is longer (perplexity).")]
EvaluationBatchSize = Annotated[
    int | None, typer.Option(help="Items per forward of scoring (classification). Default: 32.")
]
MaxLength = Annotated[int | None, typer.Option(help="Tokens per item (classification). Default: 128.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
