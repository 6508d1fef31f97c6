"""What the ranks do in tests/comms/test_ddp.py."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.ddp import QuantizedReduce
from evenbits.comms.faults import one_error
from evenbits.comms.feedback import ErrorFeedback
from evenbits.comms.telemetry import Telemetry

Named = dict[str, torch.Tensor]


class Net(nn.Module):
    """Parameters of odd sizes, used in another order than they are registered."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(37, 5)
        self.early = nn.Linear(11, 53)
        self.middle = nn.Linear(53, 37, bias=False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.late(torch.relu(self.middle(torch.relu(self.early(x))))) * self.scale


def made(rank: int, *, view: bool = False, feedback: bool = True, codec: str = "int4:g32", **more: Any) -> Any:
    """Model, wrapped model, hook, optimizer. Buckets are so small that there are several."""
    torch.manual_seed(5)
    net = Net()
    ddp = DistributedDataParallel(net, bucket_cap_mb=0.004, gradient_as_bucket_view=view)
    hook = QuantizedReduce(net, codec=codec, feedback=ErrorFeedback() if feedback else None, small=100, **more)
    hook.register(ddp)
    return net, ddp, hook, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def data(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(16, 11, generator=generator)
    return x, (x[:, :5].sign() > 0).float()


def gradients(net: nn.Module) -> dict[str, list[float]]:
    return {name: p.grad.flatten().tolist() for name, p in net.named_parameters() if p.grad is not None}


def digest(net: nn.Module) -> str:
    value = hashlib.sha256()
    for p in net.parameters():
        value.update(p.detach().numpy().tobytes())
    return value.hexdigest()


def one_step(rank: int, world: int, view: bool, feedback: bool, codec: str, steps: int) -> Any:
    """Gradients as the hook leaves them, and the local ones before it, for `steps` steps without an optimizer."""
    net, ddp, hook, _ = made(rank, view=view, feedback=feedback, codec=codec)
    plain = Net()
    found = []
    for step in range(steps):
        plain.load_state_dict(net.state_dict())
        x, y = data(rank, step)
        plain.zero_grad()
        nn.functional.mse_loss(plain(x), y).backward()
        net.zero_grad()
        nn.functional.mse_loss(ddp(x), y).backward()
        found.append((gradients(plain), gradients(net)))
    return found, hook.bytes_sent


def expected(local: list[Named], errors: list[Named], codec: str, small: int) -> Named:
    """The oracle: the algorithm in one process, on all ranks' local gradients. Updates `errors`; returns the means."""
    world, means = len(local), {}
    for name in local[0]:
        shape = local[0][name].shape
        flats = [g[name].flatten() for g in local]
        n = flats[0].numel()
        if n < small:
            total = flats[0].clone()
            for f in flats[1:]:
                total += f
            means[name] = (total / world).view(shape)
            continue
        sent = [f + e.get(name, torch.zeros(n)) for f, e in zip(flats, errors, strict=True)]
        out, lost = [], [torch.zeros(n) for _ in range(world)]
        width = -(-n // world)
        for owner in range(world):
            part = slice(owner * width, min(n, (owner + 1) * width))
            total = torch.zeros(part.stop - part.start)
            for r in range(world):
                arrived = through(codec, sent[r][part])
                lost[r][part] += sent[r][part] - arrived
                total = arrived.clone() if r == 0 else total + arrived
            mean = total / world
            out.append(through(codec, mean))
            lost[owner][part] += world * (mean - out[-1])
        for e, value in zip(errors, lost, strict=True):
            e[name] = value
        means[name] = torch.cat(out).view(shape)
    return means


def through(codec: str, x: torch.Tensor) -> torch.Tensor:
    return get(codec).decode(get(codec).encode(x), Meta.of(x))


def train(rank: int, world: int, start: int, stop: int, folder: str, codec: str, view: bool) -> Any:
    """Steps start … stop from the checkpoint of `start`; a checkpoint at every step."""
    net, ddp, hook, optimizer = made(rank, view=view, codec=codec)
    if start:
        kept = torch.load(f"{folder}/{rank}-{start}.pt", weights_only=True)
        net.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        hook.load_state_dict(kept["hook"])
    losses = []
    for step in range(start, stop):
        x, y = data(rank, step)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(ddp(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "hook": hook.state_dict()}
        torch.save(state, f"{folder}/{rank}-{step + 1}.pt")
    return losses, digest(net)


def compare(rank: int, world: int, codecs: list[str], steps: int) -> Any:
    """Final loss on common data per codec, after `steps` steps; "none" is DDP without a hook."""
    x, y = data(99, 99)
    found = {}
    for codec in codecs:
        torch.manual_seed(5)
        net = Net()
        ddp = DistributedDataParallel(net, bucket_cap_mb=0.004)
        if codec != "none":
            name, _, fed = codec.partition("|")
            QuantizedReduce(net, codec=name, feedback=ErrorFeedback() if fed else None, small=100).register(ddp)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for step in range(steps):
            a, b = data(rank, step)
            optimizer.zero_grad()
            nn.functional.mse_loss(ddp(a), b).backward()
            optimizer.step()
        found[codec] = float(nn.functional.mse_loss(net(x), y).detach()), digest(net)
    return found


def nan(rank: int, world: int) -> Any:
    """NaN in rank 1's gradient in the second step; then the next batch."""
    net, ddp, _, optimizer = made(rank)
    found: list[Any] = []
    for step in range(4):
        x, y = data(rank, step)
        if step == 1 and rank == 1:
            x = x.clone()
            x[3, 3] = float("nan")
        optimizer.zero_grad()
        begun = time.monotonic()
        before = digest(net)
        try:
            with one_error():
                nn.functional.mse_loss(ddp(x), y).backward()
        except ValueError as error:
            found.append((type(error).__name__, str(error), time.monotonic() - begun))
            assert digest(net) == before
            continue
        optimizer.step()
        found.append(digest(net))
    return found


def differing(rank: int, world: int) -> Any:
    """The ranks were given different codecs."""
    made(rank, codec="int4:g32" if rank else "int8:g32", timeout=5.0)


def measured(rank: int, world: int) -> Any:
    """Telemetry of a step."""
    telemetry = Telemetry()
    _, ddp, _, _ = made(rank, telemetry=telemetry)
    x, y = data(rank, 0)
    nn.functional.mse_loss(ddp(x), y).backward()
    return [(f.direction, f.codec, f.elements, f.snr_db) for f in telemetry.history]
