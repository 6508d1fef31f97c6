"""A cut inside one process: what passes is coded and decoded as it would be between two stages.

The numbers are those of a pipeline with the same codecs and microbatches, bit for bit (with codecs that draw random
numbers, only in distribution: the order of messages differs). Nothing is sent, and no byte is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.telemetry import Direct, Telemetry
from evenbits.comms.wire import BACKWARD, FORWARD, TRAILER


class FakeCut(nn.Module):
    """Codes the floating-point tensors that pass, and the gradients that come back.

    edge: its number among the cuts, from 0. forward_codec, backward_codec: spellings.
    step: set by whoever runs the steps; stochastic codecs and telemetry follow it.
    bytes: of the messages that a pipeline would have sent so far.
    """

    def __init__(self, edge: int, forward_codec: str, backward_codec: str, telemetry: Telemetry | None) -> None:
        super().__init__()
        self.lanes = {d: Direct(get(c), edge, d) for d, c in ((FORWARD, forward_codec), (BACKWARD, backward_codec))}
        self.telemetry, self.edge, self.step, self.bytes = telemetry, edge, 0, 0
        self._generator = torch.Generator()

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step = step
        self._generator.manual_seed(step << 20 | self.edge)

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
