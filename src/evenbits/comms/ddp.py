"""Data-parallel training with coded gradients: a communication hook for DistributedDataParallel, on gloo and NCCL.

    hook = QuantizedReduce(model, codec="int4:g128", feedback=ErrorFeedback())
    hook.register(ddp)                              # ddp = DistributedDataParallel(model)

What. Each parameter's gradient is cut into one slice per rank; every slice is coded and sent to its rank (all-to-all),
which decodes all ranks' versions, adds them in float32, divides by the number of ranks, codes the mean and sends it to
all (all-gather). Two quantizations, b/32 of the traffic (collectives.py).

Error feedback. A rank keeps what the first coding lost of its own gradient and adds it to the next one. What the second
coding lost of a mean is known to the slice's owner only, who adds it, times the number of ranks, to its own error: the
next mean then contains it. So both codings are fed back with one tensor per parameter (Seide et al. 2014; Karimireddy
et al. 2019, arXiv 1901.09847).

Buckets change. DDP builds its buckets anew after the first step, in the order gradients became ready, and a resumed run
starts with the first layout again. Here nothing depends on buckets: slices and codes are cut per parameter, errors are
kept by parameter name. A run that continues from a checkpoint is bit-identical to one that was not interrupted.

Small parameters (biases, norms: fewer than `small` elements) travel uncoded: they are few bytes and matter much.
Codecs see slices as vectors, so `row` means the whole slice.

torch's own hooks: quantization_pertensor_hook and _perchannel_hook fail on gloo (2.13), bf16_compress_hook refuses it,
and PowerSGD issues collectives from callbacks, whose order differs between ranks on gloo when there are several
buckets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from evenbits.comms.codecs import Codec, get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.collectives import aligned, exchange, gather, joined, parted, raise_at_the_end
from evenbits.comms.feedback import ErrorFeedback
from evenbits.comms.handshake import agree_on
from evenbits.comms.telemetry import Direct, Telemetry
from evenbits.comms.wire import TRAILER, AgreedError
from evenbits.errors import EvenbitsError


@dataclass
class Piece:
    """One parameter of a bucket: its name, its gradient (a view into the bucket) and how it travels."""

    name: str
    grad: torch.Tensor
    codec: Codec
    world: int
    compensated: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        flat = self.grad.detach().reshape(-1)
        self.compensated = flat if flat.dtype == torch.float64 else flat.float()

    @property
    def width(self) -> int:
        """Elements of a slice; the last ones may be shorter or empty."""
        return -(-self.grad.numel() // self.world)

    def meta(self, rank: int) -> Meta:
        """The slice that rank `rank` owns."""
        left = self.grad.numel() - rank * self.width
        return Meta((max(0, min(self.width, left)),), self.compensated.dtype)

    def nbytes(self, rank: int) -> int:
        """Bytes of the coded slice."""
        meta = self.meta(rank)
        return self.codec.payload_bytes(meta) if meta.numel else 0

    def cut(self, flat: torch.Tensor, rank: int) -> torch.Tensor:
        """That slice of a flat tensor of the parameter's size."""
        return flat[rank * self.width : rank * self.width + self.meta(rank).numel]

    def decode(self, payload: torch.Tensor, rank: int) -> torch.Tensor:
        """A payload of that slice → its elements."""
        meta = self.meta(rank)
        if not meta.numel:
            return torch.empty(0, dtype=meta.dtype, device=payload.device)
        return self.codec.decode(payload, meta)


class QuantizedReduce:
    """The hook and its state.

    model: the module given to DistributedDataParallel, or the wrapped one; its parameter names key the error feedback.
    codec: any codec of the registry.
    feedback: keeps the errors; None for none. Low bits and pruning need it, eight bits in groups do not.
    small: parameters of fewer elements travel uncoded.
    group: DDP's process group; None is the default one.
    telemetry: figures per bucket, as edge i, "reduce" for the first coding and "gather" for the second.

    All ranks compare their settings when the hook is made. Raises EvenbitsError, on all of them, if they differ.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        codec: str = "int8:g128",
        feedback: ErrorFeedback | None = None,
        small: int = 1024,
        group: dist.ProcessGroup | None = None,
        telemetry: Telemetry | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.codec, self.raw = get(codec), get("raw")
        self.feedback, self.small, self.group, self.telemetry = feedback, small, group, telemetry
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.names: dict[torch.Tensor, str] = {
            p: name.removeprefix("module.") for name, p in model.named_parameters() if p.requires_grad
        }
        self.bytes_sent, self.step = 0, 0
        self._sequence = 0
        self._places = {name: i for i, name in enumerate(self.names.values())}
        self._fault: AgreedError | None = None
        shapes = {name: list(p.shape) for p, name in self.names.items()}
        settings = {"codec": codec, "small": small, "feedback": feedback is not None, "parameters": shapes}
        agree_on(group, "ddp", settings, timedelta(seconds=timeout))

    def register(self, ddp: nn.parallel.DistributedDataParallel) -> None:
        """Make this the wrapped model's communication hook."""
        ddp.register_comm_hook(self, reduce_bucket)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: the errors of this rank and the step, from which stochastic codecs draw."""
        errors = {} if self.feedback is None else self.feedback.state_dict()
        return {"errors": errors, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict` of the same rank. Raises EvenbitsError if errors have nowhere to go."""
        if state["errors"] and self.feedback is None:
            raise EvenbitsError("the checkpoint holds errors of an error feedback; give the hook an ErrorFeedback.")
        if self.feedback is not None:
            self.feedback.load_state_dict(state["errors"])
        self.step = int(state["step"])

    # One bucket

    def reduce(self, bucket: Any) -> torch.Tensor:
        """The mean gradients of a bucket, in its own buffer.

        If a rank met NaN, all ranks leave the rest of this step's buckets as they are and raise AgreedError when the
        backward pass has ended: raised here, it would leave DDP in the middle of a step.
        """
        buffer: torch.Tensor = bucket.buffer()
        if self.world > 1 and self._fault is None:
            try:
                self._reduce(bucket)
            except AgreedError as error:
                self._fault = error
        if bucket.is_last():
            self.step += 1
            if self.telemetry is not None:
                self.telemetry.close_step()
            if self._fault is not None:
                raise_at_the_end(self._take_fault)
        return buffer

    def _take_fault(self) -> AgreedError | None:
        fault, self._fault = self._fault, None
        return fault

    def _reduce(self, bucket: Any) -> None:
        pieces = [self._piece(p, g) for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)]
        index, fault = bucket.index(), ""
        try:
            outgoing = self._coded(pieces, index)
        except EvenbitsError as error:
            fault = str(error)
            outgoing = [_nothing(pieces, r) for r in range(self.world)]
        means = self._summed(pieces, outgoing, fault)
        self._spread(pieces, means, outgoing, index)

    def _piece(self, parameter: torch.Tensor, grad: torch.Tensor) -> Piece:
        name = self.names.get(parameter)
        if name is None:
            raise EvenbitsError(
                f"a gradient of shape {list(grad.shape)} belongs to no parameter of the model that the hook was given; "
                "give it the module that DistributedDataParallel wraps."
            )
        coded = grad.numel() >= self.small and grad.is_floating_point()
        return Piece(name, grad, self.codec if coded else self.raw, self.world)

    def _coded(self, pieces: list[Piece], index: int) -> list[torch.Tensor]:
        """One vector per rank: that rank's slices of all parameters."""
        for piece in pieces:
            if self.feedback is not None and piece.codec is not self.raw:
                piece.compensated = self.feedback.compensate(piece.name, piece.grad).reshape(-1)
        return [
            joined(
                [self._encode(piece, r, piece.cut(piece.compensated, r), index, "reduce") for piece in pieces],
                pieces[0].grad.device,
            )
            for r in range(self.world)
        ]

    def _encode(self, piece: Piece, part: int, x: torch.Tensor, index: int, direction: str) -> torch.Tensor:
        if not x.numel():
            return torch.empty(0, dtype=torch.uint8, device=x.device)
        if piece.codec is self.raw:
            return self.raw.encode(x)
        # Stochastic codecs draw from a stream that follows from step, parameter, slice and rank: not from the order of
        # buckets, which changes.
        seed = 0
        for number in (self.step, self._places[piece.name], part, self.rank, direction == "gather"):
            seed = (seed * 1_000_003 + number) % 2**61
        generator = torch.Generator(x.device).manual_seed(seed)
        if self.telemetry is None or not self.telemetry.wants(self.step):
            return piece.codec.encode(x, generator=generator)
        lane = Direct(piece.codec, index, direction)
        return self.telemetry.encode(lane, x, step=self.step, generator=generator)

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    def _summed(self, pieces: list[Piece], outgoing: list[torch.Tensor], fault: str) -> list[torch.Tensor]:
        """All-to-all, then the mean of this rank's slice of every parameter, added in the order of ranks."""
        sizes = [piece.nbytes(self.rank) for piece in pieces]
        arrived = exchange(outgoing, sum(map(aligned, sizes)), group=self.group, sequence=self._next(), fault=fault)
        self.bytes_sent += sum(v.numel() + TRAILER for r, v in enumerate(outgoing) if r != self.rank)
        sums: list[torch.Tensor] = []
        for source, vector in enumerate(arrived):
            for i, (piece, payload) in enumerate(zip(pieces, parted(vector, sizes), strict=True)):
                values = piece.decode(payload, self.rank)
                if source:
                    sums[i].add_(values)
                else:
                    sums.append(values.clone())
        return [total.div_(self.world) for total in sums]

    def _spread(self, pieces: list[Piece], means: list[torch.Tensor], outgoing: list[torch.Tensor], index: int) -> None:
        """All-gather of the means, coded again; gradients and errors are written."""
        fault = ""
        try:
            coded = [
                self._encode(piece, self.rank, mean, index, "gather") for piece, mean in zip(pieces, means, strict=True)
            ]
            payload = joined(coded, pieces[0].grad.device)
        except EvenbitsError as error:
            fault, payload = str(error), _nothing(pieces, self.rank)
        sizes = [[piece.nbytes(r) for piece in pieces] for r in range(self.world)]
        whole = [sum(map(aligned, of_rank)) for of_rank in sizes]
        parts = gather(payload, whole, group=self.group, sequence=self._next(), fault=fault)
        self.bytes_sent += (self.world - 1) * (max(whole) + TRAILER)
        payloads = [parted(part, of_rank) for part, of_rank in zip(parts, sizes, strict=True)]
        sent = [parted(vector, of_rank) for vector, of_rank in zip(outgoing, sizes, strict=True)]
        for i, (piece, mean) in enumerate(zip(pieces, means, strict=True)):
            result = torch.cat([piece.decode(payloads[r][i], r) for r in range(self.world)])
            if self.feedback is not None and piece.codec is not self.raw:
                decoded = torch.cat([piece.decode(sent[r][i], r) for r in range(self.world)])
                own = piece.cut(decoded, self.rank)
                own -= self.world * (mean - piece.cut(result, self.rank))
                shape = piece.grad.shape
                self.feedback.update(piece.name, piece.compensated.view(shape), decoded.view(shape))
            piece.grad.copy_(result.view(piece.grad.shape))


def _nothing(pieces: list[Piece], rank: int) -> torch.Tensor:
    """Zeros of the size of that rank's slices, for a rank that could not code them."""
    size = sum(aligned(piece.nbytes(rank)) for piece in pieces)
    return torch.zeros(size, dtype=torch.uint8, device=pieces[0].grad.device)


def reduce_bucket(state: QuantizedReduce, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """The hook in the form DDP wants: the reduced bucket as a finished future."""
    buffer = bucket.buffer()
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future(
        devices=[buffer.device] if buffer.is_cuda else None
    )
    future.set_result(state.reduce(bucket))
    return future


# DDP compares annotations with the classes themselves; here they are strings.
reduce_bucket.__annotations__.clear()
