"""Convolutions that stay in bytes: uint8 in, uint8 out, with ReLU, ReLU6 and an addition inside.

    evenbits::conv2d_u8(x, …)     y = clamp(round(act(xs·ws·Σ(x − xz)·w + b + as·(a − az)) / ys) + yz, 0, 255)

On CPUs with VNNI it is torch's own oneDNN convolution, which accumulates in int32. The input's zero point is taken
off here, through the bias (− xs·ws·xz·Σ w) and explicit padding: oneDNN would sum it up again in every call, which
takes 1.3 to 8 times as long. Exact while |Σ x·w| and |xz·Σ w| stay below 2²⁴, beyond that within roundings of the
larger of them. Two kinds of shapes are kept from it (torch 2.13), both found by tests: windows that lie in padding
alone crash it (https://github.com/uxlfoundation/oneDNN/issues/5942) and are padded here; an output one column wide
under a wider kernel is wrong, and that (small) case is the float convolution. With its own zero points a few channels
beside padding had wrong borders, too (https://github.com/uxlfoundation/oneDNN/issues/5080). Elsewhere a float
convolution of the codes, exact and slow, says so through `report_conv`. uint8 is oneDNN's activation type: with int8
activations it refuses or runs a reference loop. Without VNNI its uint8 kernels add pairs of products in 16 bits and
saturate silently, so they are not used there.
N: images, C: channels, H, W: height, width, O: out channels, g: groups.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from evenbits.errors import EvenbitsError
from evenbits.kernels.quantize import parse_format, quantize_rows
from evenbits.kernels.torch_int8 import without_autocast

_BYTES = parse_format("int8:tensor:affine")
ACTIVATIONS = ("none", "relu", "relu6")
_library = torch.library.Library("evenbits", "FRAGMENT")
_library.define(
    "conv2d_u8(Tensor x, float x_scale, int x_zero, Tensor weight, Tensor weight_scale, Tensor? bias, int[] stride, "
    "int[] padding, int[] dilation, int groups, str activation, float out_scale, int out_zero, Tensor? addend, "
    "float addend_scale, int addend_zero) -> Tensor"
)

_Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_packed: dict[tuple[object, ...], tuple[weakref.ref[torch.Tensor], int, _Packed]] = {}
_warned: list[bool] = []


def report_conv(device_type: str = "cpu") -> tuple[str, str]:
    """(backend, why) of byte convolutions on a device type: "onednn" or "float"."""
    if device_type == "cpu" and torch.backends.mkldnn.is_available():
        if torch.cpu._is_vnni_supported():
            return "onednn", "exact on this CPU (it has VNNI)"
        return "float", "this CPU has no VNNI: oneDNN's uint8 convolutions would saturate silently"
    return "float", f"no byte convolution for {device_type}"


def _conv2d_u8(
    x: torch.Tensor,
    x_scale: float,
    x_zero: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    out_scale: float,
    out_zero: int,
    addend: torch.Tensor | None,
    addend_scale: float,
    addend_zero: int,
) -> torch.Tensor:
    if x.dtype != torch.uint8 or x.ndim != 4 or weight.dtype != torch.int8 or activation not in ACTIVATIONS:
        raise EvenbitsError(
            f"conv2d_u8 takes uint8 [N, C, H, W], an int8 weight and an activation of {', '.join(ACTIVATIONS)}; given "
            f"{x.dtype} {list(x.shape)}, {weight.dtype} and {activation!r}."
        )
    made = [len(x), len(weight), *_positions(x, weight, stride, padding, dilation)]
    if addend is not None and (addend.dtype != torch.uint8 or list(addend.shape) != made):
        raise EvenbitsError(
            f"what conv2d_u8 adds is uint8 {made}, as its output; given {addend.dtype} {list(addend.shape)}."
        )
    where = (list(stride), list(padding), list(dilation), groups)
    onednn = report_conv(x.device.type)[0] == "onednn"
    if onednn and any(padding) and (x_zero or not _padding_is_safe(x, weight, padding, dilation)):
        (top, left), where = padding, (list(stride), [0, 0], list(dilation), groups)
        x = F.pad(x, (left, left, top, top), value=x_zero)
    if onednn and not (made[3] == 1 and weight.shape[3] > 1):
        tail = (activation, out_scale, out_zero, addend, addend_scale, addend_zero)
        return _onednn(x, x_scale, x_zero, weight, weight_scale, bias, where, *tail)
    if not onednn and not _warned:
        _warned.append(True)
        warnings.warn(f"byte convolutions run as float ones: {report_conv(x.device.type)[1]}", stacklevel=2)
    product = exact_product(x, x_zero, weight, where)
    y = product.float() * (x_scale * weight_scale.view(1, -1, 1, 1))
    y = y if bias is None else y + bias.view(1, -1, 1, 1)
    y = y if addend is None else y + (addend.float() - addend_zero) * addend_scale
    y = y.relu() if activation == "relu" else y.clamp(0, 6) if activation == "relu6" else y
    return y.contiguous(memory_format=torch.channels_last) if out_scale == 0 else to_bytes(y, out_scale, out_zero)


def _padding_is_safe(x: torch.Tensor, weight: torch.Tensor, padding: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether oneDNN may pad by itself: no window lies in padding alone (or nearly so)."""
    sizes = x.shape[2:], weight.shape[2:], padding, dilation
    inside = all(p < k and d * (k - 1) < n for n, k, p, d in zip(*sizes, strict=True))
    return not any(padding) or inside


def exact_product(
    x: torch.Tensor, x_zero: int, weight: torch.Tensor, where: tuple[list[int], list[int], list[int], int]
) -> torch.Tensor:
    """Σ(x − x_zero)·w [N, O, H', W'], exact: the reference. In float32 where every partial sum stays below 2²⁴ and
    oneDNN sums products directly, which is twice as fast; else in float64 (Winograd's form would be off by ones).
    """
    direct = x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    with without_autocast(x.device):
        if direct and 255 * int(weight.int().abs().sum(dim=(1, 2, 3)).amax()) < 2**24:
            return F.conv2d(x.float() - x_zero, weight.float(), None, *where)
        return F.conv2d(x.double() - x_zero, weight.double(), None, *where)


def _onednn(
    x: torch.Tensor,
    x_scale: float,
    x_zero: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    where: tuple[list[int], list[int], list[int], int],
    activation: str,
    out_scale: float,
    out_zero: int,
    addend: torch.Tensor | None,
    addend_scale: float,
    addend_zero: int,
) -> torch.Tensor:
    ops = torch.ops.onednn
    packed, zeros, sums = _pack(weight, weight_scale, list(x.shape), where)
    if x_zero:
        shift = weight_scale * sums
        bias = shift * (-x_scale * x_zero) if bias is None else torch.sub(bias, shift, alpha=x_scale * x_zero)
    name, limits = ("hardtanh", [0.0, 6.0]) if activation == "relu6" else (activation, [])
    dtype, scale = (torch.float32, 1.0) if out_scale == 0 else (torch.uint8, out_scale)
    x = x.contiguous(memory_format=torch.channels_last)
    common = (x, x_scale, 0, packed, weight_scale, zeros)
    if addend is None:
        y: torch.Tensor = ops.qconv_pointwise(*common, bias, *where, scale, out_zero, dtype, name, limits, "")
        return y
    if out_scale == 0 or activation == "relu6":
        y = ops.qconv_pointwise(*common, bias, *where, 1.0, 0, torch.float32, "none", [], "")
        y = y + (addend.float() - addend_zero) * addend_scale
        y = y.relu() if activation == "relu" else y.clamp(0, 6) if activation == "relu6" else y
        return y if out_scale == 0 else to_bytes(y, out_scale, out_zero)
    total = addend.clone(memory_format=torch.channels_last)  # it is written to
    tail: tuple[object, ...] = (scale, out_zero, dtype, addend_scale, addend_zero, "sum", 1.0, activation, [], "")
    y = ops.qconv2d_pointwise.binary(*common, total, bias, *where, *tail)
    return y


def _pack(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    shape: list[int],
    where: tuple[list[int], list[int], list[int], int],
) -> _Packed:
    """The weight as oneDNN wants it for inputs of `shape`, its zero points, and the sums of its rows, made once for
    each weight: other shapes may have it rearranged for each call, which is right and costs little."""
    base = weight if weight._base is None else weight._base
    if base.is_inference():  # made under inference mode: nothing tells whether it was written to since
        return _prepack(weight, weight_scale, shape, where)
    stride, padding, dilation, groups = where
    key = (id(base), weight.data_ptr(), weight.shape, *stride, *padding, *dilation, groups)
    known = _packed.get(key)
    if known is not None and known[0]() is base and known[1] == base._version:
        return known[2]
    made = _prepack(weight, weight_scale, shape, where)
    _packed[key] = (weakref.ref(base, lambda _: _packed.pop(key, None)), base._version, made)
    return made


def _prepack(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    shape: list[int],
    where: tuple[list[int], list[int], list[int], int],
) -> _Packed:
    packed: torch.Tensor = torch.ops.onednn.qconv_prepack(weight, weight_scale, 1.0, 0, *where, shape)
    sums = weight.sum(dim=(1, 2, 3), dtype=torch.int32).float()
    return packed, torch.zeros(len(weight), dtype=torch.int32), sums


def to_bytes(x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """x [N, C, H, W] float → uint8 codes clamp(round(x / scale) + zero, 0, 255), channels last."""
    if torch.compiler.is_compiling() or not x.numel():
        codes = x.div(scale).round_().add_(zero).clamp_(0, 255).to(torch.uint8)
    else:
        one = torch.tensor([scale]), torch.tensor([zero - 128], dtype=torch.int32)
        found, _, _ = quantize_rows(x.reshape(1, -1), _BYTES, None, *(part.to(x.device) for part in one))
        codes = found.view(x.shape).view(torch.uint8).bitwise_xor(128)
    return codes.contiguous(memory_format=torch.channels_last) if codes.ndim == 4 else codes


def from_bytes(x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """uint8 codes → float32, (x − zero) · scale."""
    return (x.float() - zero) * scale


def max_pool_u8(x: torch.Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> torch.Tensor:
    """Max pooling of codes [N, C, H, W], which keeps their order. Padding is the least code: it never wins alone.

    torch's max_pool2d does not take uint8, its quantized one does (3.6 times faster than nine shifted maxima), on CPUs.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        pooled: torch.Tensor = torch.ops.quantized.max_pool2d(
            x, list(kernel), list(stride), list(padding), [1, 1], False
        )
        return pooled
    (kh, kw), (sh, sw), (ph, pw) = kernel, stride, padding
    x = F.pad(x, (pw, pw, ph, ph)) if ph or pw else x
    rows, columns = (x.shape[2] - kh) // sh + 1, (x.shape[3] - kw) // sw + 1
    best: torch.Tensor | None = None
    for i in range(kh):
        for j in range(kw):
            part = x[:, :, i : i + (rows - 1) * sh + 1 : sh, j : j + (columns - 1) * sw + 1 : sw]
            best = part if best is None else torch.maximum(best, part)
    assert best is not None  # a kernel has at least one position
    return best


def _positions(
    x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Height and width of the output."""
    sizes = x.shape[2:], weight.shape[2:], stride, padding, dilation
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(*sizes, strict=True)]


def _fake(x: torch.Tensor, x_scale: float, x_zero: int, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    positions = _positions(x, weight, *rest[2:5])  # stride, padding, dilation
    dtype = torch.float32 if rest[7] == 0 else torch.uint8  # out_scale
    made = x.new_empty((x.shape[0], weight.shape[0], *positions), dtype=dtype)
    return made.to(memory_format=torch.channels_last)


def _direct(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    plain = type(x) is torch.Tensor and torch._C._len_torch_dispatch_stack() == 0
    y: torch.Tensor = _conv2d_u8(x, *rest) if plain else torch.ops.evenbits.conv2d_u8(x, *rest)
    return y


_library.impl("conv2d_u8", _conv2d_u8, "CompositeExplicitAutograd")
torch.library.register_fake("evenbits::conv2d_u8", _fake, lib=_library)


def conv2d_u8(
    x: torch.Tensor,
    x_scale: float,
    x_zero: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    activation: str = "none",
    out: tuple[float, int] | None = None,
    addend: tuple[torch.Tensor, float, int] | None = None,
) -> torch.Tensor:
    """A 2-D convolution of uint8 codes x [N, C, H, W] with int8 codes weight [O, C/g, kh, kw].

    weight_scale: float32 [O]; bias: float32 [O]; padding: symmetric, (height, width); activation: one of ACTIVATIONS.
    out: (scale, zero) of uint8 output; without it the output is float32. addend: (uint8 codes of the output's shape,
    scale, zero), added before the activation. Raises EvenbitsError for other types and shapes.
    """
    scale, zero = (0.0, 0) if out is None else out
    other, other_scale, other_zero = (None, 1.0, 0) if addend is None else addend
    # The dispatcher is for tracing; a call through it costs as much as a small convolution's arithmetic.
    run = torch.ops.evenbits.conv2d_u8 if torch.compiler.is_compiling() else _direct
    y: torch.Tensor = run(
        x, x_scale, x_zero, weight, weight_scale, bias, list(stride), list(padding), list(dilation), groups, activation,
        scale, zero, other, other_scale, other_zero,
    )  # fmt: skip
    return y
