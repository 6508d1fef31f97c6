"""What benchmarks/pipeline_traffic.py predicts, from costs clocked in other runs than the measured ones.

compute     each kind of stage (first, middle, last) alone in a process: forward, backward, optimizer of a microbatch,
            without pipeline, link and codec; and the same in two processes at once, for what cores cost each other
codecs      comms/timing.py on a tensor of the boundary's shape
messages    a pipeline of next to no computation and 256-byte messages on an unthrottled link: the seconds per message
            that make the model's step as long as the measured one; for torch's stage and for a coded one
link        the rate that tc was told, less packet headers, and its bucket's size; without a limit, what one message
            of the boundary's size takes longer than a small one between two processes that do nothing else
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from links import burst, payload_rate
from pipeline_ranks import case, ids_of, loss_of, optimizer_of, part_of

from evenbits.comms.simulate import Costs, Machine, Network, predict
from evenbits.comms.timing import timed
from evenbits.comms.wire import Edge

KINDS = ("first", "middle", "last")
TINY = {"width": 8, "layers": 0, "length": 1, "batch": 64}  # 8 microbatches of 8 × 1 × 8 float32
MESSAGES = ("stock", "raw|1")


def compute_of(options: dict[str, Any], microbatches: int, repeats: int) -> dict[str, list[float]]:
    """Median seconds of [forward, backward, optimizer] of one microbatch, for each kind of stage of three."""
    found = {}
    for rank, kind in enumerate(KINDS):
        part = part_of(rank, {**options, "stages": 3})
        optimizer, ids = optimizer_of(part), ids_of(options).chunk(microbatches)[0]
        hidden = torch.randn(*ids.shape, options["width"])
        laps = []
        for _ in range(repeats + 2):
            x = ids if rank == 0 else hidden.clone().requires_grad_()
            start = time.perf_counter()
            y = part(x)
            y = loss_of(y, ids) if kind == "last" else y
            middle = time.perf_counter()
            y.backward(None if kind == "last" else hidden)
            end = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            laps.append((middle - start, end - middle, time.perf_counter() - end))
        found[kind] = [statistics.median(lap) for lap in zip(*laps[2:], strict=True)]
    return found


def alone(options: dict[str, Any], out: Path) -> None:
    """Computation, and codecs unless another process computes at the same time: one process's part of a calibration."""
    torch.set_num_threads(1)
    repeats = options["repeats"]
    made: dict[str, Any] = {"compute": {str(m): compute_of(options, m, repeats) for m in options["counts"]}}
    made["tiny"] = compute_of({**options, **TINY}, 8, repeats)
    if options["codecs"]:
        x = torch.randn(options["batch"] // options["microbatches"], options["length"], options["width"])
        made["codecs"] = {name: list(timed(name, x, repeats)) for name in options["codecs"]}
    out.write_text(json.dumps(made))


def messages(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    """On two ranks: steps of the tiny pipeline, and the seconds that messages of two sizes take one way."""
    tiny = {**options, **TINY, "stages": 2, "steps": 20}
    steps = {name: [case(rank, tiny, kind, name, 8)["seconds"] for kind in ("1F1B", "GPipe")] for name in MESSAGES}
    size = 4 * options["batch"] // options["microbatches"] * options["length"] * options["width"]
    ways = []
    for nbytes in (256, size):
        buffer, laps = torch.zeros(nbytes, dtype=torch.uint8), []
        for _ in range(options["repeats"] + 2):
            dist.barrier()
            start = time.perf_counter()
            for turn in (0, 1):
                dist.send(buffer, 1 - rank) if rank == turn else dist.recv(buffer, 1 - rank)
            laps.append((time.perf_counter() - start) / 2)
        ways.append(statistics.median(laps[2:]))
    return {"steps": steps, "ways": ways, "size": size}


def calibrated(single: dict[str, Any], pair: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything `foretold` needs, from the outputs of `alone`, of two of them at once, and of `messages`."""

    def total(made: dict[str, Any]) -> float:
        return sum(sum(laps[:2]) for kinds in made["compute"].values() for laps in kinds.values())

    together = min(1.0, total(single) / statistics.fmean(map(total, pair)))
    small, large = (max(way) for way in zip(*(rank["ways"] for rank in ranks), strict=True))
    spent = {}
    for name in MESSAGES:
        per_kind = []
        for i, schedule in enumerate(("1F1B", "GPipe")):
            step = statistics.median(
                max(laps) for laps in zip(*(rank["steps"][name][i] for rank in ranks), strict=True)
            )
            per_kind.append(_message(schedule, step, single["tiny"], Machine(2, together), name))
        spent[name] = statistics.fmean(per_kind)
    free = 8 * ranks[0]["size"] / max(large - small, 1e-6)
    return {**single, "together": together, "messages": spent, "free": free}


def _message(schedule: str, step: float, tiny: dict[str, Any], machine: Machine, name: str) -> float:
    """Seconds per message with which the model's step of the tiny pipeline is as long as the measured one."""
    low, high = 0.0, step
    for _ in range(40):
        middle = (low + high) / 2
        costs = [Costs(*tiny[kind][:2], 256, 256, message=middle) for kind in ("first", "last")]
        made = predict(
            schedule, stages=2, microbatches=8, cost=costs, net=Network(1e12), ahead=_ahead(name), machine=machine
        )
        low, high = (middle, high) if made.seconds + tiny["last"][2] < step else (low, middle)
    return low


def _ahead(codec: str) -> int | None:
    ahead = codec.partition("|")[2]
    return int(ahead) if ahead else None


def foretold(
    calibration: dict[str, Any], options: dict[str, Any], schedule: str, codec: str, microbatches: int
) -> float:
    """The model's seconds of a step, optimizer included."""
    name, stages = codec.partition("|")[0], options["stages"]
    compute = calibration["compute"][str(microbatches)]
    kinds = [KINDS[(stage > 0) + (stage == stages - 1)] for stage in range(stages)]
    if name == "stock":
        nbytes = 4 * options["batch"] // microbatches * options["length"] * options["width"]
        coding: list[float] = [nbytes, nbytes]
    else:
        edge = Edge.of(name)
        there, back = (calibration["codecs"][spec[0]] for spec in (edge.forward, edge.backward))
        coding = [there[2], back[2], *there[:2], *back[:2]]
    message = calibration["messages"]["stock" if name == "stock" else "raw|1"]
    costs = [Costs(*compute[kind][:2], *coding, message=message) for kind in kinds]
    rate = options["rate"]
    mtu = options["mtu"]
    if not rate:
        net = Network(calibration["free"])
    elif options["local"]:
        net = Network(rate)
    else:
        net = Network(payload_rate(rate, mtu), burst=burst(rate, mtu))
    machine = Machine(calibration["cores"], calibration["together"])
    made = predict(
        schedule, stages=stages, microbatches=microbatches, cost=costs, net=net, ahead=_ahead(codec), machine=machine
    )
    return made.seconds + max(compute[kind][2] for kind in kinds)
