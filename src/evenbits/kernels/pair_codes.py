"""Which packed 4-bit weights can be multiplied from their bytes, and the tables that decode them.

A byte holds two weights. A nibble stands for a number of a 16-entry table; beside the identifier 1000b of an
outlier-victim pair, for one of a second table. Where all of these are integers (times a power of two, `unit`: FP4's are
multiples of one half) products with int8 activations are exact in int32. Values beyond int8 are split into two halves
that fit, multiplied one after the other. NormalFloat is not a multiple of anything: its products run in float.
Float activations need no integers: any table of sixteen numbers will do (`float_codes`); E4M3 ones any table whose
numbers E4M3 holds (`e4m3_codes`).

O: out, I: in, B: bytes of a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from evenbits.numerics import elements, ovp
from evenbits.numerics.codebook import Codebook
from evenbits.numerics.elements import ElementType, PairType
from evenbits.numerics.format import Format
from evenbits.numerics.qdtypes import QDtype

PAIR_KINDS = ("int", "flint", "flint_i8")
_WHOLE = 128  # columns that any kernel takes at a time
_UNITS = (1.0, 0.5, 0.25, 0.125)
_E4M3 = frozenset(value for value in Codebook.parse("fp8").values if value == value)


# Read now: while torch traces, no tensor can be read.
_PAIRS = {kind: [table.tolist() for table in ovp._code_values(ovp.pair_kind(kind))] for kind in PAIR_KINDS}


@dataclass(frozen=True)
class PairCodes:
    """How a format's bytes are multiplied.

    tables: 48 int8 numbers, in units: values of a nibble, of an outlier nibble, what an outlier has beyond int8.
    paired: whether the identifier has its meaning. wide: whether some values are beyond int8. group: columns that share
    a scale; 0: one scale a row or tensor. row_bytes: of a packed row.
    """

    tables: tuple[int, ...]
    paired: bool
    wide: bool
    unit: float
    group: int
    row_bytes: int


@dataclass(frozen=True)
class FloatCodes:
    """The same for float activations. values: 32 floats, of a nibble and of a nibble beside the identifier, with every
    scale still to be multiplied in; the rest as in PairCodes."""

    values: tuple[float, ...]
    paired: bool
    group: int
    row_bytes: int


@cache
def pair_codes(fmt: Format, columns: int) -> PairCodes | None:
    """The tables of a weight format for rows of `columns`, or None if its products cannot run in integers from packed
    bytes: values that are no integers, zero points, groups whose columns do not fill whole words of four bytes."""
    dtype, group = fmt.dtype, _group(fmt, columns)
    if fmt.granularity.kind == "axis" or group % 8 or not fmt.rule.symmetric:
        return None
    normal, outlier = _nibbles(dtype)
    for unit in _UNITS if normal else ():
        both = [value / unit for value in (*normal, *outlier)]
        near = both[:16] + [value / 2 if abs(value) > 127 else value for value in both[16:]]
        if all(value == int(value) and abs(value) <= 127 for value in near):
            rest = [value - half for value, half in zip(both, near, strict=True)]
            tables = tuple(int(value) for value in (*near, *rest[16:]))
            width = elements.row_bytes(dtype, fmt.stored_columns(columns))
            return PairCodes(tables, isinstance(dtype, PairType), any(rest), unit, group, width)
    return None


@cache
def float_codes(fmt: Format, columns: int) -> FloatCodes | str:
    """The tables of a weight format for rows of `columns` that float activations are multiplied with, or a phrase that
    says why its bytes cannot be."""
    dtype, group = fmt.dtype, _group(fmt, columns)
    normal, outlier = _nibbles(dtype)
    if not fmt.rule.symmetric:
        return "zero points"
    if not normal:
        mixed = isinstance(dtype, PairType) and dtype.kind == "mix"
        return "pairs whose kind changes from group to group" if mixed else f"{dtype.bits}-bit weights"
    if fmt.granularity.kind == "axis" or group % 8:
        return f"scales by {fmt.granularity}, not by rows or groups of 8·n columns"
    width = elements.row_bytes(dtype, fmt.stored_columns(columns))
    return FloatCodes((*normal, *outlier), isinstance(dtype, PairType), group, width)


@cache
def e4m3_codes(fmt: Format, columns: int) -> FloatCodes | str:
    """The tables of a weight format whose numbers are multiplied as E4M3, exact there, or a phrase that says why its
    bytes cannot be."""
    codes = float_codes(fmt, columns)
    if isinstance(codes, str) or _E4M3.issuperset(codes.values):
        return codes
    return "values that E4M3 does not hold"


def _group(fmt: Format, columns: int) -> int:
    """Columns that share a scale, 0: all of a row. One group that covers a row may have any width: it is rounded up."""
    group = fmt.granularity.size if fmt.granularity.kind == "group" else 0
    return -(-group // _WHOLE) * _WHOLE if group >= columns else group


def _nibbles(dtype: ElementType) -> tuple[list[float], list[float]]:
    """What the sixteen nibbles stand for by themselves, and beside the identifier; nothing for types of other kinds."""
    if isinstance(dtype, PairType) and dtype.kind in PAIR_KINDS:
        return _PAIRS[dtype.kind][0], _PAIRS[dtype.kind][1]
    if isinstance(dtype, QDtype) and dtype.bits == 4:
        return [float(code - 16 if code > dtype.qmax else code) for code in range(16)], [0.0] * 16
    if isinstance(dtype, Codebook) and dtype.bits == 4:
        return [0.0 if value != value else value for value in dtype.values], [0.0] * 16
    return [], []


def pair_values(packed_OB: torch.Tensor, fmt: Format, columns: int) -> torch.Tensor:
    """Packed rows → values in units, float32 [O, columns]: the numerics' own decoder, not the tables above."""
    codes = pair_codes(fmt, columns)
    assert codes is not None
    return elements.unpack_values(packed_OB, fmt.dtype, fmt.stored_columns(columns))[:, :columns] / codes.unit
