"""Fully sharded training (FSDP2) with coded gradients, and coded weights if asked.

    model = fully_shard(...)                                          # torch.distributed.fsdp
    coded = code_fsdp(model, gradients="int8:g128", weights="raw", feedback=ErrorFeedback())

What. FSDP2 lets a module's two collectives be replaced: `set_custom_reduce_scatter` and `set_custom_all_gather`. The
reduce-scatter becomes an all-to-all of codes and a sum in float32 (collectives.py): one quantization, because the
result stays with its owner. The all-gather carries the coded shard; its owner, too, computes with the decoded one, so
that all ranks have the same weights (ZeRO++'s qwZ and qgZ, arXiv 2306.10209). Master weights in the optimizer stay
exact.

When. Gradients at eight bits need no feedback; fewer do. Coded weights are a change of the model: four bits are for
measured cases only.

Error feedback is kept per FSDP module, by its name and the fixed order of its parameters. A module whose parameters do
not all get gradients in every step changes that order and is refused by the feedback.

Left out: overlap (the exchange blocks the stream that FSDP gives it), several parameter groups per module, which
torch's own setters refuse, and reductions other than sum and mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from evenbits.comms.codecs import Codec, get
from evenbits.comms.codecs.base import FLOATS, Meta
from evenbits.comms.collectives import exchange, gather, raise_at_the_end
from evenbits.comms.feedback import ErrorFeedback
from evenbits.comms.handshake import agree_on
from evenbits.comms.wire import TRAILER, AgreedError
from evenbits.errors import EvenbitsError


class CodedFSDP:
    """What the collectives of one model share. Made by `code_fsdp`.

    bytes_sent: bytes this rank has handed to its links.
    """

    def __init__(self, gradients: str, weights: str, feedback: ErrorFeedback | None) -> None:
        self.gradients, self.weights, self.feedback = get(gradients), get(weights), feedback
        self.bytes_sent, self.calls = 0, 0
        self.fault: AgreedError | None = None

    def next_call(self) -> int:
        """A number that all ranks count alike: FSDP issues collectives in the same order everywhere."""
        self.calls += 1
        return self.calls

    def generator(self, device: torch.device) -> torch.Generator:
        """What stochastic codecs draw from: a stream that follows from the call and the rank."""
        return torch.Generator(device).manual_seed(self.calls << 20 | dist.get_rank())

    def put_off(self, fault: AgreedError) -> None:
        """Raise when the backward pass has ended: raised inside, it would leave FSDP in the middle of a step."""
        if self.fault is None:
            self.fault = fault
            raise_at_the_end(self.take_fault)

    def take_fault(self) -> AgreedError | None:
        """The fault of this step, once."""
        fault, self.fault = self.fault, None
        return fault

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of this rank must hold."""
        return {"calls": self.calls, "errors": {} if self.feedback is None else self.feedback.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict` of the same rank. Raises EvenbitsError if errors have nowhere to go."""
        if state["errors"] and self.feedback is None:
            raise EvenbitsError("the checkpoint holds errors of an error feedback; give code_fsdp an ErrorFeedback.")
        if self.feedback is not None:
            self.feedback.load_state_dict(state["errors"])
        self.calls = int(state["calls"])


class _Allocates:
    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Plain memory."""
        return torch.empty(*size, dtype=dtype, device=device)


class CodedReduceScatter(_Allocates, ReduceScatter):
    """input [W · n] → output [n], the sum or mean over ranks of this rank's part; codes travel."""

    def __init__(self, name: str, coded: CodedFSDP) -> None:
        self.name, self.coded = name, coded

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Blocks; returns None. Raises EvenbitsError for reductions other than sum and mean; a NaN on one rank makes
        the output NaN on all, which raise AgreedError when the backward pass has ended.
        """
        mean = op == dist.ReduceOp.AVG
        if not mean and op != dist.ReduceOp.SUM:
            raise EvenbitsError(f"a coded reduce-scatter adds or averages; given {op}. Use the default divide factor.")
        try:
            output_tensor.copy_(self._reduced(input_tensor, group, dist.get_world_size(group) if mean else 1))
        except AgreedError as fault:
            output_tensor.fill_(float("nan"))
            self.coded.put_off(fault)
        return None

    def _reduced(self, x: torch.Tensor, group: dist.ProcessGroup, divide: int) -> torch.Tensor:
        world, codec, call = dist.get_world_size(group), self.coded.gradients, self.coded.next_call()
        feedback, fault = self.coded.feedback, ""
        wide = x if x.dtype == torch.float64 else x.float()
        sent = wide if feedback is None else feedback.compensate(self.name, wide)
        meta = Meta((x.numel() // world,), wide.dtype)
        generator = self.coded.generator(x.device)
        try:
            payloads = [codec.encode(part, generator=generator) for part in sent.view(world, -1)]
        except EvenbitsError as error:
            fault = str(error)
            payloads = [torch.zeros(codec.payload_bytes(meta), dtype=torch.uint8, device=x.device)] * world
        arrived = exchange(payloads, codec.payload_bytes(meta), group=group, sequence=call, fault=fault)
        self.coded.bytes_sent += (world - 1) * (codec.payload_bytes(meta) + TRAILER)
        if feedback is not None:
            feedback.update(self.name, sent, torch.cat([codec.decode(payload, meta) for payload in payloads]))
        total = codec.decode(arrived[0], meta).clone()
        for payload in arrived[1:]:
            total += codec.decode(payload, meta)
        return total.div_(divide) if divide > 1 else total


class CodedAllGather(_Allocates, AllGather):
    """input [n] of each rank → output [W · n] on all ranks, decoded; tensors that are not floating-point travel as they
    are.
    """

    def __init__(self, coded: CodedFSDP) -> None:
        self.coded = coded

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Blocks; returns None. Raises AgreedError, on all ranks, if a weight of one of them is NaN."""
        world, call = dist.get_world_size(group), self.coded.next_call()
        codec: Codec = self.coded.weights if input_tensor.dtype in FLOATS else get("raw")
        seen = input_tensor if input_tensor.dtype in FLOATS else input_tensor.view(torch.uint8)
        if seen.dtype == torch.uint8:
            parts = gather(seen, [seen.numel()] * world, group=group, sequence=call, fault="")
            output_tensor.view(torch.uint8).copy_(torch.cat(parts))
            self.coded.bytes_sent += (world - 1) * (seen.numel() + TRAILER)
            return None
        meta, fault = Meta.of(seen), ""
        nbytes = codec.payload_bytes(meta)
        try:
            payload = codec.encode(seen, generator=self.coded.generator(seen.device))
        except EvenbitsError as error:
            fault, payload = str(error), torch.zeros(nbytes, dtype=torch.uint8, device=seen.device)
        parts = gather(payload, [nbytes] * world, group=group, sequence=call, fault=fault)
        self.coded.bytes_sent += (world - 1) * (nbytes + TRAILER)
        output_tensor.copy_(torch.cat([codec.decode(part, meta) for part in parts]))
        return None


def code_fsdp(
    model: nn.Module,
    *,
    gradients: str = "int8:g128",
    weights: str = "raw",
    feedback: ErrorFeedback | None = None,
    timeout: float = 60.0,
) -> CodedFSDP:
    """Give every FSDP module of a model coded collectives.

    model: after `fully_shard`. gradients, weights: codecs; weights "raw" keeps torch's own all-gather. feedback: for
    the gradients. Raises EvenbitsError if no module is sharded, and on all ranks if their settings differ.
    """
    sharded = [(name, module) for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    if not sharded:
        raise EvenbitsError("no module of this model is sharded; call fully_shard before code_fsdp.")
    coded = CodedFSDP(gradients, weights, feedback)
    settings = {
        "gradients": gradients,
        "weights": weights,
        "feedback": feedback is not None,
        "modules": [name for name, _ in sharded],
    }
    agree_on(None, "fsdp", settings, timedelta(seconds=timeout))
    for name, module in sharded:
        module.set_custom_reduce_scatter(CodedReduceScatter(name, coded))
        if weights != "raw":
            module.set_custom_all_gather(CodedAllGather(coded))
    return coded
