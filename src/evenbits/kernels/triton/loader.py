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

from evenbits.errors import EvenbitsError

VARIABLE = "EVENBITS_INT_MM_ROWS"
NEEDS, E4M3_NEEDS = (8, 0), (8, 9)
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
        return Status(False, f"compute capability {_dotted(capability)}; the kernels need 8.0")
    return Status(True, f"evenbits' own kernels, Triton {version}")


@cache
def e4m3_status(device: str) -> Status:
    """Says for a device with these kernels whether they multiply E4M3 activations (FP8) there."""
    if not interpreted() and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < E4M3_NEEDS:
            return Status(
                False, f"no FP8 products: they need compute capability 8.9, {device} has {_dotted(capability)}"
            )
    return Status(True, "FP8 activations too")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def int_mm_from() -> int:
    """From how many rows on int8 weights are multiplied by torch._int_mm, between Triton's quantization and epilogue:
    1024, or the environment's EVENBITS_INT_MM_ROWS (0: never). Raises EvenbitsError if that is no number."""
    text = os.environ.get(VARIABLE, "1024")
    if not text.isdecimal():
        raise EvenbitsError(f"{VARIABLE} is a number of rows, 0 for never; given {text!r}.")
    return int(text) or 1 << 62


def note() -> str:
    """Who multiplies int8 weights, in words."""
    rows = int_mm_from()
    many = "" if rows >= 1 << 62 else f", from {rows} rows on by torch._int_mm between them (a guess, not measured)"
    return f"int8 weights too{many}"


def calls() -> ModuleType:
    """evenbits.kernels.triton.calls, imported now: it needs Triton."""
    return importlib.import_module("evenbits.kernels.triton.calls")
