"""When something breaks: one error, with the same words, on every rank.

Three kinds, three ways to the same end.

1. A tensor that cannot be coded (NaN, infinite values) or a message that cannot be read (cut, out of turn). The
   rank that sees it does not raise at once: its neighbours would wait for messages that never come. It sends poisoned
   frames, which arrive as NaN, and the step runs to its end. There all ranks of the pipeline exchange one number
   (`Desk.agree`, a maximum over 8 bytes) and all raise before any optimizer has stepped: parameters and
   optimizer are those of the last good step, so the caller may load a checkpoint, or drop the batch
   (`one_error(schedule)` makes the schedule forget it). With codec "raw" NaN travels, as with the stock stage.
2. A process that dies, a link that stalls, an exception in the model. `one_error()` around the step turns what the
   process group raises into a LinkError, writes the rank's reason into the job's store, and closes this rank's
   connections, which wakes the ranks that wait for it; they do the same in turn. gloo cannot be woken otherwise (its
   `abort` does nothing), so a stall lasts at most the timeout given to `init_process_group`.
3. Ends that do not fit together never get as far as a message (comms/handshake.py).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from evenbits.comms.handshake import Card
from evenbits.comms.wire import BACKWARD, FORWARD, AgreedError, LinkError

NOT_FINITE, NOT_CODED, NOT_READ = 1, 2, 3
_WORDS = {
    NOT_FINITE: "the {what} to send holds NaN or infinite values",
    NOT_CODED: "the {what} to send could not be coded",
    NOT_READ: "the {what} received could not be read: cut, out of turn, or not this codec's",
}


@dataclass(frozen=True)
class Fault:
    """What broke, where, in 47 bits, so that a maximum over all ranks picks one of several."""

    kind: int
    stage: int
    microbatch: int
    direction: str

    def code(self) -> int:
        """A positive number; 0 means that nothing broke."""
        return self.kind << 44 | self.stage << 24 | self.microbatch << 8 | (self.direction == BACKWARD)

    @staticmethod
    def of(code: int) -> Fault:
        """The inverse of `code`."""
        direction = BACKWARD if code & 1 else FORWARD
        return Fault(code >> 44, code >> 24 & 0xFFFFF, code >> 8 & 0xFFFF, direction)

    def __str__(self) -> str:
        what = "gradient" if self.direction == BACKWARD else "activation"
        return f"stage {self.stage}, microbatch {self.microbatch}: {_WORDS[self.kind].format(what=what)}"


@dataclass
class Desk:
    """What the stages of one process share: their cards, the faults of this step, who has finished it, and the stages
    themselves.
    """

    group: dist.ProcessGroup | None
    device: torch.device
    cards: dict[int, Card] = field(default_factory=dict)
    fault: int = 0
    detail: str = ""
    finished: set[int] = field(default_factory=set)
    stages: WeakSet[Any] = field(default_factory=WeakSet)

    def begin(self, stage: int) -> None:
        """A step begins; what an interrupted one left is forgotten."""
        self.finished.discard(stage)
        self.fault, self.detail = 0, ""

    def note(self, fault: Fault, detail: str) -> None:
        """Remember a fault until the end of the step; of several, the one with the highest code."""
        if fault.code() > self.fault:
            self.fault, self.detail = fault.code(), detail

    def agree(self, stage: int, local: set[int]) -> None:
        """Called by each stage of this process when its step is done; the last one of them compares with all ranks and
        raises AgreedError on every one of them if any noted a fault.
        """
        self.finished.add(stage)
        if not local <= self.finished:
            return
        self.finished -= local
        worst = torch.tensor([self.fault], dtype=torch.int64, device=self.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self.group)
        code = int(worst.item())
        if code:
            for each in self.stages:
                each.courier.stay()
            own = f" ({self.detail})" if self.fault == code else ""
            raise AgreedError(
                f"{Fault.of(code)}{own}. No rank has stepped its optimizer: drop this batch, or continue from the last "
                "checkpoint with a lower learning rate or loss scale.",
                dist.get_world_size(self.group),
            )


_DESKS: dict[str, Desk] = {}


def desk_of(group: dist.ProcessGroup | None, device: torch.device) -> Desk:
    """The desk that all stages of this process and group share."""
    name = "default" if group is None else group.group_name
    desk = _DESKS.get(name)
    if desk is None or desk.group is not group:
        desk = _DESKS[name] = Desk(group, device)
    return desk


@contextmanager
def one_error(schedule: Any = None, *, grace: float = 1.0) -> Iterator[None]:
    """Around every step: whatever stops the step here or on another rank becomes one LinkError that names the rank
    where it began.

    The process group is destroyed: after an error in the middle of a step its messages no longer match. Start it again
    and continue from the last checkpoint. An AgreedError that all ranks of the job raise together passes unchanged and
    leaves the group as it is; one that only a part of them raises (one pipeline of several) stops the others too.

    schedule: the pipeline schedule whose step this is. torch's schedules keep the losses of a step that raised; given
        here, it is ready for the next batch.
    grace: seconds to wait for the reasons of other ranks.
    """
    try:
        yield
    except Exception as error:
        if not dist.is_initialized():
            raise
        if isinstance(error, AgreedError) and error.ranks == dist.get_world_size():
            for kept in ("_internal_losses", "fwd_recv_ops", "bwd_recv_ops"):
                getattr(schedule, kept, []).clear()
            raise
        raise _stopped(error, grace) from error


def _stopped(error: Exception, grace: float) -> LinkError:
    """Tell the other ranks why, close this rank's connections, and put together what all of them said."""
    rank, world = dist.get_rank(), dist.get_world_size()
    consequence = _is_consequence(error)
    mine = ("heard " if consequence else "began ") + _reason(error)
    store = PrefixStore("evenbits/stopped", _get_default_store())
    lost = not _write(store, rank, mine)
    _close(error)
    reasons = {} if lost else _reasons(store, world, rank, grace if consequence else 0.0)
    if not lost and -1 not in reasons:
        # Who said nothing by now reads nothing either; an error that began here wakes the others only now.
        _leave(store, set(reasons) if consequence else set(range(world)) - {rank}, rank, 2 * grace)
    return LinkError(_sentence({**reasons, rank: mine}, world, lost or -1 in reasons))


def _reason(error: BaseException) -> str:
    """An error and where it came from, each in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no text"]
    text = f"{type(error).__name__}: {lines[0][:300]}"
    return text if error.__cause__ is None else f"{text} (from {_reason(error.__cause__)})"


def _is_consequence(error: BaseException) -> bool:
    """Whether the error came from the process group, and so may have begun on another rank."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "NCCL", "Connection closed", "Timed out", "ProcessGroup")
    )


def _write(store: Store, rank: int, text: str) -> bool:
    """Whether the reason could be written; the process that holds the store may be the one that died."""
    try:
        store.set(f"{rank}", text)
    except RuntimeError:
        return False
    return True


def _close(error: BaseException) -> None:
    """Drop this rank's connections. The frames of the failed step and the receives that stages have posted hold
    references to the group, which would keep it.
    """
    traceback.clear_frames(error.__traceback__)
    for desk in _DESKS.values():
        for stage in desk.stages:
            stage.drop_receives()
    if dist.is_initialized():
        dist.destroy_process_group()
    for desk in _DESKS.values():
        desk.group = None
    _DESKS.clear()


def _reasons(store: Store, world: int, rank: int, grace: float) -> dict[int, str]:
    """What the other ranks wrote within the grace time; the key -1 stands for a store that was lost meanwhile."""
    found: dict[int, str] = {}
    until = time.monotonic() + grace
    while True:
        try:
            for other in range(world):
                if other not in found and other != rank and store.check([f"{other}"]):
                    found[other] = store.get(f"{other}").decode()
        except RuntimeError:
            return {**found, -1: ""}
        if len(found) >= world - 1 or time.monotonic() >= until:
            return found
        time.sleep(0.05)


def _leave(store: Store, readers: set[int], rank: int, grace: float) -> None:
    """Say that this rank has read the reasons. Rank 0, whose process usually holds the store, waits for the others to
    say so before it raises: the store may go with it.
    """
    until = time.monotonic() + grace
    try:
        store.set(f"read/{rank}", "1")
        while rank == 0 and time.monotonic() < until:
            if all(store.check([f"read/{other}"]) for other in readers):
                return
            time.sleep(0.05)
    except RuntimeError:  # Gone already: nobody can read any more.
        return


def _sentence(reasons: dict[int, str], world: int, lost: bool) -> str:
    reasons = {r: text for r, text in reasons.items() if r >= 0}
    began = {r: text.removeprefix("began ") for r, text in reasons.items() if text.startswith("began ")}
    silent = sorted(set(range(world)) - set(reasons))
    if began:
        cause = "; ".join(f"rank {r} stopped with {text}" for r, text in sorted(began.items()))
    elif lost:
        cause = "the store was lost, and with it, most likely, the rank that held it (rank 0 unless chosen otherwise)"
    elif silent:
        cause = f"rank(s) {silent} said nothing: killed, stalled or cut off"
        heard = "; ".join(f"rank {r}: {text.removeprefix('heard ')}" for r, text in sorted(reasons.items()))
        cause += f" ({heard})"
    else:
        cause = "; ".join(f"rank {r}: {text.removeprefix('heard ')}" for r, text in sorted(reasons.items()))
    return f"the step could not be finished: {cause}. Start all ranks again and continue from the last checkpoint."
