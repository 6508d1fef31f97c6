"""Calls of the CPU library: tensors → arguments. What the library does not take, a caller must not bring (`takes`).

M: rows, K: columns, N: outputs, B: bytes of a packed weight row, G: groups.
"""

from __future__ import annotations

from functools import cache

import torch

from evenbits.errors import EvenbitsError
from evenbits.kernels.cpu.loader import LinearArgs, status, variant
from evenbits.kernels.fused import Rows, Weight

_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_INT8, _INT32 = 3, 4
_SCALES = {torch.float32: 0, torch.float16: 1, torch.float8_e4m3fn: 2, torch.uint8: 3}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


def _run(function: str, args: LinearArgs) -> None:
    library = status().library
    assert library is not None
    if getattr(library.handle, function)(library.variants[variant()], args):
        raise EvenbitsError("there is not enough memory for the working buffers of a product.")


def _ptr(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


@cache
def _tables(values: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8)


@cache
def _values(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] → [M, K] of a type the library reads, columns beside each other."""
    x_MK = x.reshape(-1, x.shape[-1])
    x_MK = x_MK if x_MK.dtype in _FLOATS else x_MK.float()
    return x_MK if x_MK.stride(1) == 1 or x_MK.shape[1] == 1 else x_MK.contiguous()


def _args(x_MK: torch.Tensor, rows: Rows) -> LinearArgs:
    args = LinearArgs()
    args.x, args.rows, args.columns = x_MK.data_ptr(), x_MK.shape[0], x_MK.shape[1]
    args.x_type, args.x_stride = _FLOATS[x_MK.dtype], x_MK.stride(0)
    args.multiplier, args.scale, args.zero_point = map(_ptr, (rows.multiplier, rows.scale, rows.zero_point))
    args.code_min, args.code_max, args.levels = rows.code_min, rows.code_max, rows.levels
    args.affine, args.finite, args.threads = rows.affine, rows.finite, torch.get_num_threads()
    return args


def quantize(x: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., K] → (codes int8 [M, K], scale float32 [M, 1], zero point int32 [M, 1])."""
    x_MK = _rows(x)
    codes = torch.empty(x_MK.shape, dtype=torch.int8)
    scale, zero = torch.empty(len(x_MK), 1), torch.empty(len(x_MK), 1, dtype=torch.int32)
    args = _args(x_MK, rows)
    args.codes, args.row_scales, args.row_zeros = codes.data_ptr(), scale.data_ptr(), zero.data_ptr()
    _run("evenbits_quantize", args)
    return codes, scale, zero


def linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, rows: Rows, activation: str = "none"
) -> torch.Tensor:
    """x [..., K] float → y [..., N] in x's type (float64: float32): quantize, multiply, scale, add, activate in one go.

    bias: float32 [N], contiguous like everything but x.
    """
    x_MK, outputs = _rows(x), weight.bytes.shape[0]
    y = x_MK.new_empty(*x.shape[:-1], outputs)
    if not y.numel():
        return y
    args = _args(x_MK, rows)
    args.tables = _tables(weight.tables).data_ptr() if weight.tables else None
    _output_args(args, y, weight, bias, activation)
    _run("evenbits_linear", args)
    return y


def _output_args(args: LinearArgs, y: torch.Tensor, weight: Weight, bias: torch.Tensor | None, activation: str) -> None:
    outputs = weight.bytes.shape[0]
    args.y, args.y_type, args.outputs, args.bias = y.data_ptr(), args.x_type, outputs, _ptr(bias)
    args.weight, args.weight_stride = weight.bytes.data_ptr(), weight.bytes.stride(0)
    args.weight_kind, args.unit = weight.kind, weight.unit
    args.weight_scale, args.scale_type = weight.scale.data_ptr(), _SCALES[weight.scale.dtype]
    args.scale_stride = weight.scale.numel() // outputs if weight.scale.numel() > 1 else 0
    args.group, args.global_scale, args.weight_sum = weight.group, _ptr(weight.global_scale), _ptr(weight.row_sum)
    args.activation = ACTIVATIONS[activation]


def linear_float(
    x: torch.Tensor,
    weight: Weight,
    values: tuple[float, ...],
    bias: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    activation: str = "none",
) -> torch.Tensor:
    """x [..., K] float → y [..., N] in x's type (float64: float32), activations unquantized: csrc/floats.h.

    values: what a nibble stands for, 16, and beside the identifier, 16 (kind NIBBLES: not used); weight.tables: unused.
    bias: float32 [N]; multiplier: float32 [K]; both contiguous.
    """
    x_MK, outputs = _rows(x), weight.bytes.shape[0]
    y = x_MK.new_empty(*x.shape[:-1], outputs)
    if not y.numel():
        return y
    args = LinearArgs()
    args.x, args.rows, args.columns = x_MK.data_ptr(), x_MK.shape[0], x_MK.shape[1]
    args.x_type, args.x_stride, args.multiplier = _FLOATS[x_MK.dtype], x_MK.stride(0), _ptr(multiplier)
    args.threads = torch.get_num_threads()
    args.values = _values(values).data_ptr()
    _output_args(args, y, weight, bias, activation)
    _run("evenbits_linear_float", args)
    return y


def int8_matmul(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] · int8 [N, K]ᵀ → int32 [M, N], exact."""
    a_MK, b_NK = a_MK.contiguous(), b_NK.contiguous()
    y = torch.empty(a_MK.shape[0], b_NK.shape[0], dtype=torch.int32)
    args = LinearArgs()
    args.x, args.rows, args.columns, args.outputs = a_MK.data_ptr(), *a_MK.shape, b_NK.shape[0]
    args.x_type, args.x_stride, args.y, args.y_type = _INT8, a_MK.shape[1], y.data_ptr(), _INT32
    args.weight, args.weight_stride, args.unit = b_NK.data_ptr(), b_NK.shape[1], 1.0
    args.threads = torch.get_num_threads()
    _run("evenbits_linear", args)
    return y
