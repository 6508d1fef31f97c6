"""What a codec costs on this machine: seconds to encode and decode one tensor, bytes of its message.

Break-even. A codec pays off on a link slower than 8 · (bytes saved) / (encode + decode seconds): `break_even`.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.wire import TRAILER


class Timing(NamedTuple):
    """Seconds to encode and decode one tensor, bytes of its message."""

    encode: float
    decode: float
    nbytes: int


def timed(spec: str, x: torch.Tensor, repeats: int = 5) -> Timing:
    """A codec on x, timed on this machine: the best of `repeats`, after one call that is not counted."""
    codec, meta = get(spec), Meta.of(x)
    payload, encode, decode = codec.encode(x), [], []
    codec.decode(payload, meta)
    for _ in range(max(1, repeats)):
        start = time.perf_counter()
        payload = codec.encode(x)
        middle = time.perf_counter()
        codec.decode(payload, meta)
        encode.append(middle - start)
        decode.append(time.perf_counter() - middle)
    return Timing(min(encode), min(decode), payload.numel() + TRAILER)


def break_even(mine: Timing, other: Timing) -> float:
    """Bit per second below which one codec moves a tensor faster than another (both `timed` on it): infinite if it is
    both smaller and quicker to code, 0 if it is not smaller.
    """
    saved, extra = other.nbytes - mine.nbytes, mine.encode + mine.decode - other.encode - other.decode
    if saved <= 0:
        return 0.0
    # Sums of equal times may differ in their last bit, which is no difference.
    return 8 * saved / extra if extra > 1e-12 * (mine.encode + mine.decode) else float("inf")
