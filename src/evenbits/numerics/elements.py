"""Element types: what a number may be, behind one small interface.

An element type is an integer type (QDtype), a table (Codebook) or an alphabet of pairs (PairType). Symmetric formats of
every
type work the same way: u = x / scale is snapped to a value of the type, values are packed to bytes, bytes unpack to
values.
R: rows, K: columns, G: groups, g: group size, B: bytes per row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

import torch

from evenbits.errors import EvenbitsError, unknown_name
from evenbits.numerics import ovp
from evenbits.numerics.codebook import Codebook
from evenbits.numerics.packing import pack, packed_width, unpack
from evenbits.numerics.qdtypes import QDtype

_PAIRS = re.compile(r"ovp([48])(?:-(int|flint|flint_i8|i8|mix))?")
_TABLE = re.compile(r"u?(flint|pot|nf|fp|abfloat)\d.*")


@dataclass(frozen=True)
class PairType:
    """Outlier-victim pairs (numerics/ovp.py). kind: "int", "flint", "flint_i8", "int8"; "mix" has one bit per group
    that chooses between int and flint; "auto" is resolved to int or flint when a tensor is encoded."""

    bits: int
    kind: str

    @property
    def name(self) -> str:
        return f"ovp{self.bits}" if self.kind in ("auto", "int8") else f"ovp{self.bits}-{self.kind}"

    @property
    def signed(self) -> bool:
        return True

    @property
    def choices(self) -> tuple[str, ...]:
        """The pair kinds a tensor (auto) or a group (mix) may have."""
        if self.kind == "i8":
            return ("int", "flint_i8")
        return ("int", "flint") if self.kind in ("auto", "mix") else (self.kind,)

    @property
    def is_choice(self) -> bool:
        """Whether one kind is chosen for the whole tensor when it is encoded."""
        return self.kind in ("auto", "i8")

    def with_kind(self, kind: str) -> PairType:
        return PairType(self.bits, kind)


@dataclass(frozen=True)
class TypeChoice:
    """ANT: int, power-of-two or flint of `bits`, whichever errs least; resolved when a tensor is encoded."""

    bits: int

    @property
    def name(self) -> str:
        return f"ant{self.bits}"

    @property
    def signed(self) -> bool:
        return True

    @property
    def choices(self) -> tuple[ElementType, ...]:
        return (QDtype(self.bits, True), Codebook.parse(f"pot{self.bits}"), Codebook.parse(f"flint{self.bits}"))


ElementType: TypeAlias = "QDtype | Codebook | PairType | TypeChoice"


def parse_element(name: str) -> ElementType:
    """`"int4"`, `"flint4"`, `"nf4"`, `"ovp4"`, `"ovp4-flint_i8"`, `"ant4"`, or EvenbitsError with the nearest."""
    if match := _PAIRS.fullmatch(name):
        if match[1] == "8":
            if match[2] is not None:
                raise EvenbitsError(f"{name!r}: 8-bit pairs have one kind; spell it ovp8.")
            return PairType(8, "int8")
        return PairType(4, match[2] or "auto")
    if re.fullmatch(r"ant[3-8]", name):
        return TypeChoice(int(name[3:]))
    if _TABLE.fullmatch(name):
        return Codebook.parse(name)
    try:
        return QDtype.parse(name)
    except EvenbitsError as error:
        tables = ["flint4", "pot4", "fp4", "fp8", "fp8_e5m2", "nf4", "ant4"]
        pairs = ["ovp4", "ovp4-int", "ovp4-flint", "ovp4-flint_i8", "ovp4-i8", "ovp4-mix", "ovp8"]
        integers = [f"{u}int{b}" for u in ("", "u") for b in range(2, 9)]
        raise unknown_name("data type", name, [*integers, *tables, *pairs]) from error


def largest(element: ElementType) -> float:
    """The value that the top of a group's range is mapped to: of pairs, the largest normal one."""
    if isinstance(element, PairType):
        return ovp.pair_kind(element.kind).normal_max
    return element.largest if isinstance(element, Codebook) else float(element.qmax)  # type: ignore[union-attr]


def snap(
    u_RK: torch.Tensor,
    element: ElementType,
    policy: str = "optimal",
    importance_K: torch.Tensor | None = None,
    *,
    full_range: bool = False,
) -> torch.Tensor:
    """Scaled values [R, K] → the nearest values of the type, [R, K] (pairs: of the policy; integers: −128 too if
    full_range)."""
    if isinstance(element, PairType):
        return ovp.snap(u_RK, ovp.pair_kind(element.kind), policy, importance_K)
    if isinstance(element, Codebook):
        return element.decode(element.quantize(u_RK))
    assert isinstance(element, QDtype)
    low = element.qmin if full_range or not element.signed else -element.qmax
    return u_RK.round().clamp_(low, element.qmax)


def nearest(
    u_RK: torch.Tensor,
    element: ElementType,
    policy: str = "optimal",
    importance_K: torch.Tensor | None = None,
    *,
    full_range: bool = False,
) -> torch.Tensor:
    """Like `snap`, but free to break ties either way, which leaves the error as it is: for searching, fast."""
    if isinstance(element, Codebook):
        return element.nearest(u_RK)
    return snap(u_RK, element, policy, importance_K, full_range=full_range)


def pack_values(values_RK: torch.Tensor, element: ElementType) -> torch.Tensor:
    """Values of the type [R, K] → uint8 [R, B]."""
    if isinstance(element, PairType):
        return ovp.pack_pairs(values_RK, ovp.pair_kind(element.kind))
    if isinstance(element, Codebook):
        return pack(element.quantize(values_RK), element.bits)
    assert isinstance(element, QDtype)
    return pack(values_RK.to(element.storage), element.bits)


def unpack_values(packed_RB: torch.Tensor, element: ElementType, columns: int) -> torch.Tensor:
    """uint8 [R, B] → values float32 [R, columns]."""
    if isinstance(element, PairType):
        return ovp.unpack_pairs(packed_RB, ovp.pair_kind(element.kind))[:, :columns]
    if isinstance(element, Codebook):
        return element.decode(unpack(packed_RB, element.bits, columns, signed=False))
    assert isinstance(element, QDtype)
    return unpack(packed_RB, element.bits, columns, signed=element.signed).float()


def row_bytes(element: ElementType, columns: int) -> int:
    """Bytes of a packed row: pairs round an odd number of columns up to an even one."""
    if isinstance(element, PairType):
        return (columns + 1) // 2 * (element.bits // 4)
    return packed_width(columns, element.bits)


def fits_int8(element: ElementType) -> bool:
    """Whether every value of the type is an integer that int8 holds, so that an integer engine can multiply it."""
    if isinstance(element, QDtype):
        return element.qmax <= 127
    if isinstance(element, PairType):
        return element.kind in ("int", "flint_i8")
    if isinstance(element, Codebook):
        used = [value for value in element.values if value == value]  # not NaN
        return all(value == int(value) and abs(value) <= 127 for value in used)
    return False
