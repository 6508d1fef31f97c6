"""Finds the CPU library, checks that it is the one of these sources, and chooses a variant.

The library is plain C behind ctypes. torch is imported first (this module needs it), so that its OpenMP pool is there
when the library looks for it. A library that does not load leaves torch's own operations, and `status` says why; one
that was built from other sources than those beside it is an error: silently running old code is worse than stopping.

EVENBITS_CPU_LIBRARY names another library than the one beside this file. EVENBITS_CPU_VARIANT, or `use_variant`,
forces a variant: amx, avx512vnni, avxvnni, avx2, neon or portable.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (its OpenMP library must be loaded before ours)

from evenbits.errors import EvenbitsError, unknown_name
from evenbits.kernels.cpu import build

VARIABLE = "EVENBITS_CPU_VARIANT"
_REBUILD = "run `make kernels` in the checkout, or reinstall evenbits with a C compiler (cc, gcc or clang) on the path"

_POINTERS = (
    "x multiplier scale zero_point weight weight_scale global_scale bias weight_sum y codes row_scales row_zeros "
    "values tables"
)
_INTEGERS = (
    "rows columns outputs x_type y_type x_stride weight_kind weight_stride scale_type scale_stride group affine "
    "code_min code_max activation threads finite"
)


class LinearArgs(ctypes.Structure):
    """The arguments of a call, in the order of eb_args in evenbits_cpu.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_int64) for name in _INTEGERS.split()),
        ("levels", ctypes.c_double),
        ("unit", ctypes.c_double),
    )


@dataclass(frozen=True)
class Library:
    """A loaded library: its variants that this processor supports (name → index, best first), the one that runs unless
    another is forced, and whether it finds a thread pool."""

    handle: ctypes.CDLL
    variants: dict[str, int]
    preferred: str
    threads: bool


@dataclass(frozen=True)
class Status:
    """Whether the library can be used, and why (not)."""

    library: Library | None
    reason: str


_forced: list[str] = []


def path() -> Path:
    """Where the library is looked for."""
    return Path(os.environ.get("EVENBITS_CPU_LIBRARY") or build.HERE / build.library_name())


@cache
def status() -> Status:
    """Loads the library once. Raises EvenbitsError if it was built from other sources than those beside it, or if the
    environment names a variant that this processor does not run."""
    file = path()
    if not file.exists():
        return Status(None, f"the CPU library was not built ({_REBUILD})")
    try:
        handle = ctypes.CDLL(str(file))
        handle.evenbits_source_hash.restype = handle.evenbits_variant_name.restype = ctypes.c_char_p
        built_from, size = handle.evenbits_source_hash().decode(), handle.evenbits_args_bytes()
    except (OSError, AttributeError) as error:
        return Status(None, f"the CPU library does not load: {error} ({_REBUILD})")
    if (build.SOURCES.exists() and built_from != build.source_hash()) or size != ctypes.sizeof(LinearArgs):
        raise EvenbitsError(f"{file} was built from other sources than those beside it; {_REBUILD}.")
    handle.evenbits_variant_name.argtypes = handle.evenbits_variant_supported.argtypes = [ctypes.c_int64]
    for function in (handle.evenbits_linear, handle.evenbits_linear_float, handle.evenbits_quantize):
        function.argtypes = [ctypes.c_int64, ctypes.POINTER(LinearArgs)]
    names = {handle.evenbits_variant_name(i).decode(): i for i in range(handle.evenbits_variants())}
    variants = {name: i for name, i in names.items() if handle.evenbits_variant_supported(i)}
    preferred = os.environ.get(VARIABLE) or next(iter(variants))
    _known(preferred, variants)
    return Status(Library(handle, variants, preferred, bool(handle.evenbits_has_threads())), "loaded")


def variant() -> str:
    """The variant that runs: the forced one, else that of the environment, else the best. The library must be there."""
    library = status().library
    assert library is not None
    return _forced[-1] if _forced else library.preferred


def _known(name: str, variants: dict[str, int]) -> None:
    if name not in variants:
        raise unknown_name("CPU kernel variant (of those this processor runs)", name, variants)


@contextmanager
def use_variant(name: str) -> Iterator[None]:
    """Forces a variant inside a `with` block. Raises EvenbitsError if this processor does not run it, or without the
    library."""
    library = status().library
    if library is None:
        raise EvenbitsError(f"there are no CPU kernel variants: {status().reason}.")
    _known(name, library.variants)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
