"""`evenbits demo`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evenbits.cli.output import emit, working


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the checkpoint and the picture.")] = Path(
        "evenbits-demo"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Quantize the built-in language model to INT8, naively and with SmoothQuant, and show what each costs."""
    with working():
        from evenbits.demo.run import run_demo

        found = run_demo(output)
    if as_json:
        emit(found.to_json())
        return
    from evenbits.reporting.tables import show, table

    columns = ["model", "perplexity / byte", "bits / weight", "weight bytes", "ms / 256 bytes"]
    rows = [(r.name, r.perplexity, r.bits_per_weight, r.weight_bytes, r.milliseconds) for r in found.rows]
    show(*found.planted, "", table("Byte-level language model", columns, rows), "")
    digits = [(r.name, r.accuracy, r.bits_per_weight, r.weight_bytes) for r in found.digits]
    show(table("Convolutional network, 8×8 digits", ["model", "accuracy", "bits / weight", "weight bytes"], digits), "")
    show(
        f"Saved to {found.checkpoint}, loaded again: every tensor and every logit equal bit for bit.",
        f"Channel ranges before and after smoothing: {found.picture}",
        f"The reloaded model continues {found.prompt!r}:",
        found.text,
    )
