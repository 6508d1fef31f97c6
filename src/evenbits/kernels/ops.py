"""The operations, each declared once through torch.library so that torch.compile and torch.export see through them.

    evenbits::int8_matmul(a_MK, b_NK)                     int8 × int8 → int32, exact
    evenbits::quantize_rows(x, format, …)                 activations → int8 codes, scales (zero points)
    evenbits::linear_w8a8(x, weight_OI, …)                float in, float out; integers between
    evenbits::linear_pair(x, weight_OB, …)                the same with two 4-bit weights in a byte, never decoded whole
    evenbits::linear_pair_float(x, weight_OB, …)          two 4-bit weights in a byte, activations stay float
    evenbits::linear_pair_fp8(x, weight_OB, …)            two 4-bit weights in a byte, activations become E4M3

What they compute is in matmul.py, quantize.py, linear.py, weight_only.py and pair_fp8.py; which backend does, in
dispatch.py.
M, T: rows (tokens), K, I: columns (input channels), N, O: output channels, G: groups, B: bytes of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from evenbits.kernels import linear, matmul, pair_fp8, quantize, weight_only
from evenbits.kernels.checks import check_device, check_rows
from evenbits.numerics.format import Format

_library = torch.library.Library("evenbits", "DEF")
_ROWS = "str format, Tensor? multiplier, Tensor? scale, Tensor? zero_point"
_library.define("int8_matmul(Tensor a, Tensor b) -> Tensor")
_library.define(f"quantize_rows(Tensor x, {_ROWS}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"linear_w8a8(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, {_ROWS}, Tensor? weight_sum, "
    "str activation='none') -> Tensor"
)
_library.define(
    "linear_pair(Tensor x, Tensor weight, Tensor weight_scale, Tensor? global_scale, str weight_format, Tensor? bias, "
    f"{_ROWS}, Tensor? weight_sum, str activation='none') -> Tensor"
)
for _name in ("linear_pair_float", "linear_pair_fp8"):
    _library.define(
        f"{_name}(Tensor x, Tensor weight, Tensor weight_scale, Tensor? global_scale, str weight_format, "
        "Tensor? bias, Tensor? multiplier, str activation='none') -> Tensor"
    )


def _quantize_rows(
    x: torch.Tensor,
    format: str,
    multiplier: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_rows(x, multiplier, scale, zero_point)
    return quantize.quantize_rows(x, quantize.parse_format(format), multiplier, scale, zero_point)


def _fake_int8_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    check_device(a, b)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


def _fake_quantize_rows(
    x: torch.Tensor,
    format: str,
    multiplier: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_device(x, multiplier, scale, zero_point)
    rows = x.numel() // x.shape[-1]
    codes = x.new_empty((rows, x.shape[-1]), dtype=torch.int8)
    return codes, x.new_empty((rows, 1), dtype=torch.float32), x.new_empty((rows, 1), dtype=torch.int32)


def _fake_linear(x: torch.Tensor, weight: torch.Tensor, *rest: object, activation: str = "none") -> torch.Tensor:
    check_device(x, weight, *rest)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


for _name, _kernel, _fake in (
    ("int8_matmul", matmul.int8_matmul, _fake_int8_matmul),
    ("quantize_rows", _quantize_rows, _fake_quantize_rows),
    ("linear_w8a8", linear.linear_w8a8, _fake_linear),
    ("linear_pair", linear.linear_pair, _fake_linear),
    ("linear_pair_float", weight_only.linear_pair_float, _fake_linear),
    ("linear_pair_fp8", pair_fp8.linear_pair_fp8, _fake_linear),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"evenbits::{_name}", _fake, lib=_library)


def _call(op: Callable[..., Any], kernel: Callable[..., Any], x: torch.Tensor, *rest: object) -> Any:
    """The dispatcher is for tracing and autograd; where nothing of that goes on, a call without it is shorter."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not torch.Tensor or _traced():
        return op(x, *rest)
    return kernel(x, *rest)


def _traced() -> bool:
    """Whether a mode, a functional transform or torch.jit.trace looks on."""
    torch_c: Any = torch._C
    modes, transforms = torch_c._len_torch_dispatch_stack(), torch_c._functorch.peek_interpreter_stack()
    return modes > 0 or transforms is not None or torch_c._get_tracing_state() is not None


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
    activation: str = "none",
) -> torch.Tensor:
    """y = x · Wᵀ + bias with int8 codes on both sides; x [..., I] float → y [..., O] in x's type.

    weight_OI: int8 codes; weight_scale: float32 [O, 1] or [1]; bias: [O]; weight_sum: int32 [O], Σ of each row's codes
    (affine activations only); activation: none, relu, gelu, gelu_tanh or silu, applied to y before it is rounded to x's
    type. The rest as in `quantize_rows`. The integer product is exact; the epilogue is float32 (linear.py). Raises
    EvenbitsError for shapes and types that do not fit.
    """
    result: torch.Tensor = _call(
        torch.ops.evenbits.linear_w8a8,
        linear.linear_w8a8,
        x,
        weight_OI,
        weight_scale,
        bias,
        str(fmt),
        multiplier,
        scale,
        zero_point,
        weight_sum,
        activation,
    )
    return result


def linear_pair(
    x: torch.Tensor,
    weight_OB: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_format: Format | str,
    bias: torch.Tensor | None,
    fmt: Format | str,
    *,
    global_scale: torch.Tensor | None = None,
    multiplier: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """y = x · Wᵀ + bias with packed 4-bit weights and int8 activations; x [..., I] float → y [..., O] in x's type.

    weight_OB: uint8, two weights a byte; weight_scale, global_scale: as QTensor stores them for `weight_format`, which
    must be one that `pair_codes` knows; fmt: of the activations. The rest as in `linear_w8a8`. Raises EvenbitsError for
    formats, shapes and types that do not fit.
    """
    result: torch.Tensor = _call(
        torch.ops.evenbits.linear_pair,
        linear.linear_pair,
        x,
        weight_OB,
        weight_scale,
        global_scale,
        str(weight_format),
        bias,
        str(fmt),
        multiplier,
        scale,
        zero_point,
        weight_sum,
        activation,
    )
    return result


def linear_pair_float(
    x: torch.Tensor,
    weight_OB: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_format: Format | str,
    bias: torch.Tensor | None,
    *,
    global_scale: torch.Tensor | None = None,
    multiplier: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """y = x · Wᵀ + bias with packed 4-bit weights and float activations; x [..., I] → y [..., O] in x's type.

    weight_OB: uint8, two weights a byte; weight_scale, global_scale: as QTensor stores them for `weight_format`, which
    must be one that `float_codes` knows; bias: [O]; multiplier: float32 [I], applied to x first. Sums and what follows
    are float32 (weight_only.py). Raises EvenbitsError for formats, shapes and types that do not fit.
    """
    result: torch.Tensor = _call(
        torch.ops.evenbits.linear_pair_float,
        weight_only.linear_pair_float,
        x,
        weight_OB,
        weight_scale,
        global_scale,
        str(weight_format),
        bias,
        multiplier,
        activation,
    )
    return result


def linear_pair_fp8(
    x: torch.Tensor,
    weight_OB: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_format: Format | str,
    bias: torch.Tensor | None,
    *,
    global_scale: torch.Tensor | None = None,
    multiplier: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """y = x · Wᵀ + bias with packed 4-bit weights and activations in E4M3, a scale for each row (`fp8:row`); x [..., I]
    → y [..., O] in x's type.

    The arguments are those of `linear_pair_float`; E4M3 must hold the values of `weight_format` (NormalFloat's it does
    not). On GPUs from compute capability 8.9 on by a kernel; elsewhere by torch, exact and slow (pair_fp8.py). Raises
    EvenbitsError for formats, shapes and types that do not fit, and on other GPUs.
    """
    result: torch.Tensor = _call(
        torch.ops.evenbits.linear_pair_fp8,
        pair_fp8.linear_pair_fp8,
        x,
        weight_OB,
        weight_scale,
        global_scale,
        str(weight_format),
        bias,
        multiplier,
        activation,
    )
    return result
