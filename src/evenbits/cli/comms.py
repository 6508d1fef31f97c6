"""`evenbits comms plan` and `evenbits comms watch`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evenbits.cli.options import AsJson
from evenbits.cli.output import emit, working

if TYPE_CHECKING:
    from evenbits.reporting.traffic import Log

comms = typer.Typer(help="Coded traffic between the processes of a training run.", no_args_is_help=True)


@comms.callback()
def group() -> None:
    """Coded traffic between the processes of a training run."""


@comms.command()
def plan(
    link: Annotated[str, typer.Option(help="Bandwidth each way, in bits: 1Gbit, 100Mbit, 25e6.")],
    shape: Annotated[str, typer.Option(help="The activation of one microbatch: 8x128x512.")],
    codec: Annotated[
        list[str] | None,
        typer.Option(help="A codec, or FORWARD/BACKWARD: int4:g128/int8:g128. Repeatable. Default: a selection."),
    ] = None,
    latency: Annotated[float, typer.Option(help="Milliseconds per message.", min=0)] = 0.0,
    stages: Annotated[int, typer.Option(help="Stages of the pipeline, all alike.", min=2)] = 2,
    microbatches: Annotated[int, typer.Option(help="Microbatches per step.", min=1)] = 8,
    schedule: Annotated[str, typer.Option(help="1f1b or gpipe.")] = "1f1b",
    compute: Annotated[
        float, typer.Option(help="Milliseconds of one forward pass of one stage; backward counts twice.", min=0)
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Say which codecs pay off on a link: codecs timed here, the step predicted."""
    with working():
        made = _made(link, shape, codec, latency, stages, microbatches, schedule, compute)
    if as_json:
        emit(made)
    else:
        _show(f"{shape} per microbatch, {stages} stages, {schedule}, {made['link'] / 1e6:g} Mbit/s", made["offers"])


def _made(
    link: str,
    shape: str,
    codec: list[str] | None,
    latency: float,
    stages: int,
    microbatches: int,
    schedule: str,
    compute: float,
) -> dict[str, Any]:
    """The settings and offers as plain data. Raises EvenbitsError for what is not understood."""
    from dataclasses import asdict

    from evenbits.comms.plan import CODECS, parse_link, parse_shape
    from evenbits.comms.plan import plan as make
    from evenbits.comms.simulate import SCHEDULES, Network
    from evenbits.errors import unknown_name

    kinds = {name.lower(): name for name in SCHEDULES}
    if schedule.lower() not in kinds:
        raise unknown_name("schedule", schedule, kinds)
    rate, size = parse_link(link), parse_shape(shape)
    offers = make(
        codec or CODECS,
        shape=size,
        net=Network(rate, latency / 1e3),
        stages=stages,
        microbatches=microbatches,
        schedule=kinds[schedule.lower()],
        compute=compute / 1e3,
    )
    given = {"link": rate, "latency": latency / 1e3, "shape": list(size), "compute": compute / 1e3}
    return {**given, "stages": stages, "microbatches": microbatches, "offers": [asdict(offer) for offer in offers]}


def _show(title: str, offers: list[dict[str, Any]]) -> None:
    from evenbits.reporting.tables import show, table

    columns = ["codec", "bits / element", "encode ms", "decode ms", "pays off below Mbit/s", "step ms", "× raw"]
    rows = []
    for o in offers:
        limit = "any" if o["break_even"] is None else o["break_even"] / 1e6 or None
        rows.append((o["codec"], o["bits"], 1e3 * o["encode"], 1e3 * o["decode"], limit, 1e3 * o["step"], o["speedup"]))
    show(table(title, columns, rows))
    show("encode, decode: both directions of one microbatch, timed here; step: predicted, with that computation only.")


@comms.command()
def watch(
    log: Annotated[Path, typer.Argument(help="JSON lines of Telemetry, or log-rank0.jsonl of a training run.")],
    plot: Annotated[Path | None, typer.Option(help="Write a picture of SNR and DC ratios there (SVG).")] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--once", help="Stay and follow the file until Ctrl-C, or show it once.")
    ] = True,
    interval: Annotated[float, typer.Option(help="Seconds between looks.", min=0.05)] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show what the codecs of a running training do: a live table per edge and direction."""
    from evenbits.reporting.traffic import Log

    found = Log(log)
    found.read()
    if as_json:
        from evenbits.reporting.traffic import newest

        _draw(found, plot)
        emit({"lanes": newest(found)})
    elif follow:
        _live(found, plot, interval)
    else:
        from evenbits.reporting.tables import show

        show(_table(found))
        _draw(found, plot)


def _live(log: Log, plot: Path | None, interval: float) -> None:
    """The table, drawn again whenever the file grows; Ctrl-C ends it."""
    import time

    from rich.live import Live

    _draw(log, plot if log.lanes else None)
    try:
        with Live(_table(log), auto_refresh=False) as shown:
            while True:
                time.sleep(interval)
                if log.read():
                    shown.update(_table(log), refresh=True)
                    _draw(log, plot if log.lanes else None)
    except KeyboardInterrupt:
        return


def _table(log: Log) -> Any:
    from evenbits.reporting.tables import table
    from evenbits.reporting.traffic import COLUMNS, rows

    return table(str(log.path), COLUMNS, rows(log), left=3)


def _draw(log: Log, plot: Path | None) -> None:
    if plot is not None:
        from evenbits.reporting.curves import svg
        from evenbits.reporting.traffic import figure

        plot.write_text(svg(figure(log)), encoding="utf-8")
