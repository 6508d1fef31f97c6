"""`QTensor`: packed codes + scale (+ zero point) + format. What a quantized tensor is, in memory and on disk.

No tensor subclass: a frozen record that knows how to decode itself and what it truly costs.
R: rows, K: columns, G: groups, B: bytes per packed row (see numerics/granularity.py for the matrix view).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from evenbits.errors import EvenbitsError
from evenbits.numerics import elements, scales
from evenbits.numerics.affine import from_codes
from evenbits.numerics.elements import PairType
from evenbits.numerics.format import Format
from evenbits.numerics.packing import unpack, unpack_bits

_SCALE_TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.uint8,
}


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized tensor.

    packed:       uint8 [R, B], the codes of the matrix view (numerics/packing.py, docs/ovp-format.md for pairs).
    scale:        [1], [R, 1] or [R, G], stored as the format says (numerics/scales.py).
    zero_point:   None, or like scale: int8/uint8 if zero is exact, int32 if the format is `free`.
    format:       how to read it. shape, dtype: of the tensor that was encoded.
    global_scale: float32 [1], the factor that stored scales are relative to, or None.
    kinds:        uint8 [R, ⌈G/8⌉], one bit per group (1: flint), of `ovp4-mix` formats; else None.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    global_scale: torch.Tensor | None = None
    kinds: torch.Tensor | None = None

    def __post_init__(self) -> None:
        fmt, name = self.format, f"a {self.format} tensor of shape {list(self.shape)}"
        rows, _ = fmt.granularity.matrix_shape(self.shape)
        _expect("codes", name, self.packed, torch.uint8, (rows, elements.row_bytes(fmt.dtype, self.stored_columns)))
        scale_shape = fmt.granularity.scale_shape(self.shape)
        _expect("scales", name, self.scale, _SCALE_TYPES[fmt.storage], scale_shape)
        if fmt.rule.symmetric != (self.zero_point is None):
            raise EvenbitsError(f"{name} has {'no' if fmt.rule.symmetric else 'a'} zero point for each scale.")
        if self.zero_point is not None:
            stored = fmt.integer.storage if fmt.rule.zero_exact else torch.int32
            _expect("zero points", name, self.zero_point, stored, scale_shape)
        if self.global_scale is not None:
            _expect("the factor", name, self.global_scale, torch.float32, (1,))
        mixed = isinstance(fmt.dtype, PairType) and fmt.dtype.kind == "mix"
        if mixed != (self.kinds is not None):
            raise EvenbitsError(f"{name} has {'one bit per group' if mixed else 'no bits'} that say the kind of pairs.")
        if self.kinds is not None:
            _expect("kinds", name, self.kinds, torch.uint8, (rows, -(-scale_shape[1] // 8)))

    @staticmethod
    def empty(fmt: Format, shape: tuple[int, ...], *, global_scale: bool) -> QTensor:
        """A tensor of the right shapes without contents, on the current default device (such as meta), for loading."""
        rows, columns = fmt.granularity.matrix_shape(shape)
        scale_shape = fmt.granularity.scale_shape(shape)
        zero = None
        if not fmt.rule.symmetric:
            zero = torch.empty(scale_shape, dtype=fmt.integer.storage if fmt.rule.zero_exact else torch.int32)
        mixed = isinstance(fmt.dtype, PairType) and fmt.dtype.kind == "mix"
        return QTensor(
            packed=torch.empty(rows, elements.row_bytes(fmt.dtype, fmt.stored_columns(columns)), dtype=torch.uint8),
            scale=torch.empty(scale_shape, dtype=_SCALE_TYPES[fmt.storage]),
            zero_point=zero,
            format=fmt,
            shape=shape,
            global_scale=torch.empty(1, dtype=torch.float32) if global_scale else None,
            kinds=torch.empty(rows, -(-scale_shape[1] // 8), dtype=torch.uint8) if mixed else None,
        )

    @property
    def stored_columns(self) -> int:
        """Columns of a row as stored (padded for pairs and fixed blocks)."""
        return self.format.stored_columns(self.format.granularity.matrix_shape(self.shape)[1])

    @property
    def note(self) -> str:
        """What to know about how it is stored: "33 columns stored as 34" where rows are padded with zeros, else ""."""
        return self.format.padding(self.format.granularity.matrix_shape(self.shape)[1])

    def codes(self) -> torch.Tensor:
        """The codes of an integer format: int8 or uint8 [R, K], the matrix view. Raises EvenbitsError for others."""
        columns = self.format.granularity.matrix_shape(self.shape)[1]
        return unpack(self.packed, self.format.dtype.bits, columns, signed=self.format.integer.signed)

    def values(self) -> torch.Tensor:
        """The numbers before scaling: float32 [R, K], the matrix view (integers: codes, zero point not subtracted)."""
        columns = self.format.granularity.matrix_shape(self.shape)[1]
        element = self.format.dtype
        if self.kinds is None:
            return elements.unpack_values(self.packed, element, self.stored_columns)[:, :columns]
        assert isinstance(element, PairType)
        plain, flint = (
            elements.unpack_values(self.packed, element.with_kind(kind), self.stored_columns)
            for kind in element.choices
        )
        bits = unpack_bits(self.kinds)[:, : self.scale.shape[1]]
        is_flint = self.format.granularity.spread(bits, self.stored_columns)
        return torch.where(is_flint, flint, plain)[:, :columns]

    def scales(self) -> torch.Tensor:
        """The scales as float32, in the shape they are stored in."""
        return scales.real(self.scale, self.global_scale)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decoded values, shape `self.shape`, in `dtype` (default: the type that was encoded)."""
        granularity, columns = self.format.granularity, self.format.granularity.matrix_shape(self.shape)[1]
        scale = granularity.spread(self.scales(), columns)
        if self.zero_point is None:
            values_RK = from_codes(self.values(), scale, None)
        else:
            zero_point = granularity.spread(self.zero_point.to(torch.int32), columns)
            values_RK = from_codes(self.codes(), scale, zero_point)
        dtype = dtype or self.dtype
        if dtype in (torch.float16, torch.bfloat16):  # half a step above the largest number must not become infinite
            values_RK.clamp_(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        return granularity.unmatrix(values_RK, self.shape).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and whatever else must be stored."""
        parts = (self.packed, self.scale, self.zero_point, self.global_scale, self.kinds)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def bits_per_element(self) -> float:
        """True bits: everything that must be stored, divided by the number of elements."""
        return 8 * self.nbytes / prod(self.shape)


def _expect(what: str, name: str, given: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if given.dtype != dtype or tuple(given.shape) != shape:
        raise EvenbitsError(f"{what} of {name} must be {dtype} {list(shape)}; given {given.dtype} {list(given.shape)}.")
