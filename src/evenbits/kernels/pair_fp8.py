"""Float in, float out, E4M3 between: linear layers with packed 4-bit weights and activations in FP8.

    one scale per row       y = f( float(Σ codes · weights) · (scale_m · scale_n) + bias )
    a scale per group       y = f( (Σ over groups, in order, float(Σ codes · weights) · scale_ng) · scale_m + bias )

Activations are quantized as `fp8:row` is everywhere (numerics/rows.py): scale = largest magnitude / 448, rounded to a
float16's digits, codes to nearest, ties to even, saturated. Weights are decoded to E4M3, which holds every number of
the formats served (`pair_codes.e4m3_codes`). Here, by torch, sums are exact and rounded to float32 once. Triton's
kernels, on GPUs from compute capability 8.9 on, sum in float32 what tensor cores have summed some products at a time,
in an order of the GPU's own. A row with a NaN or an infinity comes out as NaN.

M: rows (tokens), K: columns, N, O: outputs, B: bytes of a packed row, P: rows of a panel, G: groups.
"""

from __future__ import annotations

import torch

from evenbits.errors import EvenbitsError
from evenbits.kernels import dispatch, fused, reference
from evenbits.kernels.activations import apply_activation, check_activation
from evenbits.kernels.checks import check_outputs, check_packed, check_rows, check_stored
from evenbits.kernels.pair_codes import FloatCodes, e4m3_codes
from evenbits.kernels.quantize import parse_format
from evenbits.numerics import elements, scales
from evenbits.numerics.format import Format
from evenbits.numerics.rows import row_values

ACTIVATIONS = ("fp8:row", "fp8_e4m3:row")  # one format
_PANEL = 1 << 19  # weights that are float64 at a time, without a kernel: 4 MB


def linear_pair_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    weight_format: str,
    bias: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    activation: str = "none",
) -> torch.Tensor:
    """Packed 4-bit weights and E4M3 activations; see ops.linear_pair_fp8."""
    stored = parse_format(weight_format)
    codes = _checked(x, weight, stored, activation)
    check_rows(x, multiplier, None, None)
    check_stored(x, weight, weight_scale, global_scale, codes.group)
    check_outputs(x, len(weight), bias)
    addend = None if bias is None else bias.float().contiguous()
    factors = None if multiplier is None else multiplier.float().contiguous()
    kernels = dispatch.e4m3(x.device.type)
    if kernels is not None:
        kind = fused.PAIRS if codes.paired else fused.NIBBLES
        packed = fused.Weight(
            weight.contiguous(), weight_scale.contiguous(), kind, group=codes.group, global_scale=global_scale
        )
        return kernels.linear_e4m3(x, packed, codes.values, addend, factors, activation).to(x.dtype)
    x_MK = x.reshape(-1, x.shape[-1]).float()
    values_MK, scale_M1 = quantize_e4m3(x_MK if factors is None else x_MK * factors)
    y_MO = _by_panels(values_MK, scale_M1, weight, scales.real(weight_scale, global_scale), stored, codes.group)
    y_MO = y_MO if addend is None else y_MO + addend
    return apply_activation(y_MO, activation).to(x.dtype).reshape(*x.shape[:-1], len(weight))


def served_by(device: str) -> str:
    """Who computes `linear_pair_fp8` on a device."""
    return "triton" if dispatch.has_e4m3(device) else "torch float64, decoded in panels"


def is_served(device: str) -> bool:
    """Whether a device has a kernel for it: where it has none, a layer does better with other products."""
    return dispatch.has_e4m3(device)


# Layers ask at every call: torch.compile is to take the answer and not to look inside. torch.compiler's decorator does
# this and imports all of the compiler.
is_served._dynamo_marked_constant = True  # type: ignore[attr-defined]


def quantize_e4m3(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x float32 [M, K] → (values that E4M3 holds [M, K], scale float32 [M, 1]); zeros and a scale of NaN for a row that
    is not finite."""
    if not x_MK.numel():
        return x_MK, x_MK.new_ones(len(x_MK), 1)
    broken_M1 = ~x_MK.isfinite().all(dim=1, keepdim=True)
    values_MK, scale_M1 = row_values(x_MK.masked_fill(broken_M1, 0.0), parse_format(ACTIVATIONS[0]))
    return values_MK, scale_M1.masked_fill(broken_M1, torch.nan)


def _by_panels(
    values_MK: torch.Tensor,
    scale_M1: torch.Tensor,
    weight_OB: torch.Tensor,
    scale: torch.Tensor,
    fmt: Format,
    group: int,
) -> torch.Tensor:
    """Scaled sums, float32 [M, O], some rows of the weight at a time."""
    columns, outputs = values_MK.shape[1], len(weight_OB)
    y_MO = scale_M1.new_empty(len(values_MK), outputs)
    rows_P = max(1, _PANEL // max(columns, 1))
    for first in range(0, outputs, rows_P):
        panel = slice(first, first + rows_P)
        decoded_PK = elements.unpack_values(weight_OB[panel], fmt.dtype, fmt.stored_columns(columns))[:, :columns]
        part = scale if scale.numel() == 1 and not group else scale.reshape(outputs, -1)[panel]
        if group:
            y_MO[:, panel] = reference.grouped_product(values_MK, decoded_PK, part, group, _exact) * scale_M1
        else:
            y_MO[:, panel] = _exact(values_MK, decoded_PK).float() * (scale_M1 * part.reshape(1, -1))
    return y_MO


def _exact(values_MK: torch.Tensor, decoded_NK: torch.Tensor) -> torch.Tensor:
    """Products of E4M3 numbers are multiples of 2⁻¹⁸ below 2¹⁸: float64 holds sums of 2¹⁷ of them."""
    return values_MK.double() @ decoded_NK.double().t()


def _checked(x: torch.Tensor, weight_OB: torch.Tensor, fmt: Format, activation: str) -> FloatCodes:
    check_activation(activation)
    codes = e4m3_codes(fmt, x.shape[-1])
    if isinstance(codes, str):
        raise EvenbitsError(
            "linear_pair_fp8 takes symmetric 4-bit weights whose values E4M3 holds, one scale a row, a tensor or 8·n "
            f"columns; {fmt} has {codes}."
        )
    check_packed(x, weight_OB, fmt, codes.row_bytes)
    return codes
