"""Delta coding between stages: which samples are in which microbatch, and a DeltaCoder for every edge and tensor.

    stage = CodecStage(module, index, count, device, codec="bf16/int8:g128", delta=Delta("int4:g128"))
    stage.samples(ids)                  # on every rank, before every training step: one whole number for each sample
    schedule.step(x)

Activations of a training step travel as differences from what both ends kept of the same samples (delta.py); gradients,
and activations of steps without a backward pass, by the edge's own codecs. The size of a message depends on which
samples are known, and receives are posted before earlier microbatches have arrived. So both ends settle at the start of
a step what is known in it: a sample appears once in a step, and `capacity`, if there is one, holds at least one step.
Samples that must make room are dropped then.

The identifiers do not travel. Every message carries eight bits of a checksum of its own, so that ends that were told
different samples find out. After a step that failed on all ranks, both ends forget its samples: one may have seen what
the other has not.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evenbits.comms.codecs.base import Meta
from evenbits.comms.delta import DeltaCoder
from evenbits.errors import EvenbitsError


@dataclass(frozen=True)
class Delta:
    """What CodecStage needs to know of delta coding: a DeltaCoder's arguments. folder: every edge and tensor has a
    folder of its own in it; ranks may share it. memory: of each of these.
    """

    codec: str
    first: str = "bf16"
    capacity: int | None = None
    dtype: torch.dtype | None = None
    memory: int | None = None
    folder: str | Path | None = None

    def coder(self, name: str) -> DeltaCoder:
        """One end of one edge. Raises EvenbitsError for unknown codecs and settings that do not fit."""
        folder = None if self.folder is None else Path(self.folder) / name
        options: dict[str, Any] = {"capacity": self.capacity, "dtype": self.dtype, "memory": self.memory}
        return DeltaCoder(self.codec, self.first, folder=folder, **options)

    @property
    def spec(self) -> str:
        """What all stages must agree on."""
        return DeltaCoder(self.codec, self.first, capacity=self.capacity, dtype=self.dtype).spec


class Visit:
    """One message: the coder of its edge with the message's samples, in a codec's place."""

    def __init__(self, coder: DeltaCoder, samples: Sequence[int]) -> None:
        self.coder, self.samples = coder, samples
        self.spec = coder.spec
        self._decoded: torch.Tensor | None = None

    @property
    def mark(self) -> int:
        """Eight bits that follow from the samples."""
        return zlib.crc32(repr(list(self.samples)).encode()) & 0xFF

    def payload_bytes(self, meta: Meta) -> int:
        """As a codec."""
        return self.coder.payload_bytes(meta, self.samples)

    def encode(
        self, x: torch.Tensor, *, mask: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """As a codec; mask is of gradients only. What the other end will decode is remembered."""
        payload, self._decoded = self.coder.both(x, self.samples, generator=generator)
        return payload

    def decode(self, payload: torch.Tensor, meta: Meta, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        """As a codec; at the end that encoded, what the other one decodes."""
        if self._decoded is None:
            self._decoded = self.coder.decode(payload, meta, self.samples)
        return self._decoded

    def true_bits(self, payload: torch.Tensor, meta: Meta) -> float:
        """As a codec: a payload holds nothing else."""
        return 8 * payload.numel() / max(1, meta.numel)


class Visits:
    """The delta coders of one stage.

    announced: the samples of the next step; of this one once it has begun.
    """

    def __init__(self, delta: Delta, stage: int) -> None:
        self.delta, self.stage = delta, stage
        self.announced: list[int] | None = None
        self._now: list[int] | None = None
        self._coders: dict[tuple[int, int], DeltaCoder] = {}

    def announce(self, samples: Sequence[int] | torch.Tensor) -> None:
        """The samples of the next step. Raises EvenbitsError unless they are whole numbers, each once."""
        given = samples.tolist() if isinstance(samples, torch.Tensor) else list(samples)
        if not all(isinstance(sample, int) for sample in given) or len(set(given)) != len(given):
            raise EvenbitsError(
                f"the samples of a step are whole numbers, each once; given {len(given)}, {len(set(given))} different."
            )
        if self.delta.capacity is not None and self.delta.capacity < len(given):
            raise EvenbitsError(
                f"a step of {len(given)} samples needs a delta capacity of as many at least; given "
                f"{self.delta.capacity}."
            )
        self.announced = given

    def begin(self, learns: bool) -> None:
        """A step begins. Raises EvenbitsError if it trains and its samples were not announced."""
        self._now, self.announced = (self.announced if learns else None), None
        if learns and self._now is None:
            raise EvenbitsError(
                f"stage {self.stage} has delta coding and was not told the samples of this step; call "
                "stage.samples(ids) on every rank before every training step."
            )
        for coder in self._coders.values():
            coder.expect(self._now or [])

    def of(self, edge: int, microbatch: int, slot: int, meta: Meta) -> Visit | None:
        """The coder and samples of one activation; None in a step that does not train."""
        if self._now is None:
            return None
        rows = meta.shape[0] if meta.shape else 0
        samples = self._now[microbatch * rows : (microbatch + 1) * rows]
        if not rows or len(samples) != rows:
            raise EvenbitsError(
                f"microbatch {microbatch} has {rows} samples; {len(self._now)} were announced for the whole step. "
                "Delta coding needs one identifier per sample, and samples in the first dimension."
            )
        coder = self._coders.get((edge, slot))
        if coder is None:
            coder = self._coders[edge, slot] = self.delta.coder(f"stage{self.stage}-edge{edge}-{slot}")
            coder.expect(self._now)
        return Visit(coder, samples)

    def fail(self) -> None:
        """The step failed on all ranks: its samples are unknown from here on, at both ends."""
        for coder in self._coders.values():
            coder.forget(self._now or [])

    def state(self) -> dict[str, Any]:
        """For a checkpoint: {"edge.slot": state of a coder}."""
        return {f"{edge}.{slot}": coder.state_dict() for (edge, slot), coder in self._coders.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, before the first step."""
        for name, kept in state.items():
            edge, slot = map(int, name.split("."))
            coder = self._coders.get((edge, slot)) or self.delta.coder(f"stage{self.stage}-edge{edge}-{slot}")
            coder.load_state_dict(kept)
            self._coders[edge, slot] = coder
