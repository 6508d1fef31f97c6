"""Tensors into frames and back, for one stage: which codec, which index set, and what to do when it cannot be done.

The stage (comms/stages.py) says which message it is by edge, direction, microbatch and slot (the place among the
tensors that travel together); this file knows nothing of schedules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from evenbits.comms.codecs import Codec
from evenbits.comms.codecs.base import FLOATS, Meta
from evenbits.comms.faults import NOT_CODED, NOT_FINITE, NOT_READ, Desk, Fault
from evenbits.comms.guard import Guard
from evenbits.comms.telemetry import Direct, Telemetry
from evenbits.comms.visits import Delta, Visit, Visits
from evenbits.comms.wire import (
    BACKWARD,
    FORWARD,
    POISON,
    Edge,
    Lane,
    as_bytes,
    blank,
    framed,
    from_bytes,
    opened,
    sequence_of,
)
from evenbits.errors import EvenbitsError

SENT, RECEIVED = "sent", "received"


class Courier:
    """The messages of one stage.

    edges: {index: Edge} of the one or two edges at this stage.
    delta: how activations are delta-coded; None if they are not.
    learns: whether gradients will come back in this step; set by the stage.
    """

    def __init__(
        self,
        stage: int,
        edges: Mapping[int, Edge],
        device: torch.device,
        desk: Desk,
        telemetry: Telemetry | None,
        guard: Guard | None,
        delta: Delta | None = None,
    ) -> None:
        self.stage, self.device, self.desk = stage, device, desk
        self.visits = None if delta is None else Visits(delta, stage)
        self.telemetry, self.guard = telemetry, guard
        self.lanes: dict[tuple[int, str], Lane] = {}
        for index, edge in edges.items():
            self.lanes[index, FORWARD] = Lane(index, FORWARD, edge.forward)
            self.lanes[index, BACKWARD] = Lane(index, BACKWARD, edge.backward)
        self.step = -1
        self.learns = False
        self._generator = torch.Generator(device)
        self._frames: dict[tuple[str, int, int], torch.Tensor] = {}
        self._masks: dict[tuple[str, int, int], torch.Tensor] = {}
        self._sick: set[int] = set()

    def begin(self) -> None:
        """A step begins: announced rungs come into use, nothing of the last step is left."""
        if self.visits is not None:
            self.visits.begin(self.learns)
        for lane in self.lanes.values():
            lane.advance()
        if self.telemetry is not None:
            self.telemetry.close_step()
            if self.guard is not None and self.learns:
                for lane in self.outgoing():
                    lane.following = self.guard.rung(lane, self.telemetry.last(lane.edge, lane.direction))
        self.step += 1
        # Stochastic codecs draw from a stream of their own that follows from the step: the model's random numbers are
        # not touched, and a resumed run draws the same ones.
        self._generator.manual_seed(self.step << 20 | self.stage)
        self._frames.clear()
        self._masks.clear()
        self._sick.clear()

    def stay(self) -> None:
        """The step failed: no rung changes, since an announcement may not have arrived."""
        for lane in self.lanes.values():
            lane.following = lane.level
        if self.visits is not None:
            self.visits.fail()

    def outgoing(self) -> list[Lane]:
        """The lanes this stage sends on, and so decides about: forward after it, backward before it."""
        mine = {(self.stage, FORWARD), (self.stage - 1, BACKWARD)}
        return [lane for key, lane in self.lanes.items() if key in mine]

    def _kept(self, edge: int, direction: str, end: str, microbatch: int, slot: int) -> torch.Tensor | None:
        """The forward's index set, if this is a gradient and both codecs of the edge keep one."""
        if direction == FORWARD or not self.lanes[edge, BACKWARD].codec.keeps_mask:
            return None
        return self._masks.get((end, microbatch, slot))

    def buffer(self, edge: int, direction: str, microbatch: int, slot: int, meta: Any) -> torch.Tensor:
        """A receive buffer of the packed size, for a tensor of `meta` (a torch pipelining tensor meta)."""
        seen = Meta(tuple(meta.shape), meta.dtype)
        if meta.dtype not in FLOATS:
            nbytes = seen.raw_bytes
        else:
            visit = self._visit(edge, direction, microbatch, slot, seen)
            nbytes = self._nbytes(edge, direction, seen, self._kept(edge, direction, SENT, microbatch, slot), visit)
        frame = self._frames[direction, microbatch, slot] = blank(nbytes, self.device)
        return frame

    def _visit(self, edge: int, direction: str, microbatch: int, slot: int, meta: Meta) -> Visit | None:
        """How an activation is delta-coded, if it is."""
        if self.visits is None or direction == BACKWARD or meta.dtype not in FLOATS:
            return None
        return self.visits.of(edge, microbatch, slot, meta)

    def _nbytes(
        self, edge: int, direction: str, meta: Meta, mask: torch.Tensor | None, visit: Visit | None = None
    ) -> int:
        if visit is not None:
            return visit.payload_bytes(meta)
        codec = self.lanes[edge, direction].codec
        return codec.payload_bytes(meta) if mask is None else codec.payload_bytes_on(meta, int(mask.sum()))

    def frame(self, edge: int, direction: str, microbatch: int, slot: int, x: torch.Tensor) -> torch.Tensor:
        """A tensor as a frame, uint8. What cannot be coded becomes a poisoned frame and a fault (comms/faults.py)."""
        lane = self.lanes[edge, direction]
        flags, mask = 0, self._kept(edge, direction, RECEIVED, microbatch, slot)
        visit = self._visit(edge, direction, microbatch, slot, Meta.of(x)) if x.dtype in FLOATS else None
        if x.dtype not in FLOATS:
            payload = as_bytes(x)
        else:
            try:
                payload = self._encoded(lane, x, mask, visit)
            except EvenbitsError as error:
                nbytes = self._nbytes(edge, direction, Meta.of(x), mask, visit)
                flags, payload = POISON, torch.zeros(nbytes, dtype=torch.uint8, device=x.device)
                finite = bool(torch.isfinite(x).all())
                self._sicken(error, NOT_CODED if finite else NOT_FINITE, direction, microbatch)
            else:
                if visit is None:
                    self._remember(lane, SENT, microbatch, slot, payload, Meta.of(x))
        sequence, mark = sequence_of(self.step, microbatch, direction, slot), 0 if visit is None else visit.mark
        frame = framed(payload, sequence=sequence, flags=flags, level=lane.following, mark=mark)
        lane.sent += frame.numel()
        return frame

    def _encoded(self, lane: Lane, x: torch.Tensor, mask: torch.Tensor | None, visit: Visit | None) -> torch.Tensor:
        used: Lane | Direct = lane if visit is None else Direct(cast(Codec, visit), lane.edge, lane.direction)
        if self.telemetry is None or not self.telemetry.wants(self.step):
            return used.codec.encode(x, mask=mask, generator=self._generator)
        return self.telemetry.encode(used, x, mask=mask, step=self.step, generator=self._generator)

    def read(self, edge: int, direction: str, microbatch: int, slot: int, meta: Any) -> torch.Tensor:
        """A received frame → a fresh tensor of `meta`; NaN if it was poisoned or, in training, cannot be read."""
        frame = self._frames.pop((direction, microbatch, slot))
        lane, seen = self.lanes[edge, direction], Meta(tuple(meta.shape), meta.dtype)
        visit = self._visit(edge, direction, microbatch, slot, seen)
        try:
            sequence, mark = sequence_of(self.step, microbatch, direction, slot), 0 if visit is None else visit.mark
            payload, flags, level = opened(frame, sequence, mark)
            lane.hear(level)
            if meta.dtype not in FLOATS:
                return from_bytes(payload, meta.shape, meta.dtype)
            if flags & POISON:
                self._sick.add(microbatch)
                return self._spoilt(meta)
            mask = self._kept(edge, direction, SENT, microbatch, slot)
            decoded = (visit or lane.codec).decode(payload, seen, mask=mask)
        except EvenbitsError as error:
            if not self.learns:  # Without a backward pass no rank waits for this one at the end of the step.
                raise
            self._sicken(error, NOT_READ, direction, microbatch)
            return self._spoilt(meta)
        if visit is None:
            self._remember(lane, RECEIVED, microbatch, slot, payload, seen)
        if decoded.stride() == tuple(meta.stride):
            return decoded
        return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=self.device).copy_(decoded)

    def _remember(self, lane: Lane, end: str, microbatch: int, slot: int, payload: torch.Tensor, meta: Meta) -> None:
        """Keep the index set of a forward payload until its gradient has passed."""
        if lane.direction == FORWARD and self.learns and lane.codec.keeps_mask:
            mask = lane.codec.mask_of(payload, meta)
            if mask is not None:
                self._masks[end, microbatch, slot] = mask

    def _sicken(self, error: Exception, kind: int, direction: str, microbatch: int) -> None:
        """Remember where a fault began; what follows from a poisoned frame is no fault of its own."""
        if microbatch not in self._sick:
            self._sick.add(microbatch)
            self.desk.note(Fault(kind, self.stage, microbatch, direction), str(error))

    def _spoilt(self, meta: Any) -> torch.Tensor:
        """What stands in for a tensor that did not arrive: NaN, or zero for integers, which index tables."""
        value = float("nan") if meta.dtype in FLOATS else 0
        return torch.full(tuple(meta.shape), value, dtype=meta.dtype, device=self.device)
