"""Step time of a two-stage pipeline over a slow link, with torch's own stage and with coded ones.

    sudo python benchmarks/pipeline_traffic.py [--rates 20e6,100e6,1e9,0] [--codecs raw,fp16,…] [--steps 3] [--json]

Two processes, one thread each, in two network namespaces joined by a throttled veth pair (links.py). Each stage has
--layers transformer layers (0: a norm and a linear, so that the link is all there is); --width, --length, --batch and
--microbatches set how much travels. For every link, schedule and codec:

    seconds     median and best of the measured steps, after one step that is not measured
    share       1 − (stock step on the unthrottled link) / (this step): what of the step the link is responsible for
    reported    bytes of payloads and trailers as CodecStage counts them (stock: sizes of the tensors)
    interface   bytes the kernel counted on both ends of the link in the same steps, headers and acknowledgements too
    ratio       the same without 66 bytes of Ethernet, IP and TCP header per packet / reported; must be within 3 % of 1

    |1          behind a codec: receives are posted one microbatch ahead (CodecStage's `ahead`)
    mean        seconds inside the schedule alone
    predicted   the same by comms/simulate.py, from this case's own times of computing and coding, and its bytes

and, without any codec, one against four microbatches of the same batch. Without namespaces (--local) the processes use
loopback and every send first sleeps for bytes / rate: a link without overlap, and nothing for the kernel to count.
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
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from links import ADDRESSES, INTERFACES, available, link
from machine import fingerprint
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from evenbits.comms.simulate import Costs, Network, predict
from evenbits.comms.stages import CodecStage

SCHEDULES = {"1F1B": Schedule1F1B, "GPipe": ScheduleGPipe}
CODECS = "stock,raw,raw|1,fp16,int8:g128,int8:g128|1,int4:g128/int8:g128|1,int4:g128,int4:g128|1"
VOCABULARY = 512
HEADER = 14 + 20 + 32  # Ethernet, IPv4, TCP with timestamps


class Part(nn.Module):
    """The layers, after an embedding on the first stage and before a classifier on the last."""

    def __init__(self, rank: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width) if rank == 0 else nn.Identity()
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        whole = [nn.TransformerEncoderLayer(width, 4, 2 * width, **options) for _ in range(layers)]
        self.layer = nn.Sequential(*(whole or [nn.LayerNorm(width), nn.Linear(width, width)]))
        self.head = nn.Linear(width, VOCABULARY) if rank else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(x)))


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def counted(rank: int, local: bool) -> list[int]:
    """Bytes and packets the kernel has sent from this end of the link."""
    if local:
        return [0, 0]
    folder = Path(f"/sys/class/net/{INTERFACES[rank]}/statistics")
    return [int((folder / name).read_text()) for name in ("tx_bytes", "tx_packets")]


def paced(stage: Any, rate: float) -> None:
    """Make sends sleep first, for --local."""
    for name in ("get_fwd_send_ops", "get_bwd_send_ops"):
        whole = getattr(stage, name)

        def slow(chunk: int, whole: Any = whole) -> Any:
            ops = whole(chunk)
            time.sleep(sum(op.tensor.nbytes for op in ops) * 8 / rate)
            return ops

        setattr(stage, name, slow)


class Clock:
    """Mean seconds per call of a stage's own work: forward, backward, the two that encode, and the loss."""

    NAMES = ("forward_one_chunk", "backward_one_chunk", "get_fwd_send_ops", "get_bwd_send_ops")

    def __init__(self, stage: Any) -> None:
        self.spent = {name: [0.0, 0] for name in (*self.NAMES, "loss")}
        self.waited = 0.0
        if isinstance(stage, CodecStage):
            stage._arrived = self._waiting(stage._arrived)  # what waits for the link is no work
        for name in self.NAMES:
            setattr(stage, name, self.timed(name, getattr(stage, name)))

    def timed(self, name: str, whole: Any) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            start, waited = time.perf_counter(), self.waited
            made = whole(*args, **options)
            self.spent[name][0] += time.perf_counter() - start - (self.waited - waited)
            self.spent[name][1] += 1
            return made

        return timed

    def _waiting(self, whole: Any) -> Any:
        def waits(*args: Any) -> None:
            start = time.perf_counter()
            whole(*args)
            self.waited += time.perf_counter() - start

        return waits

    def reset(self) -> None:
        for kept in self.spent.values():
            kept[:] = [0.0, 0]

    def means(self) -> list[float]:
        return [total / max(1, calls) for total, calls in self.spent.values()]


def case(rank: int, options: dict[str, Any], schedule: str, codec: str, microbatches: int) -> dict[str, Any]:
    """One schedule and codec: seconds and bytes of this rank."""
    torch.manual_seed(rank)
    part, device, width = Part(rank, options["width"], options["layers"]), torch.device("cpu"), options["width"]
    name, _, ahead = codec.partition("|")
    stage: Any = (
        PipelineStage(part, rank, 2, device)
        if name == "stock"
        else CodecStage(part, rank, 2, device, codec=name, ahead=int(ahead) if ahead else None)
    )
    if options["local"] and options["rate"]:
        paced(stage, options["rate"])
    clock = Clock(stage)
    engine: Any = SCHEDULES[schedule](stage, microbatches, loss_fn=clock.timed("loss", loss_of))
    optimizer = torch.optim.SGD(part.parameters(), lr=0.01)
    ids = torch.randint(VOCABULARY, (options["batch"], options["length"]), generator=torch.Generator().manual_seed(1))
    seconds, engines, losses, before, sent = [], [], [], [0, 0], 0
    for step in range(options["steps"] + 1):
        dist.barrier()
        if step == 1:
            clock.reset()
            before, sent = counted(rank, options["local"]), 0 if codec == "stock" else stage.bytes_sent()
        start = time.perf_counter()
        optimizer.zero_grad()
        begun = time.perf_counter()
        if rank:
            losses = []
            engine.step(target=ids, losses=losses)
        else:
            engine.step(ids)
        ended = time.perf_counter()
        optimizer.step()
        dist.barrier()
        if step:
            seconds.append(time.perf_counter() - start)
            engines.append(ended - begun)
    stock = 4 * options["batch"] * options["length"] * width * options["steps"]
    return {
        "seconds": seconds,
        "engine": engines,
        "clock": clock.means(),
        "interface": [now - then for now, then in zip(counted(rank, options["local"]), before, strict=True)],
        "reported": stock if codec == "stock" else stage.bytes_sent() - sent,
        "loss": sum(float(x.detach()) for x in losses) / len(losses) if losses else None,
    }


def work(rank: int, options: dict[str, Any], out: Path) -> None:
    """All cases of one link, on one rank."""
    torch.set_num_threads(1)
    where = "127.0.0.1" if options["local"] else ADDRESSES[0]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if options["local"] else INTERFACES[rank]
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{where}:{options['port']}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=300),
    )
    found = [
        {"schedule": schedule, "codec": codec, "microbatches": m, **case(rank, options, schedule, codec, m)}
        for schedule, codec, m in options["cases"]
    ]
    out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Both ranks of one link → one row per case."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(rank) for rank in range(2)]

        def start(rank: int, prefix: list[str]) -> subprocess.Popen[bytes]:
            words = [sys.executable, __file__, "--rank", str(rank), "--out", str(outs[rank])]
            return subprocess.Popen([*prefix, *words, "--options", json.dumps(options)])

        if options["local"]:
            _wait([start(rank, []) for rank in range(2)])
        else:
            with link(options["rate"]) as made:
                _wait([start(rank, made.prefix(rank)) for rank in range(2)])
        both = [json.loads(out.read_text()) for out in outs]
    rows = []
    for one, two in zip(*both, strict=True):
        seconds = [max(pair) for pair in zip(one["seconds"], two["seconds"], strict=True)]
        reported = one["reported"] + two["reported"]
        interface, packets = map(sum, zip(one["interface"], two["interface"], strict=True))
        rows.append(
            {
                "link": "loopback, sends paced" if options["local"] else "namespaces, tbf",
                "rate": options["rate"],
                **{key: one[key] for key in ("schedule", "codec", "microbatches")},
                "seconds": statistics.median(seconds),
                "best": min(seconds),
                "reported": reported // options["steps"],
                "interface": interface // options["steps"] or None,
                "ratio": (interface - HEADER * packets) / reported if interface else None,
                "loss": two["loss"],
                "engine": statistics.mean(max(pair) for pair in zip(one["engine"], two["engine"], strict=True)),
                "predicted": foretold(options, one, two),
            }
        )
    return rows


def foretold(options: dict[str, Any], one: dict[str, Any], two: dict[str, Any]) -> float:
    """The model's seconds of the engine's step, from the work each rank timed and the bytes that travelled."""
    share = options["steps"] * one["microbatches"]
    costs = [
        Costs(
            forward=found["clock"][0] + found["clock"][4],
            backward=found["clock"][1],
            forward_bytes=one["reported"] // share,
            backward_bytes=two["reported"] // share,
            forward_encode=found["clock"][2],
            backward_encode=found["clock"][3],
        )
        for found in (one, two)
    ]
    net, ahead = Network(options["rate"] or 10e9), one["codec"].partition("|")[2]
    sizes = {"stages": 2, "microbatches": one["microbatches"]}
    return predict(one["schedule"], **sizes, cost=costs, net=net, ahead=int(ahead) if ahead else None).seconds


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    try:
        codes = [process.wait(900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise SystemExit(f"a rank ended with {codes}")


def with_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds what the link costs each step, against the stock step of the same schedule without a limit, and the gain."""
    free = {(r["schedule"], r["microbatches"]): r["best"] for r in rows if r["codec"] == "stock" and not r["rate"]}
    stock = {(r["rate"], r["schedule"], r["microbatches"]): r["best"] for r in rows if r["codec"] == "stock"}
    for row in rows:
        base = free.get((row["schedule"], row["microbatches"]))
        row["share"] = None if base is None else max(0.0, 1 - base / row["best"])
        against = stock.get((row["rate"], row["schedule"], row["microbatches"]))
        row["gain"] = None if against is None else against / row["best"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    head = f"{'link':>10} {'schedule':8} {'m':>2} {'codec':22} {'median s':>8} {'best s':>7} {'gain':>5} {'share':>5} "
    lines = [head + f"{'reported MB':>11} {'interface MB':>12} {'ratio':>6} {'mean s':>7} {'predicted':>9}"]
    for r in rows:
        rate = f"{r['rate'] / 1e6:g} Mbit/s" if r["rate"] else "no limit"
        share, gain = (f"{r[k]:.2f}" if r[k] is not None else "" for k in ("share", "gain"))
        seen = f"{r['interface'] / 1e6:12.3f} {r['ratio']:6.3f}" if r["ratio"] else f"{'':12} {'':6}"
        lines.append(
            f"{rate:>10} {r['schedule']:8} {r['microbatches']:>2} {r['codec']:22} {r['seconds']:8.3f} {r['best']:7.3f} "
            f"{gain:>5} {share:>5} {r['reported'] / 1e6:11.3f} {seen} {r['engine']:7.3f} {r['predicted']:9.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the namespaces are removed
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="20e6,100e6,1e9,0", help="bit per second; 0: no limit")
    parser.add_argument("--schedules", default="1F1B,GPipe")
    parser.add_argument("--codecs", default=CODECS)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--port", type=int, default=29400)
    parser.add_argument("--local", action="store_true", help="no namespaces: loopback, sends sleep")
    parser.add_argument("--json", action="store_true", help="JSON lines, the machine first")
    for hidden in ("--rank", "--out", "--options"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        work(int(given.rank), json.loads(given.options), Path(given.out))
        return
    reason = "" if given.local else available()
    if reason:
        raise SystemExit(f"{reason}; give --local to pace sends on loopback instead, without the kernel's counters.")
    cases = [(s, c, given.microbatches) for s in given.schedules.split(",") for c in given.codecs.split(",")]
    cases += [("GPipe", "stock", 1), ("GPipe", "stock", 4)]
    shared = {k: getattr(given, k) for k in ("width", "layers", "length", "batch", "steps", "port", "local")}
    rows = []
    for rate in map(float, given.rates.split(",")):
        rows += run({**shared, "rate": rate, "cases": cases})
    rows = with_shares(rows)
    if given.json:
        print("\n".join(json.dumps(line) for line in [fingerprint(), *rows]))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
