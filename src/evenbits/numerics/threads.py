"""`one_thread`: work made of many small operations, without torch's pool.

An operation on 65536 numbers takes some ten microseconds, and so does waking a second thread for half of it. The
search of scales is made of such operations: one thread took half the time of two (docs/log.md, 2026-11-30).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's operations run in the calling thread only; afterwards, on an error too, on as many as before."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
