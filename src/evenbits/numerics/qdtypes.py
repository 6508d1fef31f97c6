"""Integer data types of 2 to 8 bits: what a code may be.

A `QDtype` is a tiny value object. It knows its range and nothing about scales; the names are `int2` … `int8` (signed,
two's complement) and `uint2` … `uint8`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from evenbits.errors import unknown_name

_SPELLING = re.compile(r"(u?)int([2-8])")


@dataclass(frozen=True)
class QDtype:
    """An integer type: `bits` (2..8) and whether codes are signed."""

    bits: int
    signed: bool

    @property
    def name(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def storage(self) -> torch.dtype:
        """The torch type that holds one unpacked code."""
        return torch.int8 if self.signed else torch.uint8

    @staticmethod
    def parse(name: str) -> QDtype:
        """`"int4"` → QDtype(4, signed). Raises EvenbitsError for any other word, naming the nearest."""
        match = _SPELLING.fullmatch(name)
        if match is None:
            raise unknown_name("data type", name, [f"{u}int{b}" for u in ("", "u") for b in range(2, 9)])
        return QDtype(bits=int(match[2]), signed=not match[1])
