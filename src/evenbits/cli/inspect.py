"""`evenbits inspect OUT`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    _show(found)


def _show(found: dict[str, Any]) -> None:
    from evenbits.reporting.tables import notes, show, size, table

    columns = ["layer", "weights", "inputs", "shape", "true bits", "bytes", "output SQNR dB"]
    title = (
        f"{found['path']}: {found['source']['class']}, method {found['method']}, evenbits {found['evenbits_version']}"
    )
    show(table(title, columns, [_row(layer) for layer in found["layers"]], left=4), "")
    pairs = [(layer["name"], layer["pairs"]) for layer in found["layers"] if layer["pairs"]]
    if pairs:
        heads = ["outlier-victim pairs", "kind", "NN %", "ON %", "OO %", "saturated %"]
        shares = [(name, p["kind"], p["nn"], p["on"], p["oo"], p["saturated"]) for name, p in pairs]
        show(table("N: normal, O: outlier", heads, shares, left=2), "")
    show(*notes((layer["name"], layer["note"]) for layer in found["layers"]))
    if found["float_layers"]:
        kept = [(layer["name"], "×".join(map(str, layer["shape"])), layer["reason"]) for layer in found["float_layers"]]
        show(table("kept in float", ["layer", "shape", "why"], kept, left=3), "")
    statuses = [region["status"] for region in found["regions"]]
    if statuses:
        show("Regions: " + ", ".join(f"{statuses.count(s)} {s}" for s in sorted(set(statuses))) + ".")
    bits = 32 * found["weight_bytes"] / found["float_weight_bytes"]
    show(
        f"{bits:.3f} true bits per quantized weight: {size(found['float_weight_bytes'])} in float32 → "
        f"{size(found['weight_bytes'])} on disk; other tensors {size(found['other_bytes'])}; "
        f"whole folder {size(found['file_bytes'])}. All files intact."
    )


def _row(layer: dict[str, Any]) -> tuple[Any, ...]:
    shape = "×".join(map(str, layer["shape"]))
    figures = (layer["bits_per_weight"], layer["weight_bytes"], layer["output_sqnr_db"])
    return (layer["name"], layer["format"], layer["input_format"], shape, *figures)
