"""`QTensor`: packed codes + scale (+ zero point) + format. What a quantized tensor is, in memory and on disk.

No tensor subclass: a frozen record that knows how to decode itself and what it truly costs.
R: rows, K: columns, G: groups, B: bytes per packed row (see numerics/granularity.py for the matrix view).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch

from evenbits.errors import EvenbitsError
from evenbits.numerics.affine import from_codes, qparams, to_codes
from evenbits.numerics.format import Format
from evenbits.numerics.packing import pack, packed_width, unpack
from evenbits.numerics.ranges import find_range

_ENCODABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized tensor.

    packed:     uint8 [R, B], the codes of the matrix view (numerics/packing.py).
    scale:      float32 [1], [R, 1] or [R, G].
    zero_point: None, or like scale: int8/uint8 if zero is exact, int32 if the format is `free`.
    format:     how to read it. shape, dtype: of the tensor that was encoded.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype = field(default=torch.float32)

    def __post_init__(self) -> None:
        granularity = self.format.granularity
        rows, columns = granularity.matrix_shape(self.shape)
        expected = (rows, packed_width(columns, self.format.dtype.bits))
        if tuple(self.packed.shape) != expected or self.packed.dtype != torch.uint8:
            raise EvenbitsError(
                f"codes of a {self.format} tensor of shape {list(self.shape)} must be uint8 {list(expected)}; given "
                f"{self.packed.dtype} {list(self.packed.shape)}."
            )
        scales = granularity.scale_shape(self.shape)
        if tuple(self.scale.shape) != scales:
            raise EvenbitsError(
                f"scales of a {self.format} tensor of shape {list(self.shape)} must have shape {list(scales)}; given "
                f"{list(self.scale.shape)}."
            )

    def codes(self) -> torch.Tensor:
        """The codes as integers: int8 or uint8 [R, K], the matrix view."""
        columns = self.format.granularity.matrix_shape(self.shape)[1]
        return unpack(self.packed, self.format.dtype.bits, columns, signed=self.format.dtype.signed)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decoded values, shape `self.shape`, in `dtype` (default: the type that was encoded)."""
        granularity, codes_RK = self.format.granularity, self.codes()
        zero_point = None if self.zero_point is None else self.zero_point.to(torch.int32)
        scale = granularity.spread(self.scale, codes_RK.shape[1])
        zero_point = None if zero_point is None else granularity.spread(zero_point, codes_RK.shape[1])
        values_RK, dtype = from_codes(codes_RK, scale, zero_point), dtype or self.dtype
        if dtype in (torch.float16, torch.bfloat16):  # half a step above the largest number must not become infinite
            values_RK.clamp_(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        return granularity.unmatrix(values_RK, self.shape).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points together."""
        return sum(t.nbytes for t in (self.packed, self.scale, self.zero_point) if t is not None)

    @property
    def bits_per_element(self) -> float:
        """True bits: everything that must be stored, divided by the number of elements."""
        return 8 * self.nbytes / prod(self.shape)


def encode(x: torch.Tensor, fmt: str | Format) -> QTensor:
    """Quantizes `x` (any shape with at least one element; float16, bfloat16, float32 or float64) to a number format.

    `fmt`: a Format or its spelling, such as "int8:row", "int4:g128", "uint8:tensor:affine". Computed in float32
    (float64 for float64 input). Raises EvenbitsError for a non-float, empty or non-finite tensor and for an unknown
    format.
    """
    fmt = Format.parse(fmt)
    _check_encodable(x)
    shape = tuple(x.shape)
    fmt = fmt.fitted(shape)
    x_RK = fmt.granularity.matrix(x.detach())
    x_RK = x_RK if x_RK.dtype == torch.float64 else x_RK.float()
    scale, zero_point = _scales(x_RK, fmt)
    columns = x_RK.shape[1]
    spread_zero = None if zero_point is None else fmt.granularity.spread(zero_point, columns)
    codes_RK = to_codes(x_RK, fmt.granularity.spread(scale, columns), spread_zero, fmt)
    if zero_point is not None and fmt.rule.zero_exact:
        zero_point = zero_point.to(fmt.dtype.storage)
    return QTensor(pack(codes_RK, fmt.dtype.bits), scale, zero_point, fmt, shape, x.dtype)


def _scales(x_RK: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor | None]:
    parts = [qparams(*find_range(block, fmt), fmt) for block in fmt.granularity.blocks(x_RK)]
    scale = torch.cat([part[0] for part in parts], dim=1)
    zeros = [part[1] for part in parts if part[1] is not None]
    zero_point = torch.cat(zeros, dim=1) if zeros else None
    if fmt.granularity.kind == "tensor":
        return scale.reshape(1), None if zero_point is None else zero_point.reshape(1)
    return scale, zero_point


def _check_encodable(x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in _ENCODABLE:
        given = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise EvenbitsError(
            f"only float16, bfloat16, float32 and float64 tensors can be encoded; given {given}. Convert it with "
            ".float() first."
        )
    if x.numel() == 0:
        raise EvenbitsError(f"a tensor without elements cannot be encoded; given shape {list(x.shape)}.")
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise EvenbitsError(f"{bad} of {x.numel()} values are NaN or infinite; mend the tensor before quantizing it.")
    if x.dtype == torch.float64 and float(x.abs().max()) > torch.finfo(torch.float32).max:
        raise EvenbitsError(f"scales are float32, which cannot hold {float(x.abs().max()):g}; scale the tensor down.")
