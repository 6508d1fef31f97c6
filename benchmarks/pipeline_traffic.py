"""Step time of a pipeline over slow links, with torch's own stage and with coded ones, and what the planner foretold.

    sudo python benchmarks/pipeline_traffic.py [--stages 2,4] [--rates 20e6,100e6,1e9,0] [--schedules 1F1B,GPipe]
        [--codecs stock,raw|1,int8:g128|1,…] [--steps 5] [--results FILE] [--mtu 6000] [--json]

One process per stage, one thread each, every process in its own network namespace; a throttled veth pair joins each
namespace to the next (links.py). Each stage has --layers transformer layers (0: a norm and a linear, so that the link
is all there is); --width, --length, --batch and --microbatches set how much travels. With --results every cell is
written to a file as soon as it is measured; the same command goes on where it was interrupted. Per cell:

    seconds     median of the measured steps, after one that is not measured: the slowest rank's, optimizer included
    best        the fastest of them
    share       of a stock step: 1 − (stock step without a limit) / (this step), what the link is responsible for
    gain        stock step / this step, on the same link
    predicted   seconds by comms/simulate.py from costs that were clocked in other runs (pipeline_forecast.py); error %
    verdict     what the prediction says of the codec on this link, with its predicted gain; within 3 % it says "even"
    reported    bytes of payloads and trailers as CodecStage counts them (stock: sizes of the tensors)
    interface   bytes the kernel counted on all ends of links in the same steps, headers and acknowledgements too
    contents    the same without 66 bytes of Ethernet, IP and TCP header per packet / reported; must be within 3 % of 1

    |1          behind a codec: receives are posted one microbatch ahead (CodecStage's `ahead`)

and, in a table of their own, one against four microbatches of the same batch without any codec. Without namespaces
(--local) the processes use loopback and every send first sleeps for bytes / rate: a link without overlap, and nothing
for the kernel to count.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from typing import Any

from links import ETHERNET, HEADERS, MTU, available, link
from machine import fingerprint
from pipeline_forecast import alone, calibrated, foretold, messages
from pipeline_ranks import SCHEDULES, work

CODECS = "stock,raw|1,int8:g128|1,int4:g128/int8:g128|1,int4:g128|1"
EVEN = 0.03
SETTINGS = ("width", "layers", "length", "batch", "microbatches", "steps", "mtu", "local", "repeats")
Row = dict[str, Any]


def launched(role: str, options: Row, count: int, prefixes: Callable[[int], list[str]]) -> list[Path]:
    """`count` processes of one role side by side → their output files, whatever they got done."""
    folder = Path(options["folder"])
    outs = [folder / f"{role}-{rank}" for rank in range(count)]
    processes = []
    for rank, out in enumerate(outs):
        out.unlink(missing_ok=True)
        words = [sys.executable, __file__, "--role", role, "--rank", str(rank), "--out", str(out)]
        processes.append(subprocess.Popen([*prefixes(rank), *words, "--options", json.dumps(options)]))
    try:
        codes = [process.wait(900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise SystemExit(f"a process ended with {codes}")
    return outs


def calibrate(options: Row, codecs: list[str]) -> Row:
    """The costs that predictions are made from: nothing of it is a measured cell."""
    names = {part for codec in codecs if codec != "stock" for part in codec.partition("|")[0].split("/")}
    counts = sorted({options["microbatches"], 1, 4})
    plain = {**options, "counts": counts, "codecs": sorted(names)}

    def here(rank: int) -> list[str]:
        return []

    single = json.loads(launched("alone", plain, 1, here)[0].read_text())
    pair = [json.loads(out.read_text()) for out in launched("alone", {**plain, "codecs": []}, 2, here)]
    with ExitStack() as stack:
        made = None if options["local"] else stack.enter_context(link(0, 2, options["mtu"]))
        outs = launched("messages", {**options, "stages": 2, "rate": 0}, 2, here if made is None else made.prefix)
    ranks = [json.loads(out.read_text()) for out in outs]
    return {"cores": len(os.sched_getaffinity(0)), **calibrated(single, pair, ranks)}


def measure(options: Row, calibration: Row, keep: Callable[[Row], None]) -> None:
    """All cases of one link and number of stages; each is kept, even if a later one fails."""
    start, stages = time.perf_counter(), options["stages"]
    with ExitStack() as stack:
        if options["local"]:
            prefix: Callable[[int], list[str]] = lambda rank: []  # noqa: E731
        else:
            prefix = stack.enter_context(link(options["rate"], stages, options["mtu"])).prefix
        try:
            launched("rank", options, stages, prefix)
        finally:
            files = [Path(options["folder"]) / f"rank-{rank}" for rank in range(stages)]
            lines = [file.read_text().splitlines() if file.exists() else [] for file in files]
            for found, *ranks in zip(options["cases"], *lines, strict=False):
                keep(row_of(options, calibration, found, [json.loads(line) for line in ranks]))
    print(f"{stages} stages, {options['rate']:g} bit/s: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def row_of(options: Row, calibration: Row, found: tuple[str, str, int], ranks: list[Row]) -> Row:
    """One cell from what its ranks found."""
    schedule, codec, microbatches = found
    seconds = [max(step) for step in zip(*(rank["seconds"] for rank in ranks), strict=True)]
    reported = sum(rank["reported"] for rank in ranks)
    interface, packets = map(sum, zip(*(rank["interface"] for rank in ranks), strict=True))
    contents = interface - (ETHERNET + HEADERS) * packets
    return {
        "link": "loopback, sends paced" if options["local"] else "namespaces, tbf",
        "stages": options["stages"],
        "rate": options["rate"],
        "schedule": schedule,
        "codec": codec,
        "microbatches": microbatches,
        "seconds": statistics.median(seconds),
        "best": min(seconds),
        "predicted": foretold(calibration, options, schedule, codec, microbatches),
        "reported": reported // options["steps"],
        "interface": interface // options["steps"] or None,
        "contents": contents / reported if interface else None,
        "loss": ranks[-1]["loss"],
    }


def compared(rows: list[Row]) -> list[Row]:
    """Adds error, share, gain and verdict, each against the stock step of the same schedule and microbatches."""
    stock = {(r["stages"], r["rate"], r["schedule"], r["microbatches"]): r for r in rows if r["codec"] == "stock"}
    for row in rows:
        key = (row["stages"], row["rate"], row["schedule"], row["microbatches"])
        free, base = stock.get((key[0], 0.0, *key[2:])), stock.get(key)
        row["error"] = row["predicted"] / row["seconds"] - 1
        row["share"] = None
        if row["codec"] == "stock":
            if free is not None:
                row["share"] = max(0.0, 1 - free["seconds"] / row["seconds"])
        elif base is not None:
            row["gain"] = base["seconds"] / row["seconds"]
            row["foretold"] = base["predicted"] / row["predicted"]
            far = abs(row["foretold"] - 1) > EVEN
            row["verdict"] = "even" if not far else "pays" if row["foretold"] > 1 else "does not pay"
    return rows


def table(rows: list[Row], microbatches: int) -> str:
    """Markdown: the cells; then one against four microbatches."""
    titles = "stages | link | schedule | codec | s/step | share | gain | predicted | error % | planner | MB | contents"
    lines = [f"| {titles} |", "|" + "---|" * titles.count("|") + "---|"]
    for r in (r for r in rows if r["microbatches"] == microbatches):
        share, gain = ("" if r.get(k) is None else f"{r[k]:.2f}" for k in ("share", "gain"))
        verdict = f"{r['verdict']} {r['foretold']:.2f}" if "verdict" in r else ""
        cells = [str(r["stages"]), named(r["rate"]), r["schedule"], r["codec"], f"{r['seconds']:.3f}", share, gain]
        cells += [f"{r['predicted']:.3f}", f"{100 * r['error']:+.0f}", verdict, f"{r['reported'] / 1e6:.3f}"]
        lines.append(f"| {' | '.join([*cells, '' if r['contents'] is None else format(r['contents'], '.3f')])} |")
    lines += [
        "",
        "| stages | link | 1 microbatch | 4 microbatches | 4 / 1 | predicted 4 / 1 |",
        "|---|---|---|---|---|---|",
    ]
    few = {(r["stages"], r["rate"], r["microbatches"]): r for r in rows if r["microbatches"] in (1, 4)}
    for (stages, rate, m), four in few.items():
        one = few.get((stages, rate, 1))
        if m == 4 and one is not None:
            ratios = (f"{four[k] / one[k]:.2f}" for k in ("seconds", "predicted"))
            cells = [str(stages), named(rate), f"{one['seconds']:.3f}", f"{four['seconds']:.3f}", *ratios]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def named(rate: float) -> str:
    return f"{rate / 1e6:g} Mbit/s" if rate else "no limit"


def summary(rows: list[Row]) -> str:
    """How far the predictions were off, and where a codec lost."""
    lines = []
    for stages in sorted({r["stages"] for r in rows}):
        most = 0.15 if stages == 2 else 0.30
        for which, key in (("median", "seconds"), ("fastest", "best")):
            errors = sorted(abs(r["predicted"] / r[key] - 1) for r in rows if r["stages"] == stages)
            within = f"within {100 * most:.0f} % in {sum(e <= most for e in errors)} of {len(errors)} cells"
            figures = f"{100 * statistics.median(errors):.0f} % in the median, {100 * errors[-1]:.0f} % at most"
            lines.append(f"{stages} stages: prediction off by {figures} of the {which} step; {within}")
    coded = [r for r in rows if r.get("gain") is not None]
    lost = [r for r in coded if r["gain"] < 1 - EVEN]
    missed = [cell_of(r) for r in lost if r["verdict"] == "pays"]
    lines.append(f"a codec lost more than {100 * EVEN:.0f} % in {len(lost)} of {len(coded)} cells")
    lines.append(f"the planner had said that it pays in {len(missed)} of these: {missed}")
    cell = itemgetter("stages", "rate", "schedule", "microbatches")
    shared = {cell(r): r["share"] for r in rows if r["share"] is not None}
    for most, least in ((0.6, 2.0), (0.5, 1 / 0.77)):
        wide = {key for key, share in shared.items() if share >= most}
        here = [r for r in coded if "int" in r["codec"] and cell(r) in wide]
        short = [cell_of(r) for r in here if r["gain"] < least]
        count = f"{len(here) - len(short)} of {len(here)} cells; short of it: {short}"
        lines.append(f"link >= {100 * most:.0f} % of the stock step: int8, int4 {least:.2f} times faster in {count}")
    return "\n".join(lines)


def cell_of(row: Row) -> str:
    return f"{row['stages']} stages {named(row['rate'])} {row['schedule']} {row['codec']} {row['gain']:.2f}"


def kept(path: Path | None, settings: Row) -> list[Row]:
    """The lines of an earlier run with the same settings: the first names them."""
    if path is None or not path.exists():
        return []
    first, *lines = (json.loads(line) for line in path.read_text().splitlines())
    if first["settings"] != settings:
        raise SystemExit(f"{path} holds results of other settings ({first['settings']}); give another file.")
    return lines


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the namespaces are removed
    given = parsed()
    if given.role is not None:
        act(given)
        return
    reason = "" if given.local else available()
    if reason:
        raise SystemExit(f"{reason}; give --local to pace sends on loopback instead, without the kernel's counters.")
    settings = {name: getattr(given, name) for name in SETTINGS}
    codecs, rates = given.codecs.split(","), [float(rate) for rate in given.rates.split(",")]
    lines, path = kept(given.results, settings), given.results
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        options = {**settings, "port": given.port, "folder": folder}

        def keep(line: Row) -> None:
            lines.append(line)
            if path is not None:
                with path.open("a") as file:
                    print(json.dumps(line), file=file, flush=True)

        if not lines:
            if path is not None:
                path.write_text(json.dumps({"settings": settings}) + "\n")
            keep({"machine": fingerprint(), "calibration": calibrate(options, codecs)})
        calibration = lines[0]["calibration"]
        cases = [(s, c, given.microbatches) for s in given.schedules.split(",") for c in codecs]
        cases += [("GPipe", "stock", m) for m in (1, 4) if m != given.microbatches]
        for stages in map(int, given.stages.split(",")):
            for rate in rates:
                done = {tuple(r[k] for k in ("stages", "rate", "schedule", "codec", "microbatches")) for r in lines[1:]}
                todo = [found for found in cases if (stages, rate, *found) not in done]
                if todo:
                    measure({**options, "stages": stages, "rate": rate, "cases": todo}, calibration, keep)
    rows = compared(lines[1:])
    if given.json:
        print("\n".join(json.dumps(line) for line in [lines[0]["machine"], *rows]))
    else:
        print(table(rows, given.microbatches) + "\n\n" + summary(rows))


def act(given: argparse.Namespace) -> None:
    """What a process that this script has started does."""
    options, out = json.loads(given.options), Path(given.out)
    if given.role == "alone":
        alone(options, out)
    elif given.role == "messages":
        work(given.rank, {**options, "cases": []}, out, instead=messages)
    else:
        work(given.rank, options, out)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="2,4")
    parser.add_argument("--rates", default="20e6,100e6,1e9,0", help="bit per second; 0: no limit")
    parser.add_argument("--schedules", default=",".join(SCHEDULES))
    parser.add_argument("--codecs", default=CODECS)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=25, help="of each part of the calibration")
    parser.add_argument("--mtu", type=int, default=MTU)
    parser.add_argument("--port", type=int, default=29400)
    parser.add_argument("--results", type=Path, help="JSON lines; cells that it holds are not measured again")
    parser.add_argument("--local", action="store_true", help="no namespaces: loopback, sends sleep")
    parser.add_argument("--json", action="store_true", help="JSON lines, the machine first")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    for hidden in ("--role", "--out", "--options"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
