"""The operations, each declared once through torch.library so that torch.compile and torch.export see through them.

    evenbits::int8_matmul(a_MK, b_NK)                     int8 × int8 → int32, exact
    evenbits::quantize_rows(x, format, …)                 activations → int8 codes, scales (zero points)
    evenbits::linear_w8a8(x, weight_OI, …)                float in, float out; integers between

M, T: rows (tokens), K, I: columns (input channels), N, O: output channels.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from evenbits.errors import EvenbitsError
from evenbits.kernels.dispatch import matmul
from evenbits.numerics.affine import qparams, to_codes
from evenbits.numerics.format import Format

_library = torch.library.Library("evenbits", "DEF")
_library.define("int8_matmul(Tensor a, Tensor b) -> Tensor")
_library.define(
    "quantize_rows(Tensor x, str format, Tensor? multiplier, Tensor? scale, Tensor? zero_point) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_w8a8(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str format, Tensor? multiplier, "
    "Tensor? scale, Tensor? zero_point, Tensor? weight_sum) -> Tensor"
)

_INT32_SAFE_K = (2**31 - 1) // 128**2

_format = lru_cache(maxsize=None)(Format.parse)


def _int8_matmul(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    matrices = a_MK.dtype == b_NK.dtype == torch.int8 and a_MK.ndim == b_NK.ndim == 2
    if not matrices or a_MK.shape[1] != b_NK.shape[1]:
        raise EvenbitsError(
            f"int8_matmul takes int8 [M, K] and int8 [N, K]; given {a_MK.dtype} {list(a_MK.shape)} and {b_NK.dtype} "
            f"{list(b_NK.shape)}."
        )
    if a_MK.shape[1] > _INT32_SAFE_K:
        raise EvenbitsError(f"a sum of {a_MK.shape[1]} int8 products may not fit int32; at most {_INT32_SAFE_K} fit.")
    if not a_MK.numel() or not b_NK.numel():
        return torch.zeros(a_MK.shape[0], b_NK.shape[0], dtype=torch.int32, device=a_MK.device)
    return matmul(a_MK.device.type)(a_MK, b_NK)


def _quantize_rows(
    x: torch.Tensor,
    format: str,
    multiplier: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    fmt = _format(format)
    x_MK = x.reshape(-1, x.shape[-1]).float()
    if multiplier is not None:
        x_MK = x_MK * multiplier
    lo, hi = _row_range(x_MK)
    # A code can be neither NaN nor infinite, so a row that holds one gets the scale NaN: it comes out as NaN and not as
    # a plausible number. With a calibrated scale, infinities saturate like anything beyond it.
    broken = hi.isnan() if scale is not None else ~(lo.isfinite() & hi.isfinite())
    if scale is None:
        if fmt.granularity.kind == "tensor" and lo.numel():
            lo, hi = lo.amin(dim=0, keepdim=True), hi.amax(dim=0, keepdim=True)
        scale, zero_point = qparams(lo, hi, fmt)
    codes = to_codes(x_MK, scale, zero_point, fmt)
    row_scale = torch.where(broken, torch.nan, scale.reshape(-1, 1)).expand(x_MK.shape[0], 1)
    zero = scale.new_zeros((), dtype=torch.int32) if zero_point is None else zero_point
    row_zero = zero.reshape(-1, 1).expand(x_MK.shape[0], 1)
    # An op may not hand back its own input: of one row, `contiguous` alone would be the calibrated zero point itself.
    return codes, row_scale.contiguous(), row_zero.clone(memory_format=torch.contiguous_format)


def _row_range(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each row, [M, 1] each."""
    if not x_MK.numel():
        zeros = x_MK.new_zeros(x_MK.shape[0], 1)
        return zeros, zeros
    # Two passes: torch.aminmax over a dimension is ten times slower than amin and amax together (CPU, torch 2.13).
    return x_MK.amin(dim=1, keepdim=True), x_MK.amax(dim=1, keepdim=True)


def _linear_w8a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    multiplier: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
) -> torch.Tensor:
    codes_MI, scale_M1, zero_M1 = _quantize_rows(x, format, multiplier, scale, zero_point)
    product_MO = _int8_matmul(codes_MI, weight)
    if not _format(format).rule.symmetric:
        if weight_sum is None:
            raise EvenbitsError("affine activations need the row sums of the weight codes (weight_sum).")
        product_MO = product_MO - zero_M1 * weight_sum
    y_MO = product_MO.float() * (scale_M1 * weight_scale.reshape(1, -1))
    if bias is not None:
        y_MO = y_MO + bias
    return y_MO.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


for _name, _kernel in (
    ("int8_matmul", _int8_matmul),
    ("quantize_rows", _quantize_rows),
    ("linear_w8a8", _linear_w8a8),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


def _fake_int8_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


def _fake_quantize_rows(
    x: torch.Tensor,
    format: str,
    multiplier: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.numel() // x.shape[-1]
    codes = x.new_empty((rows, x.shape[-1]), dtype=torch.int8)
    return codes, x.new_empty((rows, 1), dtype=torch.float32), x.new_empty((rows, 1), dtype=torch.int32)


def _fake_linear_w8a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    multiplier: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


for _name, _fake in (
    ("int8_matmul", _fake_int8_matmul),
    ("quantize_rows", _fake_quantize_rows),
    ("linear_w8a8", _fake_linear_w8a8),
):
    torch.library.register_fake(f"evenbits::{_name}", _fake, lib=_library)


def int8_matmul(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] · int8 [N, K]ᵀ → int32 [M, N], exact in every backend. Raises EvenbitsError for other types."""
    result: torch.Tensor = torch.ops.evenbits.int8_matmul(a_MK, b_NK)
    return result


def quantize_rows(
    x: torch.Tensor,
    fmt: Format | str,
    *,
    multiplier: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations [..., K] → (codes int8 [M, K], scale float32 [M, 1], zero point int32 [M, 1]), M = all but the last.

    multiplier: float32 [K], applied to every row first (1/s of a smoothing that could not be folded).
    scale, zero_point: calibrated ones, [1]; without them each row (or the tensor, by `fmt`) gets its own.
    """
    codes, row_scale, row_zero = torch.ops.evenbits.quantize_rows(x, str(fmt), multiplier, scale, zero_point)
    return codes, row_scale, row_zero


def linear_w8a8(
    x: torch.Tensor,
    weight_OI: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    fmt: Format | str,
    *,
    multiplier: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x · Wᵀ + bias with int8 codes on both sides; x [..., I] float → y [..., O] in x's type.

    weight_OI: int8 codes; weight_scale: float32 [O, 1] or [1]; bias: [O]; weight_sum: int32 [O], Σ of each row's codes
    (affine activations only). The rest as in `quantize_rows`. The integer product is exact; the epilogue is float32.
    """
    result: torch.Tensor = torch.ops.evenbits.linear_w8a8(
        x, weight_OI, weight_scale, bias, str(fmt), multiplier, scale, zero_point, weight_sum
    )
    return result
