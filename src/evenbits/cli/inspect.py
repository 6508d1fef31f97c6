"""`evenbits inspect OUT`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evenbits.cli.output import emit, working


def inspect(
    path: Annotated[Path, typer.Argument(help="A folder that evenbits wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Show the layers of a checkpoint: formats, true bits, bytes on disk. Every file is checked first."""
    with working():
        from evenbits.checkpoints.describe import describe

        found = describe(path)
    if as_json:
        emit(found)
        return
    from evenbits.reporting.tables import show, size, table

    columns = ["layer", "weights", "inputs", "shape", "true bits", "bytes", "output SQNR dB"]
    rows = [
        (
            layer["name"],
            layer["format"],
            layer["input_format"],
            "×".join(map(str, layer["shape"])),
            layer["bits_per_weight"],
            layer["weight_bytes"],
            layer["output_sqnr_db"],
        )
        for layer in found["layers"]
    ]
    title = (
        f"{found['path']}: {found['source']['class']}, method {found['method']}, evenbits {found['evenbits_version']}"
    )
    show(table(title, columns, rows, left=4), "")
    if found["float_layers"]:
        kept = [(layer["name"], "×".join(map(str, layer["shape"])), layer["reason"]) for layer in found["float_layers"]]
        show(table("kept in float", ["layer", "shape", "why"], kept, left=3), "")
    counts: dict[str, int] = {}
    for region in found["regions"]:
        counts[region["status"]] = counts.get(region["status"], 0) + 1
    if counts:
        show("Regions: " + ", ".join(f"{number} {status}" for status, number in sorted(counts.items())) + ".")
    bits = 32 * found["weight_bytes"] / found["float_weight_bytes"]
    show(
        f"{bits:.3f} true bits per quantized weight: {size(found['float_weight_bytes'])} in float32 → "
        f"{size(found['weight_bytes'])} on disk; other tensors {size(found['other_bytes'])}; "
        f"whole folder {size(found['file_bytes'])}. All files intact."
    )
