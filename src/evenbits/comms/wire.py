"""What one message between two stages looks like, and who uses which codec.

    frame = payload bytes ‖ trailer (8 bytes)
    trailer = magic, flags, level, mark, sequence (4 bytes, little endian)

A receiver posts its buffer before anything is sent, with the trailer set to zero. gloo accepts a message shorter than
the buffer without a word, so a payload that was cut shows only in its missing trailer. `sequence` names step,
microbatch, direction and slot: a message that arrives out of turn is an error, not a wrong activation. `flags` says
that the sender could not code its tensor (comms/faults.py). `level` announces which rung of the codec ladder the
sender will use in the NEXT step (comms/guard.py): both ends change at the same step, without a further message. `mark`
is 0, or follows from the samples of a delta-coded message (comms/visits.py): both ends must mean the same ones. Eight
bytes per message are counted in every figure that is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from evenbits.comms.codecs import Codec, get
from evenbits.errors import EvenbitsError

WIRE_VERSION = 1
TRAILER = 8
POISON = 1
_MAGIC = 0xEB

FORWARD, BACKWARD = "forward", "backward"


class LinkError(EvenbitsError):
    """A step that could not be finished, because of this rank or of another one."""


class AgreedError(LinkError):
    """A LinkError that every rank of a group raises, with the same words, at the same place: none of them is left
    waiting. ranks: how many they are; in a job of several groups the others do not know of it.
    """

    def __init__(self, text: str, ranks: int) -> None:
        super().__init__(text)
        self.ranks = ranks


class FrameError(LinkError):
    """A message that was cut, or that is not the one this rank waits for."""


@dataclass(frozen=True)
class Edge:
    """The codecs between stage i and stage i + 1, each direction on its own.

    forward, backward: ladders, lowest first; without a guard only the first rung is used.
    prune_embeddings: whether a codec that prunes may cut a first stage that ends in its embedding
        (comms/embeddings.py).
    """

    forward: tuple[str, ...]
    backward: tuple[str, ...]
    prune_embeddings: bool = False

    @staticmethod
    def of(given: str | Edge) -> Edge:
        """ "int8:g128" for both directions, "int4:g128/int8:g128" for forward and backward, and a ladder with ">":
        "int4:g128>int8:g128/int8:g128". Raises EvenbitsError for other spellings and unknown codecs.
        """
        if isinstance(given, Edge):
            edge = given
        elif isinstance(given, str) and given.count("/") <= 1:
            forward, _, backward = given.partition("/")
            edge = Edge(_ladder(forward), _ladder(backward or forward))
        else:
            raise EvenbitsError(
                f"an edge is spelled 'forward/backward', such as 'int4:g128/int8:g128', or is an Edge; given {given!r}."
            )
        for spec in edge.forward + edge.backward:
            get(spec)
        if not edge.forward or not edge.backward or len(edge.forward) > 255 or len(edge.backward) > 255:
            raise EvenbitsError(f"each direction of an edge needs between 1 and 255 codecs; given {edge}.")
        return edge

    def __str__(self) -> str:
        return f"{'>'.join(self.forward)}/{'>'.join(self.backward)}"


def _ladder(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(">"))


def edge_of(codec: str | Edge | Mapping[int, str | Edge], index: int) -> Edge:
    """The edge between stage `index` and the next, from what the user gave. A mapping must name every edge that a stage
    asks for: raises EvenbitsError otherwise.
    """
    if isinstance(codec, (str, Edge)):
        return Edge.of(codec)
    if index not in codec:
        raise EvenbitsError(
            f"no codec for the edge between stages {index} and {index + 1}; given edges: {sorted(codec)}. Name every "
            "edge, 'raw' where nothing shall be compressed."
        )
    return Edge.of(codec[index])


@dataclass
class Lane:
    """One direction of one edge, at one end of it. `level` is the rung in use, `following` the rung of the next step,
    `sent` the bytes handed to the link so far.
    """

    edge: int
    direction: str
    specs: tuple[str, ...]
    level: int = 0
    following: int = 0
    sent: int = 0
    codecs: list[Codec] = field(init=False)

    def __post_init__(self) -> None:
        self.codecs = [get(spec) for spec in self.specs]

    @property
    def codec(self) -> Codec:
        """The codec of the current step."""
        return self.codecs[self.level]

    def advance(self) -> None:
        """A new step begins: the rung that was announced is used from here on."""
        self.level = self.following

    def hear(self, level: int) -> None:
        """The sender announced its rung of the next step. Raises FrameError if the ladder has no such rung."""
        if level >= len(self.codecs):
            raise FrameError(f"the sender announced rung {level}; the ladder {'>'.join(self.specs)} has no such rung.")
        self.following = level


def sequence_of(step: int, microbatch: int, direction: str, slot: int) -> int:
    """32 bits that two neighbouring messages never share."""
    return (step & 0xFFF) << 20 | (microbatch & 0xFFF) << 8 | (direction == BACKWARD) << 7 | (slot & 0x7F)


def framed(payload: torch.Tensor, *, sequence: int, flags: int = 0, level: int = 0, mark: int = 0) -> torch.Tensor:
    """payload uint8 [n] → uint8 [n + 8], on the payload's device."""
    frame = torch.empty(payload.numel() + TRAILER, dtype=torch.uint8, device=payload.device)
    frame[:-TRAILER] = payload
    trailer = [_MAGIC, flags, level, mark, *sequence.to_bytes(4, "little")]
    frame[-TRAILER:] = torch.tensor(trailer, dtype=torch.uint8)
    return frame


def blank(nbytes: int, device: torch.device) -> torch.Tensor:
    """A receive buffer for a payload of `nbytes`: uint8 [nbytes + 8], trailer zero."""
    frame = torch.empty(nbytes + TRAILER, dtype=torch.uint8, device=device)
    frame[-TRAILER:] = 0
    return frame


def opened(frame: torch.Tensor, sequence: int, mark: int = 0) -> tuple[torch.Tensor, int, int]:
    """A received frame → payload (a view), flags, announced level. Raises FrameError if it was cut or is another."""
    magic, flags, level, marked, *rest = frame[-TRAILER:].tolist()
    if magic != _MAGIC:
        raise FrameError(
            f"a message of {frame.numel()} bytes arrived without its end: it was cut, or the sender uses another codec "
            "or another version of evenbits."
        )
    found = int.from_bytes(bytes(rest), "little")
    if found != sequence:
        raise FrameError(
            f"a message arrived out of turn: {named(found)} instead of {named(sequence)}. Both ends must run the same "
            "schedule with the same number of microbatches."
        )
    if marked != mark:
        raise FrameError(f"{named(sequence)}: the two ends were told different samples for this message.")
    return frame[:-TRAILER], flags, level


def named(sequence: int) -> str:
    """A sequence number in words."""
    direction = BACKWARD if sequence >> 7 & 1 else FORWARD
    return f"step {sequence >> 20}, microbatch {sequence >> 8 & 0xFFF}, {direction}, slot {sequence & 0x7F}"


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """Any tensor as its bytes, uint8 [n]: integer tensors travel so."""
    return x.detach().contiguous().view(-1).view(torch.uint8)


def from_bytes(payload: torch.Tensor, shape: Any, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of `as_bytes` → tensor."""
    return payload.view(dtype).view(tuple(shape))
