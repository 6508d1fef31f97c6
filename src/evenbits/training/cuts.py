"""A cut inside one process: what passes is coded and decoded as it would be between two stages.

The numbers are those of a pipeline with the same codecs and microbatches, bit for bit (with codecs that draw random
numbers, only in distribution: the order of messages differs). Nothing is sent, and no byte is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evenbits.comms.codecs.base import Meta
from evenbits.comms.guard import Guard
from evenbits.comms.telemetry import Telemetry
from evenbits.comms.wire import BACKWARD, FORWARD, TRAILER, Edge, Lane


class FakeCut(nn.Module):
    """Codes the floating-point tensors that pass, and the gradients that come back.

    index: its number among the cuts, from 0. edge: the codecs, or ladders of them. guard: climbs the ladders, or warns,
    from the telemetry's figures; it decides one step ahead, as between two stages.
    device: where the tensors lie that pass.
    step: set by whoever runs the steps; stochastic codecs and telemetry follow it.
    bytes: of the messages that a pipeline would have sent so far.
    """

    def __init__(
        self, index: int, edge: Edge, telemetry: Telemetry | None, guard: Guard | None, device: torch.device
    ) -> None:
        super().__init__()
        self.lanes = {d: Lane(index, d, specs) for d, specs in ((FORWARD, edge.forward), (BACKWARD, edge.backward))}
        self.telemetry, self.guard, self.index, self.step, self.bytes = telemetry, guard, index, 0, 0
        self._generator = torch.Generator(device)

    def begin(self, step: int) -> None:
        """A step begins: what was decided in the last one comes into use, and the guard decides about the next."""
        self.step = step
        self._generator.manual_seed(step << 20 | self.index)
        self.advance()
        for lane in self.lanes.values():
            if self.guard is not None and self.telemetry is not None:
                lane.following = self.guard.rung(lane, self.telemetry.last(self.index, lane.direction))

    def advance(self) -> None:
        """Rungs that were announced come into use."""
        for lane in self.lanes.values():
            lane.advance()

    def forward(self, *given: Tensor) -> Any:
        """The same tensors, the floating-point ones coded and decoded."""
        if self.training:
            self.bytes += sum(x.nbytes + TRAILER for x in given if not x.is_floating_point())
        coded: Any = _Coded.apply
        made = tuple(coded(x, self) if x.is_floating_point() else x for x in given)
        return made[0] if len(made) == 1 else made

    def passed(self, direction: str, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x as it arrives, and the index set of its message. Raises EvenbitsError for NaN and infinite values."""
        lane, meta = self.lanes[direction], Meta.of(x)
        if self.telemetry is not None and self.telemetry.wants(self.step) and self.training:
            payload = self.telemetry.encode(lane, x, step=self.step, mask=mask, generator=self._generator)
        else:
            payload = lane.codec.encode(x, mask=mask, generator=self._generator)
        if self.training:
            self.bytes += payload.numel() + TRAILER
        return lane.codec.decode(payload, meta, mask=mask), lane.codec.mask_of(payload, meta) if mask is None else mask


class _Coded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: FakeCut) -> Tensor:
        made, mask = cut.passed(FORWARD, x, None)
        keeps = cut.lanes[FORWARD].codec.keeps_mask and cut.lanes[BACKWARD].codec.keeps_mask
        ctx.cut, ctx.mask = cut, mask if keeps else None
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.cut.passed(BACKWARD, grad, ctx.mask)[0], None
