"""Data-parallel training with coded gradients: bytes, step time and loss on 2 and 4 gloo processes.

    sudo python benchmarks/ddp_traffic.py --data DIR [--worlds 2,4] [--rates 100e6,1e9,0] [--steps 150] [--seeds 3]
                                          [--local] [--json]

A small convolutional net (0.69 million parameters, one bucket) learns CIFAR-10 under torch's DistributedDataParallel.
All settings see the same batches (64 pictures over all ranks), start and seeds; gradients are averaged by

    none         DDP's own all-reduce of float32
    fp16         torch's fp16_compress_hook
    PowerSGD     torch's powerSGD_hook, rank 2, with error feedback, from the first step
    int8+EF …    QuantizedReduce with ErrorFeedback; and int4 without it

Training runs on the unlimited link, all seeds; on each slower link a few steps are timed. Half of the ranks live in one
network namespace and half in the other (links.py), so that a limit holds for what passes between the halves; "MB" is
what the kernel counted there, both directions, per step. --local uses loopback: no limit, and no count.
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
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from links import address, available, interfaces, link
from machine import fingerprint
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn import functional as F

from evenbits.comms.ddp import QuantizedReduce
from evenbits.comms.feedback import ErrorFeedback
from evenbits.training.pictures import read_cifar10

SETTINGS = ("none", "fp16", "PowerSGD", "int8+EF", "int4+EF", "int4")
BATCH, TIMED, LAST = 64, 6, 25
# SGD's rate is one for all settings, chosen for "none".
RATE, MOMENTUM = 0.05, 0.9


def network() -> nn.Sequential:
    """Three stages of convolutions and a classifier."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 288), nn.ReLU(), nn.Linear(288, 10))


def hooked(setting: str, model: nn.Module, ddp: nn.parallel.DistributedDataParallel) -> QuantizedReduce | None:
    """Registers a setting's communication hook."""
    if setting == "fp16":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif setting == "PowerSGD":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif setting != "none":
        codec, _, feedback = setting.partition("+")
        hook = QuantizedReduce(model, codec=f"{codec}:g128", feedback=ErrorFeedback() if feedback else None)
        hook.register(ddp)
        return hook
    return None


def counted(rank: int, local: bool) -> int:
    """Bytes the kernel has sent from this half, read by its first rank."""
    if local or rank not in (0, dist.get_world_size() // 2):
        return 0
    return int(Path(f"/sys/class/net/{interfaces(int(bool(rank)), 2)[0]}/statistics/tx_bytes").read_text())


def case(rank: int, options: dict[str, Any], setting: str, seed: int, steps: int, data: Any) -> dict[str, Any]:
    """One run of `steps` steps: seconds of each, bytes, losses, accuracy."""
    world = dist.get_world_size()
    torch.manual_seed(seed)
    model = network()
    ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=100)
    hook = hooked(setting, model, ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, LAST))
    draw = torch.Generator().manual_seed(1000 + seed)
    (pictures, labels), test = data
    seconds, losses, before, sent = [], [], 0, 0
    for step in range(steps):
        mine = torch.randint(len(labels), (BATCH,), generator=draw)[rank::world]
        dist.barrier()
        if step == 2:  # DDP makes its buckets anew after the first
            before, sent = counted(rank, options["local"]), 0 if hook is None else hook.bytes_sent
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(ddp(pictures[mine]), labels[mine])
        loss.backward()
        optimizer.step()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
        schedule.step()
        losses.append(float(loss.detach()))
    bytes_there = counted(rank, options["local"]) - before
    with torch.no_grad():
        right = float((model.eval()(test[0]).argmax(1) == test[1]).float().mean())
    return {
        "seconds": seconds[2:],
        "interface": bytes_there / (steps - 2),
        "reported": None if hook is None else (hook.bytes_sent - sent) / (steps - 2),
        "loss": statistics.fmean(losses[-LAST:]),
        "accuracy": right,
    }


def work(rank: int, options: dict[str, Any], out: Path) -> None:
    """All cases of one link and number of ranks, on one rank."""
    torch.set_num_threads(1)
    half = rank >= options["world"] // 2
    where = "127.0.0.1" if options["local"] else address(0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if options["local"] else interfaces(int(half), 2)[0]
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{where}:{options['port']}",
        rank=rank,
        world_size=options["world"],
        timeout=timedelta(seconds=300),
    )
    mean, scale = 0.47, 0.25
    data = []
    for split, limit in (("train", 8192), ("test", 1000)):
        pictures, labels = read_cifar10(Path(options["data"]) / "cifar10", split, limit)
        data.append(((pictures.float() / 255 - mean) / scale, labels))
    found = []
    for setting in SETTINGS:
        for seed in range(options["seeds"]):
            made = case(rank, options, setting, seed, options["steps"], data)
            found.append({"setting": setting, "seed": seed, **made})
    out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run(options: dict[str, Any]) -> list[dict[str, Any]]:
    """All ranks of one link → one row per setting and seed; seconds are those of the slowest rank."""
    world = options["world"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        made = None if options["local"] else stack.enter_context(link(options["rate"]))
        processes = []
        for rank in range(world):
            words = [sys.executable, __file__, "--rank", str(rank), "--out", f"{folder}/{rank}"]
            prefix = [] if made is None else made.prefix(int(rank >= world // 2))
            processes.append(subprocess.Popen([*prefix, *words, "--options", json.dumps(options)]))
        try:
            codes = [process.wait(1200) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise SystemExit(f"a rank ended with {codes}")
        ranks = [json.loads(Path(f"{folder}/{rank}").read_text()) for rank in range(world)]
    rows = []
    for each in zip(*ranks, strict=True):
        reported = [one["reported"] for one in each]
        rows.append(
            {
                "world": world,
                "rate": options["rate"],
                **{key: each[0][key] for key in ("setting", "seed", "accuracy")},
                "seconds": statistics.median(max(taken) for taken in zip(*(e["seconds"] for e in each), strict=True)),
                "interface": sum(one["interface"] for one in each) or None,
                "reported": None if None in reported else sum(reported),
                "loss": statistics.fmean(one["loss"] for one in each),
            }
        )
    return rows


def table(rows: list[dict[str, Any]], rates: list[float]) -> str:
    """Markdown: one line per number of ranks and setting."""
    slow = [rate for rate in rates if rate]
    links = [f"{rate / 1e6:g} Mbit/s" for rate in slow] + ["no limit"]
    titles = ["ranks", "gradients", "MB sent, all ranks", "MB between the halves", *(f"s/step, {x}" for x in links)]
    titles += ["final loss", "accuracy %"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for world in sorted({row["world"] for row in rows}):
        for setting in SETTINGS:
            here = [row for row in rows if (row["world"], row["setting"]) == (world, setting)]
            long = [row for row in here if not row["rate"]]
            cells = [str(world), setting]
            cells += [megabytes(long[0][key]) for key in ("reported", "interface")]
            for rate in [*slow, 0.0]:
                cells.append(f"{statistics.median(row['seconds'] for row in here if row['rate'] == rate):.3f}")
            cells.append(" ".join(f"{row['loss']:.3f}" for row in long))
            cells.append(" ".join(f"{100 * row['accuracy']:.1f}" for row in long))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def megabytes(count: float | None) -> str:
    """Bytes as text, or a dash for what was not counted."""
    return "–" if count is None else f"{count / 1e6:.3f}"


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the namespaces are removed
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder that holds cifar10")
    parser.add_argument("--worlds", default="2,4")
    parser.add_argument("--rates", default="100e6,1e9,0", help="bit per second; 0, no limit, is always run")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--port", type=int, default=29500)
    parser.add_argument("--local", action="store_true", help="no namespaces: loopback")
    parser.add_argument("--json", action="store_true", help="JSON lines, the machine first")
    for hidden in ("--rank", "--out", "--options"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        work(int(given.rank), json.loads(given.options), Path(given.out))
        return
    reason = "" if given.local else available()
    if reason:
        raise SystemExit(f"{reason}; give --local for loopback instead, without slow links and the kernel's counters.")
    if given.data is None:
        parser.error("--data names the folder of the data; nothing is downloaded")
    rates = [] if given.local else [rate for rate in map(float, given.rates.split(",")) if rate]
    shared = {"data": given.data, "local": given.local, "port": given.port}
    rows = []
    for world in map(int, given.worlds.split(",")):
        for rate in [*rates, 0.0]:
            length = {"steps": TIMED + 2, "seeds": 1} if rate else {"steps": given.steps, "seeds": given.seeds}
            rows += run({**shared, **length, "world": world, "rate": rate})
    print("\n".join(json.dumps(x) for x in [fingerprint(), *rows]) if given.json else table(rows, [*rates, 0.0]))


if __name__ == "__main__":
    main()
