"""What one rank of benchmarks/pipeline_traffic.py does: the parts of the model, one case, all cases of a link."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from links import address, interfaces
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from evenbits.comms.stages import CodecStage

SCHEDULES = {"1F1B": Schedule1F1B, "GPipe": ScheduleGPipe}
VOCABULARY = 512


class Part(nn.Module):
    """The layers of one stage, after an embedding on the first stage and before a classifier on the last."""

    def __init__(self, rank: int, stages: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width) if rank == 0 else nn.Identity()
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        whole = [nn.TransformerEncoderLayer(width, 4, 2 * width, **options) for _ in range(layers)]
        self.layer = nn.Sequential(*(whole or [nn.LayerNorm(width), nn.Linear(width, width)]))
        self.head = nn.Linear(width, VOCABULARY) if rank == stages - 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(x)))


def part_of(rank: int, options: dict[str, Any]) -> Part:
    """The same weights wherever this stage is built."""
    torch.manual_seed(rank)
    return Part(rank, options["stages"], options["width"], options["layers"])


def optimizer_of(part: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(part.parameters(), lr=0.01)


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def ids_of(options: dict[str, Any]) -> torch.Tensor:
    """Token ids of a step, and its targets."""
    size = (options["batch"], options["length"])
    return torch.randint(VOCABULARY, size, generator=torch.Generator().manual_seed(1))


def counted(rank: int, options: dict[str, Any]) -> list[int]:
    """Bytes and packets the kernel has sent from this rank's ends of links."""
    if options["local"]:
        return [0, 0]
    folders = [Path(f"/sys/class/net/{name}/statistics") for name in interfaces(rank, options["stages"])]
    return [sum(int((folder / name).read_text()) for folder in folders) for name in ("tx_bytes", "tx_packets")]


def paced(stage: Any, rate: float) -> None:
    """Make sends sleep first, for --local: a token bucket in the process, without overlap."""
    for name in ("get_fwd_send_ops", "get_bwd_send_ops"):
        whole = getattr(stage, name)

        def slow(chunk: int, whole: Any = whole) -> Any:
            ops = whole(chunk)
            time.sleep(sum(op.tensor.nbytes for op in ops) * 8 / rate)
            return ops

        setattr(stage, name, slow)


def stage_of(part: nn.Module, rank: int, stages: int, codec: str) -> Any:
    """torch's own stage for "stock"; otherwise a CodecStage, "int8:g128" or "int8:g128|1" with `ahead`."""
    device, (name, _, ahead) = torch.device("cpu"), codec.partition("|")
    if name == "stock":
        return PipelineStage(part, rank, stages, device)
    return CodecStage(part, rank, stages, device, codec=name, ahead=int(ahead) if ahead else None)


def case(rank: int, options: dict[str, Any], schedule: str, codec: str, microbatches: int) -> dict[str, Any]:
    """One schedule and codec: seconds and bytes of this rank."""
    stages, steps, stock = options["stages"], options["steps"], codec == "stock"
    part = part_of(rank, options)
    stage = stage_of(part, rank, stages, codec)
    if options["local"] and options["rate"]:
        paced(stage, options["rate"])
    engine: Any = SCHEDULES[schedule](stage, microbatches, loss_fn=loss_of)
    optimizer, ids = optimizer_of(part), ids_of(options)
    seconds, losses, before, sent = [], [], [0, 0], 0
    for step in range(steps + 1):
        dist.barrier()
        if step == 1:
            before, sent = counted(rank, options), 0 if stock else stage.bytes_sent()
        start = time.perf_counter()
        optimizer.zero_grad()
        losses = []
        given = {"target": ids, "losses": losses} if rank == stages - 1 else {}
        engine.step(*(ids,) * (rank == 0), **given)
        optimizer.step()
        if step:
            seconds.append(time.perf_counter() - start)
        dist.barrier()
    ends = (rank > 0) + (rank < stages - 1)
    raw = 4 * options["batch"] * options["length"] * options["width"] * ends * steps
    return {
        "seconds": seconds,
        "interface": [now - then for now, then in zip(counted(rank, options), before, strict=True)],
        "reported": raw if stock else stage.bytes_sent() - sent,
        "loss": sum(float(x.detach()) for x in losses) / len(losses) if losses else None,
    }


def work(rank: int, options: dict[str, Any], out: Path, instead: Callable[..., Any] | None = None) -> None:
    """All cases of one link, on one rank: a line in `out` as soon as a case is done. Or something else, in one line."""
    torch.set_num_threads(1)
    where = "127.0.0.1" if options["local"] else address(0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if options["local"] else interfaces(rank, options["stages"])[0]
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{where}:{options['port']}",
        rank=rank,
        world_size=options["stages"],
        timeout=timedelta(seconds=300),
    )
    with out.open("w") as file:
        if instead is not None:
            print(json.dumps(instead(rank, options)), file=file, flush=True)
        for schedule, codec, m in options["cases"]:
            print(json.dumps(case(rank, options, schedule, codec, m)), file=file, flush=True)
    dist.barrier()
    dist.destroy_process_group()
