"""Which backend computes integer products, and why. Chosen once per device type; never silently a slow one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from evenbits.errors import unknown_name
from evenbits.kernels import reference, torch_int8

_log = logging.getLogger("evenbits.kernels")

Matmul = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

BACKENDS: dict[str, Matmul] = {
    "torch_int_mm": torch_int8.int_mm,
    "torch_fp32": torch_int8.fp32,
    "reference": reference.int8_matmul,
}
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
        return Choice(device, "torch_int_mm", "torch._int_mm on tensor cores")
    if device == "cpu" and torch.cpu._is_vnni_supported():
        return Choice(device, "torch_int_mm", "torch._int_mm, exact on this CPU (it has VNNI)")
    reason = (
        "this CPU has no VNNI, where torch._int_mm saturates silently"
        if device == "cpu"
        else f"torch has no integer matrix product on {device}"
    )
    _log.warning("%s: products of int8 codes run in exact float32: same results, no speed-up.", reason)
    return Choice(device, "torch_fp32", f"{reason}; exact float32 products: same results, no speed-up")


def choice(device: str) -> Choice:
    """The backend that serves `device` ("cpu", "cuda", …) now."""
    return Choice(device, _forced[-1], "forced by use_backend") if _forced else _choose(device)


def matmul(device: str) -> Matmul:
    """The integer product of `device`."""
    return BACKENDS[choice(device).backend]


def report() -> list[Choice]:
    """One line for every device type at hand."""
    return [choice(device) for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend inside a `with` block. Raises EvenbitsError for an unknown name."""
    if name not in BACKENDS:
        raise unknown_name("kernel backend", name, BACKENDS)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
