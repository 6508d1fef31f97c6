"""What the tensors of an operation must be, asked once for every backend: shape, type, device, sums that fit int32.

The C kernels read memory by address: a bias that is too short would be read beyond its end. Asked at every call of a
layer, so written to cost a few microseconds. M: rows, K: columns, N, O: outputs, G: groups.
"""

from __future__ import annotations

import torch

from evenbits.errors import EvenbitsError
from evenbits.kernels.matmul import check_columns
from evenbits.numerics.format import Format

_FLOAT32, _INT32 = (torch.float32,), (torch.int32,)
_SHORT = (torch.float32, torch.float16, torch.bfloat16)
_FLOATS = (*_SHORT, torch.float64)
_STORED = (torch.float32, torch.float16, torch.float8_e4m3fn, torch.uint8)
_Maybe = torch.Tensor | None


def check_rows(x: torch.Tensor, multiplier: _Maybe, scale: _Maybe, zero_point: _Maybe) -> None:
    """Raises EvenbitsError unless x [..., K] is floating-point with a multiplier [K], a float32 scale and an int32 zero
    point of one number (or one a row) on its device."""
    if x.ndim < 1 or not x.is_floating_point():
        raise EvenbitsError(f"activations are floating-point, [..., K]; given {x.dtype} {list(x.shape)}.")
    if multiplier is not None:
        _vector("multiplier", multiplier, x.shape[-1], _FLOATS, x.device)
    if scale is not None:
        _numbers("scale", scale, _per_row(x, scale), _FLOAT32, x.device)
    if zero_point is not None:
        _numbers("zero_point", zero_point, _per_row(x, zero_point), _INT32, x.device)


def check_int8(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, fmt: Format) -> None:
    """Raises EvenbitsError unless an int8 weight [O, K] and its scales, [O] or [1], fit x [..., K]."""
    if weight.dtype != torch.int8 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise EvenbitsError(
            f"int8_matmul takes int8 [M, K] and int8 [N, K]; given activations of {x.shape[-1]} columns and "
            f"{weight.dtype} {list(weight.shape)}."
        )
    _place("weight", weight, x.device)
    outputs = len(weight)
    _numbers("weight_scale", weight_scale, 1 if weight_scale.numel() == 1 else outputs, _SHORT, x.device)
    check_sums(x.shape[-1], fmt)


def check_packed(x: torch.Tensor, weight_OB: torch.Tensor, fmt: Format, row_bytes: int) -> None:
    """Raises EvenbitsError unless a packed weight is uint8 [O, B], B the bytes that x's columns take in its format."""
    if weight_OB.dtype != torch.uint8 or weight_OB.ndim != 2 or weight_OB.shape[1] != row_bytes:
        raise EvenbitsError(
            f"{x.shape[-1]} columns of {fmt} take uint8 rows of {row_bytes} bytes; given {weight_OB.dtype} "
            f"{list(weight_OB.shape)}."
        )


def check_stored(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, global_scale: _Maybe, group: int
) -> None:
    """Raises EvenbitsError unless packed rows have their scales, [O, G] with groups of `group` columns, else [O] or
    [1], and what they are relative to, float32 [1]."""
    _place("weight", weight, x.device)
    groups = -(-x.shape[-1] // group) if group else 1
    one = weight_scale.numel() == 1 and not group
    _numbers("weight_scale", weight_scale, 1 if one else len(weight) * groups, _STORED, x.device)
    if global_scale is not None:
        if weight_scale.dtype == torch.uint8:
            raise EvenbitsError("scales that are powers of two (uint8) have no global_scale; given one.")
        _numbers("global_scale", global_scale, 1, _FLOAT32, x.device)


def check_outputs(x: torch.Tensor, outputs: int, bias: _Maybe, weight_sum: _Maybe = None) -> None:
    """Raises EvenbitsError unless a bias is floating-point [O] and row sums are int32 [O]."""
    if bias is not None:
        _vector("bias", bias, outputs, _FLOATS, x.device)
    if weight_sum is not None:
        _vector("weight_sum", weight_sum, outputs, _INT32, x.device)


def check_sums(columns: int, fmt: Format, *, wide: bool = False) -> None:
    """Raises EvenbitsError if sums over K columns may not fit int32: affine codes less their zero point reach 255, wide
    weights twice int8."""
    check_columns(columns * (1 if fmt.rule.symmetric else 2) * (2 if wide else 1))


def check_device(x: torch.Tensor, *others: object) -> None:
    """Raises EvenbitsError unless all tensors are where x is."""
    for other in others:
        if isinstance(other, torch.Tensor) and other.device != x.device:
            _place("an argument", other, x.device)


def _per_row(x: torch.Tensor, given: torch.Tensor) -> int:
    return 1 if given.numel() == 1 else x.numel() // max(x.shape[-1], 1)


def _vector(name: str, x: torch.Tensor, numbers: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if x.ndim != 1:
        raise _refused(name, x, numbers, dtypes)
    _numbers(name, x, numbers, dtypes, device)


def _numbers(name: str, x: torch.Tensor, numbers: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if x.numel() != numbers or x.dtype not in dtypes:
        raise _refused(name, x, numbers, dtypes)
    _place(name, x, device)


def _place(name: str, x: torch.Tensor, device: torch.device) -> None:
    if x.device != device:
        raise EvenbitsError(f"{name} lies on {x.device}, the activations on {device}: move the layer or its input.")


def _refused(name: str, x: torch.Tensor, numbers: int, dtypes: tuple[torch.dtype, ...]) -> EvenbitsError:
    types = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return EvenbitsError(f"{name} is {numbers} numbers of {types}; given {x.dtype} {list(x.shape)}.")
