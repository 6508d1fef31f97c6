"""What torch's pipeline schedules do on each rank, in order: the programs that comms/simulate.py runs.

Source: torch/distributed/pipelining/schedules.py of torch 2.13 (ScheduleGPipe, Schedule1F1B); tests compare the order
of computation with torch's own. Left out: schedules with several stages per rank, which post their receives early.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from evenbits.comms.wire import BACKWARD, FORWARD
from evenbits.errors import EvenbitsError

SCHEDULES = ("GPipe", "1F1B")


class Act(NamedTuple):
    """One line of a rank's program. kind: "compute", "post send", "post receive", "wait"; the message is named by
    direction and microbatch.
    """

    kind: str
    direction: str
    microbatch: int


def program(schedule: str, stage: int, stages: int, microbatches: int, ahead: int | None = None) -> list[Act]:
    """What torch's schedule does on one rank, in order (pipelining/schedules.py); ahead: CodecStage's, None without."""
    if schedule not in SCHEDULES:
        raise EvenbitsError(f"schedules that can be predicted: {', '.join(SCHEDULES)}; given {schedule!r}.")
    acts = list(_gpipe(microbatches) if schedule == "GPipe" else _1f1b(microbatches, stages - stage))
    if ahead is not None:
        acts = _posted_ahead(acts, microbatches, ahead)
    first, last = stage == 0, stage == stages - 1

    def exists(act: Act) -> bool:
        receives, forward = act.kind in ("post receive", "wait"), act.direction == FORWARD
        nothing = (first if receives else last) if forward else (last if receives else first)
        return act.kind == "compute" or not nothing

    return [act for act in acts if exists(act)]


def _posted_ahead(acts: list[Act], microbatches: int, ahead: int) -> list[Act]:
    """Receives that the stage posts itself: before the send that the schedule posts with them, and for `ahead` more."""
    made: list[Act] = []
    posted: set[tuple[str, int]] = set()
    for act in acts:
        if act.kind != "post receive":
            made.append(act)
            continue
        at = len(made) - 1 if made and made[-1].kind == "post send" else len(made)
        for m in range(act.microbatch, min(act.microbatch + ahead, microbatches - 1) + 1):
            if (act.direction, m) not in posted:
                posted.add((act.direction, m))
                made.insert(at, Act("post receive", act.direction, m))
                at += 1
    return made


def _gpipe(microbatches: int) -> Iterator[Act]:
    for direction in (FORWARD, BACKWARD):
        for m in range(microbatches):
            yield Act("post receive", direction, m)
            yield Act("wait", direction, m)
            yield Act("compute", direction, m)
            yield Act("post send", direction, m)


def _1f1b(microbatches: int, warmup: int) -> Iterator[Act]:
    forward = backward = 0
    for forward in range(min(warmup, microbatches)):
        if forward:
            yield Act("post send", FORWARD, forward - 1)
        yield Act("post receive", FORWARD, forward)
        yield Act("wait", FORWARD, forward)
        yield Act("compute", FORWARD, forward)
    forward += 1
    # The last send of the warm-up is posted together with the first receive of a gradient.
    yield Act("post send", FORWARD, forward - 1)
    while backward < microbatches:
        yield Act("post receive", BACKWARD, backward)
        yield Act("wait", BACKWARD, backward)
        yield Act("compute", BACKWARD, backward)
        yield Act("post send", BACKWARD, backward)
        backward += 1
        if forward < microbatches:
            yield Act("post receive", FORWARD, forward)
            yield Act("wait", FORWARD, forward)
            yield Act("compute", FORWARD, forward)
            yield Act("post send", FORWARD, forward)
            forward += 1
