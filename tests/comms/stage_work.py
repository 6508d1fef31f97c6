"""What the ranks do in tests/comms/test_stages.py. No pytest here: the processes import this file."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from pipelines import BATCH, LENGTH, MICROBATCHES, VOCABULARY, WIDTH, Last, Pipeline, batch, loss_of, modules
from torch import nn
from torch.distributed.pipelining import Schedule1F1B
from torch.nn.parallel import DistributedDataParallel

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.ddp import QuantizedReduce
from evenbits.comms.faults import one_error
from evenbits.comms.stages import CodecStage
from evenbits.comms.telemetry import Telemetry
from evenbits.comms.wire import Edge


def train(rank: int, world: int, schedule: str, steps: int, stock: bool = False, **options: Any) -> Any:
    """Losses of every step, a digest of gradients and parameters, and bytes sent."""
    line = Pipeline(schedule, rank, world, stock=stock, **options)
    losses = [line.step(*batch(step)) for step in range(steps)]
    sent = 0 if stock else sum(stage.bytes_sent() for stage in line.stages)
    return losses, line.digest(), sent


def against_stock(rank: int, world: int, schedules: list[str], steps: int) -> Any:
    """Per schedule: the stock stage's run and the raw codec's."""
    return {
        name: (train(rank, world, name, steps, True)[:2], train(rank, world, name, steps, codec="raw")[:2])
        for name in schedules
    }


def train_all(rank: int, world: int, schedules: list[str], codec: str, steps: int) -> Any:
    """Per schedule: a run with this codec."""
    return {name: train(rank, world, name, steps, codec=codec) for name in schedules}


def two_stages(rank: int, world: int, codecs: list[str], steps: int) -> Any:
    """Per codec: 1F1B over two stages; the first one may be pruned."""
    found = {}
    for codec in codecs:
        edge = Edge.of(codec)
        found[codec] = train(rank, world, "1F1B", steps, codec=Edge(edge.forward, edge.backward, prune_embeddings=True))
    return found


class _Cut(torch.autograd.Function):
    """What the edge does, without an edge: the oracle of the two-stage runs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: str, backward: str) -> torch.Tensor:
        payload = get(forward).encode(x)
        ctx.mask = get(forward).mask_of(payload, Meta.of(x)) if get(backward).keeps_mask else None
        ctx.backward_spec = backward
        return get(forward).decode(payload, Meta.of(x))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        codec, meta = get(ctx.backward_spec), Meta.of(grads[0])
        return codec.decode(codec.encode(grads[0], mask=ctx.mask), meta, mask=ctx.mask), None, None


def one_process(codec: str, steps: int) -> list[list[float]]:
    """The losses of `two_stages`, computed in one process with fake quantization at the cut."""
    edge = Edge.of(codec)
    parts = modules(2)
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-2) for part in parts]
    losses = []
    for step in range(steps):
        ids, target = batch(step)
        losses.append([])
        for part in parts:
            part.zero_grad(set_to_none=True)
        for ids_m, target_m in zip(ids.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
            hidden = _Cut.apply(parts[0](ids_m), edge.forward[0], edge.backward[0])
            loss = loss_of(parts[1](hidden), target_m)
            loss.backward()
            losses[-1].append(float(loss.detach()))
        for part, optimizer in zip(parts, optimizers, strict=True):
            for p in part.parameters():
                p.grad.div_(MICROBATCHES)
            optimizer.step()
    return losses


class Several(nn.Module):
    """Hidden → float tensor, integer tensor, float tensor without gradient, channels-last tensor."""

    def __init__(self, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.memory_format = memory_format

    def forward(self, ids: torch.Tensor) -> Any:
        h = self.mix(nn.functional.one_hot(ids % WIDTH, WIDTH).float())
        picture = self.conv(h.view(-1, 2, LENGTH // 2, WIDTH)).to(memory_format=self.memory_format)
        return h, ids * 7, h.detach().bfloat16(), picture


class Joined(nn.Module):
    """The four tensors of `Several` → logits."""

    def __init__(self) -> None:
        super().__init__()
        self.last = Last()
        self.seen: list[dict[str, Any]] = []

    def forward(self, h: torch.Tensor, ids: torch.Tensor, half: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        assert ids.dtype == torch.int64
        self.seen = [
            {"strides": t.stride(), "learns": t.requires_grad, "leaf": t.is_leaf, "type": str(t.dtype)}
            for t in (h, picture, half)
        ]
        extra = ids.float().unsqueeze(-1) + half.float().mean(-1, keepdim=True) + picture.mean()
        return self.last(h + 1e-3 * extra)


def several(rank: int, world: int) -> Any:
    """Mixed outputs: stock, raw, and what the second stage saw of channels-last and other tensors."""
    runs: list[Any] = []
    for stock, layout in (
        (True, torch.contiguous_format),
        (False, torch.contiguous_format),
        (False, torch.channels_last),
    ):
        torch.manual_seed(1)
        parts = [Several(layout), Joined()]
        line = Pipeline("1F1B", rank, world, stock=stock, parts=parts, **({} if stock else {"codec": "raw"}))
        runs.append(([line.step(*batch(step)) for step in range(2)], line.digest()))
    return [*runs[:2], parts[1].seen]


def static_and_eval(rank: int, world: int) -> Any:
    """A stage with given shapes; eval() between two training steps changes nothing in the training."""
    size = BATCH // MICROBATCHES
    shapes = [
        {
            "input_args": torch.zeros(size, LENGTH, dtype=torch.long),
            "output_args": torch.zeros(size, LENGTH, WIDTH, requires_grad=True),
        },
        {
            "input_args": torch.zeros(size, LENGTH, WIDTH, requires_grad=True),
            "output_args": torch.zeros(size, LENGTH, 31, requires_grad=True),
        },
    ]
    found = []
    for evaluates in (False, True):
        line = Pipeline("1F1B", rank, world, codec="int8:g16", **shapes[rank])
        losses = [line.step(*batch(0))]
        if evaluates:
            ids, target = batch(9)
            made: list[torch.Tensor] = []
            if rank == 0:
                line.schedule.eval(ids)
            else:
                line.schedule.eval(target=target, losses=made)
                assert len(made) == MICROBATCHES
        losses.append(line.step(*batch(1)))
        found.append((losses, line.digest()))
    return found


def per_edge(rank: int, world: int) -> Any:
    """Different codecs on the edges of a pipeline of four; bytes sent by each rank."""
    codec = {0: "int8:g16/bf16", 1: "int4:g16/int8:g16", 2: "raw/int2:g16"}
    return train(rank, world, "GPipe", 1, codec=codec)


def handshake(rank: int, world: int, case: str) -> Any:
    """A pipeline whose ends do not fit together: the error, and how the group lives on."""
    import evenbits.comms.handshake as module

    options: dict[str, Any] = {"codec": "int8:g16", "timeout": 2.0}
    microbatches = MICROBATCHES
    if case == "codec" and rank == 1:
        options["codec"] = "int8:g16/int4:g16"
    if case == "version" and rank == 1:
        module.__version__ = "0.0.1"
    if case == "microbatches" and rank == 1:
        microbatches = 2
    if case == "embedding":
        options["codec"] = "top0.5+int8:g16"
    parts = modules(2)
    if case == "embedding":
        parts[0] = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.LayerNorm(WIDTH))
    stage = CodecStage(parts[rank], rank, world, torch.device("cpu"), **options)
    schedule = Schedule1F1B(stage, microbatches, loss_fn=loss_of)
    ids, target = batch(0)
    try:
        if rank == 0:
            schedule.step(ids)
        else:
            schedule.step(target=target[: len(target) * microbatches // MICROBATCHES])
    except ValueError as error:
        text = f"{type(error).__name__}: {error}"
    else:
        text = "no error"
    torch.distributed.barrier()
    return text


def stock_neighbour(rank: int, world: int) -> Any:
    """Rank 1 uses torch's own stage."""
    line = Pipeline("1F1B", rank, world, stock=rank == 1, **({} if rank == 1 else {"codec": "raw", "timeout": 1.0}))
    line.step(*batch(0))


def behind_a_layer(rank: int, world: int) -> Any:
    """What a layer makes of an embedding may be pruned."""
    stage = CodecStage(modules(2)[rank], rank, world, torch.device("cpu"), codec="top0.5+int8:g16")
    return stage._refuses()


def order(rank: int, world: int, schedule: str) -> Any:
    """The order in which this rank computes, as observed."""
    line = Pipeline(schedule, rank, world, codec="raw")
    stage, found = line.stages[0], []

    def noted(direction: str, whole: Any) -> Any:
        def call(microbatch: int, *args: Any, **options: Any) -> Any:
            found.append((direction, microbatch))
            return whole(microbatch, *args, **options)

        return call

    stage.forward_one_chunk = noted("forward", stage.forward_one_chunk)
    stage.backward_one_chunk = noted("backward", stage.backward_one_chunk)
    line.step(*batch(0))
    return found


def ahead(rank: int, world: int, schedules: list[str], codec: str) -> Any:
    """The same run with receives posted by the schedule and up to five microbatches ahead."""
    return {
        name: [train(rank, world, name, 2, codec=codec, ahead=near) for near in (None, 0, 1, 5)] for name in schedules
    }


def both_ways(rank: int, world: int, codec: str, spoilt: bool = False) -> Any:
    """Two pipelines of two stages side by side, each stage in DDP with coded gradients: ranks 0-1 and 2-3."""
    lines, pairs = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    pipes = [dist.new_group(ranks) for ranks in lines]
    doubles = [dist.new_group(ranks) for ranks in pairs]
    pipe, double = pipes[rank // 2], doubles[rank % 2]
    parts: list[Any] = modules(2)
    parts[rank % 2] = DistributedDataParallel(parts[rank % 2], process_group=double)
    hook = QuantizedReduce(parts[rank % 2], codec=codec, small=8, group=double)
    hook.register(parts[rank % 2])
    line = Pipeline("1F1B", rank % 2, 2, parts=parts, codec=codec, group=pipe)
    losses = []
    for step in range(4):
        if spoilt and step == 2 and rank == 0:
            with torch.no_grad():
                line.stages[0].submod.module.mix.bias[0] = float("nan")
        with one_error(line.schedule):
            losses.append(line.step(*batch(10 * step + rank // 2)))
    return losses, line.digest(), hook.bytes_sent


def measured(rank: int, world: int, folder: str) -> Any:
    """A run with telemetry in a file per rank."""
    telemetry = Telemetry(f"{folder}/{rank}.jsonl", every=2)
    line = Pipeline("1F1B", rank, world, codec="int4:g16/int8:g16", telemetry=telemetry)
    for step in range(5):
        line.step(*batch(step))
    telemetry.close()
    return line.stages[0].bytes_sent(), telemetry.summary()


def wrong_ahead(rank: int, world: int) -> Any:
    Pipeline("1F1B", rank, world, codec="raw", ahead=-1)
