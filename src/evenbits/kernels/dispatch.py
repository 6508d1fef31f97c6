"""Which backend computes integer products, and why. Chosen once per device type; never silently a slow one.

c             the library's own kernels (cpu/): everything of a linear layer in one call
triton        the library's own kernels for GPUs (triton/): quantization and product in a launch each
torch_int_mm  torch's int8 product, where it is exact; the steps around it by torch operations
torch_fp32    exact float32 products of the codes: right anywhere, no faster than float
reference     the oracle of the tests
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch

from evenbits.errors import EvenbitsError, unknown_name
from evenbits.kernels import reference, torch_int8
from evenbits.kernels.cpu import calls, loader
from evenbits.kernels.fused import E4M3Kernels, Kernels
from evenbits.kernels.triton import loader as triton

_log = logging.getLogger("evenbits.kernels")

Matmul = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

BACKENDS: dict[str, Matmul] = {
    "c": calls.int8_matmul,
    "triton": lambda a, b: triton.calls().int8_matmul(a, b),
    "torch_int_mm": torch_int8.int_mm,
    "torch_fp32": torch_int8.fp32,
    "reference": reference.int8_matmul,
}
_C = cast(Kernels, calls)
_forced: list[str] = []


@dataclass(frozen=True)
class Choice:
    """The backend of one device type and the reason it was chosen."""

    device: str
    backend: str
    reason: str


@cache
def _choose(device: str) -> Choice:
    if device == "cuda":
        return _cuda()
    if device != "cpu":
        return _slow(device, f"torch has no integer matrix product on {device}")
    missing = loader.status()
    if missing.library is not None:
        return Choice(device, "c", "evenbits' own kernels")
    if not torch.cpu._is_vnni_supported():
        return _slow(device, f"this CPU has no VNNI, where torch._int_mm saturates silently, and {missing.reason}")
    _log.warning("%s: torch's own operations run, with the same results, slower.", missing.reason)
    return Choice(
        device, "torch_int_mm", f"{missing.reason}; torch._int_mm instead, exact on this CPU (it has VNNI), slower"
    )


def _cuda() -> Choice:
    found = triton.status("cuda")
    if found.usable:
        return Choice("cuda", "triton", found.reason)
    _log.warning("%s: torch's own operations run, with the same results, slower.", found.reason)
    return Choice("cuda", "torch_int_mm", f"{found.reason}; torch._int_mm on tensor cores, the rest step by step")


def _slow(device: str, reason: str) -> Choice:
    _log.warning("%s: products of int8 codes run in exact float32: same results, no speed-up.", reason)
    return Choice(device, "torch_fp32", f"{reason}; exact float32 products: same results, no speed-up")


def choice(device: str) -> Choice:
    """The backend that serves `device` ("cpu", "cuda", …) now. Raises EvenbitsError for a CPU library of other sources
    than those beside it."""
    chosen = Choice(device, _forced[-1], "forced by use_backend") if _is_forced(device) else _choose(device)
    if chosen.backend == "triton":
        return Choice(device, "triton", f"{chosen.reason}; {triton.note()}; {triton.e4m3_status(device).reason}")
    return Choice(device, "c", f"{chosen.reason}, {_variant()}") if chosen.backend == "c" else chosen


def backend(device: str) -> str:
    """The name alone: what every call asks."""
    return _forced[-1] if _is_forced(device) else _choose(device).backend


def _is_forced(device: str) -> bool:
    """Whether `use_backend` names a backend that this device has."""
    if not _forced:
        return False
    return device == "cpu" if _forced[-1] == "c" else _forced[-1] != "triton" or triton.status(device).usable


def fused(device: str) -> Kernels | None:
    """The kernels that do a whole linear layer on `device` now, or None if torch does it step by step."""
    name = backend(device)
    if name == "c":
        return _C
    return cast(Kernels, triton.calls()) if name == "triton" else None


def e4m3(device: str) -> E4M3Kernels | None:
    """The kernels that multiply E4M3 activations on `device` now, or None if torch does it step by step. Raises
    EvenbitsError for a GPU without such products: step by step they gain nothing there."""
    if backend(device) != "triton":
        return None
    found = triton.e4m3_status(device)
    if not found.usable:
        raise EvenbitsError(f"{found.reason}. On this GPU use activations in int8:row (linear_pair) or float.")
    return cast(E4M3Kernels, triton.calls())


def has_e4m3(device: str) -> bool:
    """Whether the kernels of `device` multiply E4M3 activations now."""
    return backend(device) == "triton" and triton.e4m3_status(device).usable


def _variant() -> str:
    library = loader.status().library
    one = "" if library is None or library.threads else "; one thread: torch's OpenMP pool was not found"
    return f"variant {loader.variant()}{one}"


def matmul(device: str) -> Matmul:
    """The integer product of `device`."""
    return BACKENDS[backend(device)]


def report() -> list[Choice]:
    """One line for every device type at hand."""
    return [choice(device) for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend inside a `with` block ("c": on the CPU only; "triton": on GPUs, and on a CPU where its
    interpreter is on). Raises EvenbitsError for an unknown name, and for "c" and "triton" where they cannot run."""
    if name not in BACKENDS:
        raise unknown_name("kernel backend", name, BACKENDS)
    if name == "c" and loader.status().library is None:
        raise EvenbitsError(f"the backend 'c' is not there: {loader.status().reason}.")
    reasons = [triton.status(device) for device in ("cuda", "cpu")] if name == "triton" else []
    if reasons and not (reasons[0].usable and torch.cuda.is_available()) and not reasons[1].usable:
        raise EvenbitsError(f"the backend 'triton' is not there: {reasons[reasons[0].usable].reason}.")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
