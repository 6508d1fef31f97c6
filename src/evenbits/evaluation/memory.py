"""What the process and a model really occupy."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn


def peak_bytes() -> int:
    """The largest resident memory of this process so far, in bytes (VmHWM where the system has it)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once (tied weights are one)."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
