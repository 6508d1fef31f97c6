"""Number formats at one budget of true bits: which granularity of a candidate fits a layer.

Formats are comparable only if they cost the same, with everything counted that must be stored: codes, scales, factors,
padding, for the layer's own width. A candidate is a format (`ovp4:row`) or a family with its granularity left open
(`nf4:g*:mse`); of a family the groups are taken whose bits come nearest to the budget without passing it, and of two
that cost the same the smaller ones. For rows of 384 and a budget of 4.25 bits:

    int4:g*:mse   int4:g64:mse   4.25 bits (a float16 scale for 64)
    nf4:g*:mse    nf4:g32:mse    4.25 bits (an E4M3 scale for 32)
    ovp4:row      ovp4:row       4.04 bits

A budget may be passed by TOLERANCE: the one float32 factor of E4M3 scales is such a trifle in all but tiny layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from evenbits.errors import EvenbitsError
from evenbits.nn.base import check_formats
from evenbits.numerics.elements import PairType, TypeChoice
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor

TOLERANCE = 0.01  # bits per weight
_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_OPEN = "g*"
_GROUPED = ("int4:g*:mse", "int4:g*:7.5:mse", "flint4:g*", "nf4:g*:mse", "ovp4:g*")
_BY_ROWS = ("ovp4:row",)
_INTEGER = ("int4:row:7.5:mse", "ovp4-i8:row")  # which int8 inputs multiply in integers


@dataclass(frozen=True)
class Fit:
    """A candidate on one layer. format is None if it does not fit, and reason says why; bits are true ones."""

    candidate: str
    format: Format | None
    bits: float
    reason: str = ""


def candidates_for(given: Iterable[str] | None, activation: Format | None) -> tuple[str, ...]:
    """The candidates to compare, checked. By default int4 (both conventions), flint4, NF4 and pairs in groups, and
    pairs per row; with int8 inputs, int4 and pairs per row whose products run in integers.

    Raises EvenbitsError for one that is no format, is named twice, or that no layer can have.
    """
    if given is None:
        integers = activation is not None and activation.dtype.name == "int8"
        return (*_GROUPED, *(_INTEGER if integers else _BY_ROWS))
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise EvenbitsError(f"candidates must be a list of formats, such as 'int4:g*:mse'; given {given!r}.")
    names = tuple(given)
    if not names:
        raise EvenbitsError("there is no candidate to advise; name formats, such as 'int4:g*:mse' and 'ovp4:g*'.")
    for name in names:
        if not isinstance(name, str):
            raise EvenbitsError(f"a candidate is spelled as a format, such as 'int4:g*:mse'; given {name!r}.")
        if names.count(name) > 1:
            raise EvenbitsError(f"the candidate {name!r} is named twice.")
        for fmt in _openings(name, _SIZES[-1] + 1):
            check_formats(fmt, activation)
    return names


def true_bits(fmt: Format, shape: tuple[int, int]) -> float:
    """Bits per weight of a matrix [O, K] in `fmt`, everything counted; of a choice those of its dearest member."""
    return max(_bits(member, shape) for member in _members(fmt))


def fit(candidate: str, shape: tuple[int, int], budget: float) -> Fit:
    """The format a candidate stands for on a weight [O, K] within `budget` true bits per weight."""
    offers = [(true_bits(fmt, shape), fmt) for fmt in _openings(candidate, shape[1])]
    within = [offer for offer in offers if offer[0] <= budget + TOLERANCE]
    if not within:
        least = min(bits for bits, _ in offers)
        return Fit(candidate, None, least, f"takes {least:.3f} bits or more on rows of {shape[1]}")
    # Groups come in ascending size: of equal bits the first is the finest.
    bits, fmt = max(within, key=lambda offer: offer[0])
    return Fit(candidate, fmt, bits)


def _openings(candidate: str, columns: int) -> list[Format]:
    """The formats a candidate may stand for on rows of `columns`: groups that are narrower, then one scale per row."""
    if _OPEN not in candidate.split(":"):
        return [Format.parse(candidate)]
    found = [Format.parse(candidate.replace(_OPEN, f"g{size}")) for size in _SIZES if size <= columns]
    whole = Format.parse(candidate.replace(_OPEN, f"g{columns + columns % 2}"))
    mixed = isinstance(whole.dtype, PairType) and whole.dtype.kind == "mix"  # whose kinds are the groups'
    row = whole if mixed else Format.parse(candidate.replace(_OPEN, "row"))
    # A group as wide as the row is worth naming only where its scale is stored in fewer bits than the row's.
    return [*(f for f in found if f.granularity.size < columns or f.storage != row.storage), row]


def _members(fmt: Format) -> list[Format]:
    if isinstance(fmt.dtype, TypeChoice):
        return [replace(fmt, dtype=member) for member in fmt.dtype.choices]
    if isinstance(fmt.dtype, PairType) and fmt.dtype.is_choice:
        return [replace(fmt, dtype=fmt.dtype.with_kind(kind)) for kind in fmt.dtype.choices]
    return [fmt]


def _bits(fmt: Format, shape: tuple[int, int]) -> float:
    fitted = fmt.fitted(shape)
    with torch.device("meta"):
        return QTensor.empty(fitted, shape, global_scale=fitted.storage == "e4m3").bits_per_element
