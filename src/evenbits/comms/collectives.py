"""The two exchanges a quantized reduction is made of, on bytes, with any back end.

Codes cannot be added in flight: their scales differ. So a reduction is an all-to-all of codes, a sum in float32 where
each rank decodes its own part, and an all-gather of the sums, coded again (ZeRO++'s qgZ, arXiv 2306.10209). With b
bits the traffic is b/32 of an all-reduce's. Everything travels as one uint8 vector per rank and call, since gloo knows
few types.

Each rank's part ends in the trailer of comms/wire.py. A rank that cannot code its tensor sends poisoned parts, so that
no rank is left waiting, and all of them raise the same AgreedError when the exchange is over. Collectives are issued by
the thread that calls, one after the other, never from a future's callback: on gloo their order would differ between
ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from evenbits.comms.wire import POISON, TRAILER, AgreedError, FrameError, blank, framed, opened

ALIGN = 8
# torch 2.13 has renamed it, and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def aligned(nbytes: int) -> int:
    """Bytes a payload takes in a longer vector, so that the next one can be viewed as any type."""
    return -(-nbytes // ALIGN) * ALIGN


def joined(payloads: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Payloads in one vector, each from an aligned place on: uint8."""
    vector = torch.zeros(sum(aligned(p.numel()) for p in payloads), dtype=torch.uint8, device=device)
    place = 0
    for payload in payloads:
        vector[place : place + payload.numel()] = payload
        place += aligned(payload.numel())
    return vector


def parted(vector: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """The payloads of `joined`, given their sizes: views."""
    parts, place = [], 0
    for size in sizes:
        parts.append(vector[place : place + size])
        place += aligned(size)
    return parts


def exchange(
    payloads: list[torch.Tensor], expected: int, *, group: dist.ProcessGroup | None, sequence: int, fault: str
) -> list[torch.Tensor]:
    """payloads[d] goes to rank d; returns what each rank sent to this one, `expected` bytes each (views).

    fault: why this rank could not code its tensor, or "" if it could. Raises AgreedError on all ranks if one could not.
    """
    flags = POISON if fault else 0
    frames = [framed(p, sequence=sequence & 0xFFFFFFFF, flags=flags) for p in payloads]
    arrived = torch.cat([blank(expected, p.device) for p in payloads])
    dist.all_to_all_single(
        arrived, torch.cat(frames), [expected + TRAILER] * len(frames), [f.numel() for f in frames], group=group
    )
    return _checked(list(arrived.split(expected + TRAILER)), sequence, fault)


def gather(
    payload: torch.Tensor, sizes: list[int], *, group: dist.ProcessGroup | None, sequence: int, fault: str
) -> list[torch.Tensor]:
    """Every rank's payload, sizes[r] bytes from rank r, in the order of ranks (views). Shorter ones are padded to the
    longest on the way. fault and errors: as in `exchange`.
    """
    longest = max(sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=payload.device)
    padded[: payload.numel()] = payload
    frame = framed(padded, sequence=sequence & 0xFFFFFFFF, flags=POISON if fault else 0)
    arrived = torch.cat([blank(longest, payload.device) for _ in sizes])
    _all_gather(arrived, frame, group=group)
    parts = _checked(list(arrived.split(longest + TRAILER)), sequence, fault)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def _checked(frames: list[torch.Tensor], sequence: int, fault: str) -> list[torch.Tensor]:
    parts, sick = [], []
    for rank, frame in enumerate(frames):
        try:
            part, flags, _ = opened(frame, sequence & 0xFFFFFFFF)
        except FrameError as error:
            raise FrameError(
                f"the part of rank {rank} in a reduction could not be read: all ranks must use the same model, codec "
                f"and version ({error})"
            ) from error
        parts.append(part)
        if flags & POISON:
            sick.append(rank)
    if sick:
        raise AgreedError(
            f"rank(s) {sick} could not code their gradients, which most likely hold NaN or infinite values"
            f"{f' ({fault})' if fault else ''}. No rank has stepped its optimizer: drop this batch, or continue from "
            "the last checkpoint with a lower learning rate or loss scale.",
            len(frames),
        )
    return parts


def raise_at_the_end(take: Callable[[], AgreedError | None]) -> None:
    """Raise what `take` returns, if anything, when the current backward pass has ended, from `backward()` itself. DDP
    and FSDP queue their own ends during the pass; a callback that queues a callback comes after them.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback

    def last() -> None:
        fault = take()
        if fault is not None:
            raise fault

    queue(lambda: queue(last))
