"""Whether Triton's kernels can run, and why (not). Nothing is imported until somebody asks.

With TRITON_INTERPRET=1 in the environment before the first call, kernels run in Triton's interpreter, on tensors of the
CPU: slow, and good for tests.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

NEEDS = (8, 0)
_HOW = "install it with `pip install 'evenbits[gpu]'` (Linux)"


@dataclass(frozen=True)
class Status:
    """Whether the kernels can run on a device type, and the reason."""

    usable: bool
    reason: str


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def status(device: str) -> Status:
    """Says it for "cuda" or, under the interpreter, "cpu"."""
    if device == "cpu" and not interpreted():
        return Status(False, "Triton's kernels run on GPUs; on a CPU only in its interpreter (TRITON_INTERPRET=1)")
    if device not in ("cpu", "cuda"):
        return Status(False, f"there are no kernels for {device}")
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return Status(False, f"Triton cannot be imported ({error}); {_HOW}")
    if interpreted():
        return Status(True, f"evenbits' own kernels in the interpreter of Triton {version}: for tests, slow")
    if torch.version.hip is not None:
        return Status(False, "the kernels were written for NVIDIA GPUs; this torch is built for AMD's")
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else NEEDS
    if capability < NEEDS:
        return Status(False, f"compute capability {capability[0]}.{capability[1]}; the kernels need 8.0")
    return Status(True, f"evenbits' own kernels, Triton {version}")


def calls() -> ModuleType:
    """evenbits.kernels.triton.calls, imported now: it needs Triton."""
    return importlib.import_module("evenbits.kernels.triton.calls")
