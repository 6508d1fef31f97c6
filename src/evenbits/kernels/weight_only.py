"""Float in, float out, and float between: linear layers with packed 4-bit weights whose activations stay as they are.

    y = f( Σ over columns of x · w + bias ),   w = float32(value of the nibble · scale)

x (times the multiplier, if there is one) and sums are float32. The C kernels and the reference sum in one fixed order
(csrc/floats.h), so that their result does not depend on the machine, the number of threads or the other rows. Triton's
kernels multiply by the scale last and sum in an order of the GPU's own. Without either weights are decoded a panel of
rows at a time and multiplied by torch, in an order that is torch's own. No backend ever holds the whole weight as
floats.

M: rows (tokens), K: columns, N, O: outputs, B: bytes of a packed row, P: rows of a panel.
"""

from __future__ import annotations

import torch

from evenbits.errors import EvenbitsError
from evenbits.kernels import dispatch, fused, reference
from evenbits.kernels.activations import apply_activation, check_activation
from evenbits.kernels.checks import check_outputs, check_packed, check_rows, check_stored
from evenbits.kernels.pair_codes import FloatCodes, float_codes
from evenbits.kernels.quantize import parse_format
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor

_PANEL = 1 << 20  # weights that are floats at a time, without a kernel: 4 MB


def linear_pair_float(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    weight_format: str,
    bias: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    activation: str = "none",
) -> torch.Tensor:
    """Packed 4-bit weights and float activations; see ops.linear_pair_float."""
    stored = parse_format(weight_format)
    codes = _checked(x, weight, stored, activation)
    check_rows(x, multiplier, None, None)
    check_stored(x, weight, weight_scale, global_scale, codes.group)
    check_outputs(x, len(weight), bias)
    kernels = dispatch.fused(x.device.type)
    if kernels is not None and _float32(bias) and _float32(x):
        packed = fused.Weight(
            weight.contiguous(),
            weight_scale.contiguous(),
            fused.PAIRS if codes.paired else fused.NIBBLES,
            group=codes.group,
            global_scale=global_scale,
        )
        addend = None if bias is None else bias.float().contiguous()
        factors = None if multiplier is None else multiplier.float().contiguous()
        return kernels.linear_float(x, packed, codes.values, addend, factors, activation)
    x_MK = x.reshape(-1, x.shape[-1]) if multiplier is None else (x.float() * multiplier).reshape(-1, x.shape[-1])
    y_MN = _by_panels(x_MK.float(), weight, weight_scale, global_scale, stored)
    if bias is not None:
        y_MN = y_MN + bias.float()
    return apply_activation(y_MN, activation).to(x.dtype).reshape(*x.shape[:-1], len(weight))


def served_by(device: str) -> str:
    """Who computes `linear_pair_float` on a device."""
    chosen = dispatch.backend(device)
    return chosen if chosen in ("c", "triton", "reference") else "torch float32, decoded in panels"


def _by_panels(
    x_MK: torch.Tensor,
    weight_OB: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    fmt: Format,
) -> torch.Tensor:
    """float32 x · decoded weights, some rows of the weight at a time → float32 [M, O]."""
    product = reference.float_product if dispatch.backend(x_MK.device.type) == "reference" else _linear
    outputs, columns = len(weight_OB), x_MK.shape[1]
    y_MO = x_MK.new_empty(len(x_MK), outputs)
    rows_P = max(1, _PANEL // max(columns, 1))
    for first in range(0, outputs, rows_P):
        last = min(first + rows_P, outputs)
        part = scale if scale.ndim < 2 else scale[first:last]
        shape = (last - first, columns)
        weight_PK = QTensor(weight_OB[first:last], part, None, fmt, shape, global_scale=global_scale).dequantize()
        y_MO[:, first:last] = product(x_MK, weight_PK)
    return y_MO


def _linear(x_MK: torch.Tensor, weight_PK: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x_MK, weight_PK)


def _checked(x: torch.Tensor, weight_OB: torch.Tensor, fmt: Format, activation: str) -> FloatCodes:
    check_activation(activation)
    codes = float_codes(fmt, x.shape[-1])
    if isinstance(codes, str):
        raise EvenbitsError(
            f"linear_pair_float takes symmetric 4-bit weights, one scale a row, a tensor or 8·n columns; {fmt} has "
            f"{codes}."
        )
    check_packed(x, weight_OB, fmt, codes.row_bytes)
    return codes


def _float32(x: torch.Tensor | None) -> bool:
    """Whether float32 holds a tensor's numbers (not those of float64)."""
    return x is None or x.dtype in (torch.float32, torch.float16, torch.bfloat16)
