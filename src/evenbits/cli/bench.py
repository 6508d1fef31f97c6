"""`evenbits bench MODEL`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from evenbits.cli import options
from evenbits.cli.output import emit, note, working

if TYPE_CHECKING:
    from evenbits.pipeline.bench import Bench


def bench(
    model: Annotated[
        str, typer.Argument(help="A folder of ours, a Hugging Face folder, a hub id, or FILE.py:factory.")
    ],
    against: Annotated[str | None, typer.Option(help="The float model it came from. Default: decoded weights.")] = None,
    factory: Annotated[
        str | None, typer.Option("--model", help="FILE.py:factory of a checkpoint that is no Hugging Face model.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "--calibration", help="Inputs: text, arrays, FILE.py:batches. Default: random."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens per sequence. Default: 128.", min=1)] = None,
    image: Annotated[str | None, typer.Option(help="Size of random pictures, such as 3x224x224.")] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, such as 1,8.")] = "1",
    threads: Annotated[str, typer.Option(help="Numbers of threads, such as 1,2.")] = "1",
    seconds: Annotated[float, typer.Option(help="Time for each table, about.", min=0.1)] = 10.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    fuse: Annotated[bool, typer.Option("--fuse/--no-fuse", help="Byte chains of static convolutions, too.")] = True,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Other libraries that are installed, too.")] = True,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Peak memory, each in a fresh process.")] = True,
    detach: options.Detach = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Measure latency, throughput and memory against the float model and installed peers."""
    with working(detach):
        from evenbits.pipeline.bench import Wish
        from evenbits.pipeline.bench import bench as run
        from evenbits.pipeline.bench_inputs import Inputs

        wish = Wish(
            Inputs.parse(data, tokens, image),
            _numbers("--batch", batch),
            _numbers("--threads", threads),
            seconds,
            device,
            fuse,
            peers,
            memory,
        )
        found = run(model, wish, against=against, factory=factory, say=note)
    if as_json:
        emit(found.to_json())
    else:
        _show(found)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    from evenbits.errors import EvenbitsError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise EvenbitsError(f"{option} takes whole numbers with commas between, such as 1,8; given {text!r}.")
    return tuple(int(part) for part in parts)


def _show(found: Bench) -> None:
    from evenbits.reporting.tables import show, table

    clocks = sorted({row.latency.clock for row in found.speed})
    columns = ["task", "variant", "batch", "threads", "median ms", "quartiles ms", "least ms", "× float32", "per s", ""]
    rows = [
        (
            row.task,
            row.variant,
            row.batch,
            row.threads,
            row.latency.median * 1e3,
            f"{row.latency.low * 1e3:.2f} … {row.latency.high * 1e3:.2f}",
            row.latency.least * 1e3,
            "–" if row.speedup is None else f"{row.speedup:.2f}",
            row.throughput,
            row.unit,
        )
        for row in found.speed
    ]
    show(table(f"Latency ({' and '.join(clocks)} time)", columns, rows, left=2), "")
    heads = ["variant", "weights", "peak resident", "of it before the model", "peak on the GPU"]
    figures = [(row.variant, _size(row.weight_bytes), *(_size(b) for b in _peaks(row.peak))) for row in found.memory]
    show(table("Memory", heads, figures, left=1), "")
    if found.layers:
        owners: dict[str, list[str]] = {}
        for name, backend in found.layers.items():
            owners.setdefault(backend, []).append(name)
        lines = [(backend, len(names), _listed(names)) for backend, names in owners.items()]
        show(table("Who computes the quantized layers", ["by", "layers", "names"], lines, left=3), "")
        show(*(f"Kernels on {device}: {text}." for device, text in found.kernels.items()))
    show(f"float32: {found.against}.", *found.notes)
    about = found.machine
    load = "" if about["load"] is None else f", load {about['load']:.1f} at the end"
    show(f"{about['processor']}, {about['cores']} cores, torch {about['torch']}{load}.")
    if "wall" in clocks:
        show("× float32 and per s are by the least of wall times (medians tell of other programs).")


def _listed(names: list[str], most: int = 6) -> str:
    more = f", and {len(names) - most} more (--json names all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _peaks(peak: object) -> tuple[int | None, int | None, int | None]:
    return (getattr(peak, "peak", None), getattr(peak, "before", None), getattr(peak, "gpu", None))


def _size(nbytes: int | None) -> str | None:
    from evenbits.reporting.tables import size

    return None if nbytes is None else size(nbytes)
