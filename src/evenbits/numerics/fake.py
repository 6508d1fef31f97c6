"""`fake_quantize`: what a tensor becomes when it is encoded and decoded, for activations on their way into a layer.

With a calibrated scale the numbers are snapped directly; without one each row is encoded and decoded by itself
(numerics/rows.py). A row that holds a NaN or an infinity comes out as NaN: it has no codes, and must not come out as
plausible numbers.
"""

from __future__ import annotations

import torch

from evenbits.numerics import elements
from evenbits.numerics.affine import from_codes, to_codes
from evenbits.numerics.format import Format
from evenbits.numerics.qdtypes import QDtype
from evenbits.numerics.rows import round_rows


def fake_quantize(
    x: torch.Tensor,
    fmt: Format,
    *,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] → the values it would have after encoding to `fmt`, same shape and type.

    scale, zero_point: calibrated ones ([1]); without them every row's are taken from that row
        alone, as `encode` does (of formats with one scale per tensor: from x).
    """
    if not x.numel():
        return x
    x_MK = x.detach().reshape(-1, x.shape[-1]).float()
    broken_M1 = ~x_MK.isfinite().all(dim=1, keepdim=True)
    x_MK = x_MK.masked_fill(broken_M1, 0.0)
    if scale is None:
        y_MK = round_rows(x_MK, fmt)
    elif isinstance(fmt.dtype, QDtype):
        y_MK = from_codes(to_codes(x_MK, scale, zero_point, fmt), scale, zero_point)
    else:
        padding = fmt.stored_columns(x_MK.shape[1]) - x_MK.shape[1]
        u_MK = torch.nn.functional.pad(x_MK / scale, (0, padding))
        y_MK = (
            elements.snap(u_MK, fmt.dtype, fmt.rule.policy)[:, : x_MK.shape[1]] * scale + 0.0
        )  # no minus zero: bytes have none
    if x.dtype in (torch.float16, torch.bfloat16):  # as `dequantize`: half a step too high must not become infinite
        y_MK = y_MK.clamp(-torch.finfo(x.dtype).max, torch.finfo(x.dtype).max)
    return y_MK.masked_fill(broken_M1, torch.nan).reshape(x.shape).to(x.dtype)
