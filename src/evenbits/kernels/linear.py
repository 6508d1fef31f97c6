"""Float in, float out, integers between: linear layers by fused kernels (C, Triton), or step by step by torch.

    one scale per row       y = float(Σ codes · weights) · (scale_m · weight_scale_n) + bias
    a scale per group       y = (Σ over groups, in order, float(Σ codes · weights) · weight_scale_ng) · scale_m + bias

Integer sums are exact. In float32 every product and sum is rounded by itself, in this order, in every backend, so that
the result does not depend on the machine. Affine activations have zero_m · Σ weights subtracted from the integer sum.

M, T: rows (tokens), K, I: columns (input channels), N, O: outputs, G: groups, g: group size, B: bytes of a packed row.
"""

from __future__ import annotations

import torch

from evenbits.errors import EvenbitsError
from evenbits.kernels import dispatch, fused, reference
from evenbits.kernels.activations import apply_activation, check_activation
from evenbits.kernels.checks import check_int8, check_outputs, check_packed, check_rows, check_stored, check_sums
from evenbits.kernels.matmul import check_shapes, int8_matmul
from evenbits.kernels.pair_codes import pair_codes, pair_values
from evenbits.kernels.quantize import fused_rows, parse_format, quantize_rows
from evenbits.kernels.torch_int8 import exact_product
from evenbits.numerics import scales
from evenbits.numerics.format import Format


def linear_w8a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    multiplier: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    activation: str = "none",
) -> torch.Tensor:
    """int8 weights; see ops.linear_w8a8."""
    fmt = parse_format(format)
    check_int8(x, weight, weight_scale, fmt)
    check_rows(x, multiplier, scale, zero_point)
    check_outputs(x, len(weight), bias, weight_sum)
    _check(fmt, weight_sum, activation)
    rows = fused_rows(x, fmt, multiplier, scale, zero_point)
    if rows is not None and weight.dtype == torch.int8 and _plain(bias):
        check_shapes(x.reshape(-1, x.shape[-1]), weight)
        stored = fused.Weight(weight.contiguous(), weight_scale.float().contiguous(), row_sum=_contiguous(weight_sum))
        return rows.kernels.linear(x, stored, _float(bias), rows, activation).to(x.dtype)
    codes_MI, scale_M1, zero_M1 = quantize_rows(x, fmt, multiplier, scale, zero_point)
    product_MO = _minus_zero(int8_matmul(codes_MI, weight), fmt, zero_M1, weight_sum)
    y_MO = product_MO.float() * (scale_M1 * weight_scale.reshape(1, -1))
    return _finish(y_MO, bias, activation, x, weight.shape[0])


def linear_pair(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    weight_format: str,
    bias: torch.Tensor | None,
    format: str,
    multiplier: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    activation: str = "none",
) -> torch.Tensor:
    """Packed 4-bit weights; see ops.linear_pair."""
    fmt, stored = parse_format(format), parse_format(weight_format)
    table = pair_codes(stored, x.shape[-1])
    _check(fmt, weight_sum, activation)
    if table is None or (table.group and not fmt.rule.symmetric):
        raise EvenbitsError(
            "linear_pair takes 4-bit weights of integer values, one scale a row or in groups of 8·n columns "
            f"(groups: symmetric activations); given {weight_format} weights and {format} activations."
        )
    check_packed(x, weight, stored, table.row_bytes)
    check_rows(x, multiplier, scale, zero_point)
    check_stored(x, weight, weight_scale, global_scale, table.group)
    check_outputs(x, len(weight), bias, weight_sum)
    check_sums(x.shape[-1], fmt, wide=table.wide and not table.group)
    rows = fused_rows(x, fmt, multiplier, scale, zero_point)
    if rows is not None and _plain(bias):
        kind = fused.NIBBLES if not table.paired else fused.WIDE_PAIRS if table.wide else fused.PAIRS
        packed = fused.Weight(
            weight.contiguous(),
            weight_scale.contiguous(),
            kind,
            table.tables,
            table.unit,
            table.group,
            global_scale,
            _contiguous(weight_sum),
        )
        return rows.kernels.linear(x, packed, _float(bias), rows, activation).to(x.dtype)
    codes_MI, scale_M1, zero_M1 = quantize_rows(x, fmt, multiplier, scale, zero_point)
    values_OI = pair_values(weight, stored, codes_MI.shape[1])
    weight_scales = scales.real(weight_scale, global_scale) * table.unit
    product = _product(x.device.type, table.wide)
    if table.group:
        y_MO = reference.grouped_product(codes_MI, values_OI, weight_scales, table.group, product) * scale_M1
    else:
        product_MO = _minus_zero(product(codes_MI, values_OI), fmt, zero_M1, weight_sum)
        y_MO = product_MO.float() * (scale_M1 * weight_scales.reshape(1, -1))
    return _finish(y_MO, bias, activation, x, weight.shape[0])


def _product(device: str, wide: bool) -> dispatch.Matmul:
    """The product of codes with decoded values, which are float32 and may be beyond int8."""
    if dispatch.backend(device) == "reference":
        return reference.exact_product
    return exact_product if wide else lambda codes, values: int8_matmul(codes, values.to(torch.int8))


def _check(fmt: Format, weight_sum: torch.Tensor | None, activation: str) -> None:
    check_activation(activation)
    if not fmt.rule.symmetric and weight_sum is None:
        raise EvenbitsError("affine activations need the row sums of the weight codes (weight_sum).")


def _minus_zero(
    product_MO: torch.Tensor, fmt: Format, zero_M1: torch.Tensor, weight_sum: torch.Tensor | None
) -> torch.Tensor:
    return product_MO if fmt.rule.symmetric or weight_sum is None else product_MO - zero_M1 * weight_sum


def _finish(
    y_MO: torch.Tensor, bias: torch.Tensor | None, activation: str, x: torch.Tensor, outputs: int
) -> torch.Tensor:
    if bias is not None:
        y_MO = y_MO + bias
    if activation != "none":
        y_MO = y_MO.float()
    return apply_activation(y_MO, activation).to(x.dtype).reshape(*x.shape[:-1], outputs)


def _plain(bias: torch.Tensor | None) -> bool:
    """Whether a bias is one that float32 holds (a float64 one makes the sum float64)."""
    return bias is None or bias.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _float(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()
