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

Link = Annotated[str, typer.Option(help="Bandwidth each way, in bits: 1Gbit, 100Mbit, 25e6.")]
Shape = Annotated[
    str | None,
    typer.Option(help="The activation of one microbatch, 8x128x512: plans a pipeline. Without it: data parallelism."),
]
Codec = Annotated[
    list[str] | None,
    typer.Option(help="A codec; in a pipeline also FORWARD/BACKWARD: int4:g128/int8:g128. Repeatable."),
]
Latency = Annotated[float, typer.Option(help="Milliseconds per message.", min=0)]
Jitter = Annotated[
    float, typer.Option(help="Mean of further milliseconds per message, exponentially distributed.", min=0)
]
Stages = Annotated[int, typer.Option(help="Stages of the pipeline, all alike.", min=2)]
Microbatches = Annotated[int, typer.Option(help="Microbatches per step.", min=1)]
Schedule = Annotated[str, typer.Option(help="1f1b or gpipe.")]
Compute = Annotated[
    float,
    typer.Option(
        help="Milliseconds: one forward pass of one stage, backward counts twice; without --shape a step.", min=0
    ),
]
Replicas = Annotated[int, typer.Option(help="Of the model, or of the pipeline.", min=1)]
Parameters = Annotated[
    int, typer.Option(help="Of the model, whose gradients replicas reduce; with --shape of one stage, uncoded.", min=0)
]
Stragglers = Annotated[float, typer.Option(help="Share of all stages of all replicas that are slower.", min=0, max=1)]
Slowdown = Annotated[float, typer.Option(help="How many times slower they are.", min=1)]
Cores = Annotated[
    int | None,
    typer.Option(help="Of a machine that all stages, or --per-machine replicas, share. Default: one each.", min=1),
]
PerMachine = Annotated[
    int, typer.Option(help="Replicas that share a machine's link and cores. Without --shape.", min=1)
]
Tensors = Annotated[int, typer.Option(help="Into how many the parameters are divided. Without --shape.", min=1)]
Feedback = Annotated[bool, typer.Option("--feedback", help="Count error feedback's work. Without --shape.")]


@comms.callback()
def group() -> None:
    """Coded traffic between the processes of a training run."""


@comms.command()
def plan(
    link: Link,
    shape: Shape = None,
    codec: Codec = None,
    latency: Latency = 0.0,
    jitter: Jitter = 0.0,
    stages: Stages = 2,
    microbatches: Microbatches = 8,
    schedule: Schedule = "1f1b",
    compute: Compute = 0.0,
    replicas: Replicas = 1,
    parameters: Parameters = 0,
    stragglers: Stragglers = 0.0,
    slowdown: Slowdown = 2.0,
    cores: Cores = None,
    per_machine: PerMachine = 1,
    tensors: Tensors = 1,
    feedback: Feedback = False,
    as_json: AsJson = False,
) -> None:
    """Say which codecs pay off on a link: codecs timed here, the step predicted."""
    given = {name: value for name, value in locals().items() if name != "as_json"}
    with working():
        made = _reduction(given) if shape is None else _pipeline(given)
    if as_json:
        emit(made)
    else:
        _show(made)


def _net(given: dict[str, Any]) -> Any:
    from evenbits.comms.plan import parse_link
    from evenbits.comms.simulate import Network

    return Network(parse_link(given["link"]), given["latency"] / 1e3, given["jitter"] / 1e3)


def _pipeline(given: dict[str, Any]) -> dict[str, Any]:
    """The settings and offers as plain data. Raises EvenbitsError for what is not understood."""
    from dataclasses import asdict

    from evenbits.comms.plan import CODECS, parse_shape
    from evenbits.comms.plan import plan as make
    from evenbits.comms.programs import SCHEDULES
    from evenbits.comms.simulate import Machine
    from evenbits.errors import unknown_name

    kinds = {name.lower(): name for name in SCHEDULES}
    if given["schedule"].lower() not in kinds:
        raise unknown_name("schedule", given["schedule"], kinds)
    net, size, compute = _net(given), parse_shape(given["shape"]), given["compute"] / 1e3
    names = ("stages", "microbatches", "replicas", "parameters", "stragglers", "slowdown")
    same = {name: given[name] for name in names}
    machine = None if given["cores"] is None else Machine(given["cores"])
    kind = kinds[given["schedule"].lower()]
    offers = make(
        given["codec"] or CODECS, shape=size, net=net, schedule=kind, compute=compute, machine=machine, **same
    )
    link = {"link": net.bandwidth, "latency": net.latency, "jitter": net.jitter}
    settings = {**link, "shape": list(size), "schedule": kind, "compute": compute, **same, "cores": given["cores"]}
    return {**settings, "offers": [asdict(offer) for offer in offers]}


def _reduction(given: dict[str, Any]) -> dict[str, Any]:
    """The same for replicas without a pipeline. Raises EvenbitsError too where an option is one of pipelines only."""
    from dataclasses import asdict

    from evenbits.comms.replicas import CODECS, Replicas, plan_replicas
    from evenbits.errors import EvenbitsError

    if given["replicas"] < 2 or given["parameters"] < 1:
        raise EvenbitsError(
            "give --shape 8x128x512 to plan a pipeline, or --replicas 4 --parameters 7000000 to plan data parallelism."
        )
    if given["stragglers"]:
        raise EvenbitsError("--stragglers is of pipelines: every replica waits for the slowest; give its --compute.")
    net, compute = _net(given), given["compute"] / 1e3
    replicas = Replicas(given["replicas"], given["per_machine"], given["cores"] or given["per_machine"])
    same = {name: given[name] for name in ("parameters", "tensors", "feedback")}
    offers = plan_replicas(given["codec"] or CODECS, net=net, replicas=replicas, compute=compute, **same)
    link = {"link": net.bandwidth, "latency": net.latency, "jitter": net.jitter}
    settings = {**link, "replicas": asdict(replicas), "compute": compute, **same}
    return {**settings, "offers": [asdict(offer) for offer in offers]}


def _show(made: dict[str, Any]) -> None:
    from evenbits.reporting.tables import show, table

    if "shape" in made:
        shape = "x".join(map(str, made["shape"]))
        title = f"{shape} per microbatch, {made['stages']} stages, {made['schedule']}, {made['link'] / 1e6:g} Mbit/s"
        note = (
            "encode, decode: both directions of a microbatch, timed here; step: predicted, with that computation only."
        )
    else:
        count = made["replicas"]["count"]
        title = f"{made['parameters']:,} parameters, {count} replicas, {made['link'] / 1e6:g} Mbit/s per machine"
        note = "encode, decode: one rank's in a step, timed here; raw: float32; step: predicted, nothing overlaps."
    columns = ["codec", "bits / element", "encode ms", "decode ms", "pays off below Mbit/s", "step ms", "× raw", "here"]
    rows = []
    for o in made["offers"]:
        limit = "any" if o["break_even"] is None else o["break_even"] / 1e6 or None
        verdict = None if o["codec"] == "raw" else "pays" if o["speedup"] > 1 else "does not pay"
        figures = (1e3 * o["encode"], 1e3 * o["decode"], limit, 1e3 * o["step"], o["speedup"])
        rows.append((o["codec"], o["bits"], *figures, verdict))
    show(table(title, columns, rows))
    show(note)


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
