"""Convolutions whose weight is integer codes: 1-D, 2-D and 3-D, grouped, depthwise and transposed, in exact integers.

One activation scale per tensor (static) or per image (dynamic: a pixel's channels are spread over neighbouring outputs,
so "per token" has no meaning here). Padding writes the code of zero. The weight's matrix view is (O, C/groups · k), out
first for transposed convolutions, too.

Plain convolutions are matrix products of integers over im2col windows. Grouped, depthwise and transposed ones are sums
too short for that; they run as float32 convolutions of the integer codes, in slices of at most 1024 products a sum,
which float32 holds exactly.

Memory formats: dense channels last in, channels last out; anything else in, contiguous out, which a model may `view`.
In channels last a 1 × 1 convolution with a static scale is the fused linear kernel on its pixels, without a copy if
it reads all of them.
N: images, C: channels, k: kernel positions, O: out channels, P: output pixels of an image, K: C/groups · k.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.errors import EvenbitsError
from evenbits.kernels.conv_u8 import conv2d_u8, report_conv
from evenbits.kernels.ops import int8_matmul, quantize_rows
from evenbits.kernels.torch_int8 import without_autocast
from evenbits.nn.base import QuantizedLayer
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.format import Format
from evenbits.numerics.qdtypes import QDtype
from evenbits.numerics.qtensor import QTensor

_EXACT_FLOAT32_K = 1024


class QConv(QuantizedLayer):
    """x [N, C, …] (or [C, …]) → [N, O, …]. Base of the classes below, which say how many dimensions there are."""

    replaces: ClassVar[type[nn.Module]]
    spatial: ClassVar[int]
    convolve: ClassVar[Callable[..., torch.Tensor]]

    def __init__(
        self,
        weight: QTensor,
        weight_shape: tuple[int, ...],
        bias: torch.Tensor | None,
        activation: ActivationQuantizer | None,
        input_multiplier: torch.Tensor | None = None,
        *,
        geometry: dict[str, Any],
    ) -> None:
        super().__init__(weight, weight_shape, bias, activation, input_multiplier)
        affine = self.input_format is not None and not self.input_format.rule.symmetric
        if affine and (self.input_zero_point is None or isinstance(self, QConvTranspose)):
            raise EvenbitsError(
                "convolutions take symmetric activations, such as 'int8:row', or static affine ones ('int8:tensor:"
                f"affine', dynamic: false; transposed ones only the former); given {self.input_format}."
            )
        self.geometry = geometry
        self.stride, self.dilation = tuple(geometry["stride"]), tuple(geometry["dilation"])
        self.padding, self.groups = tuple(geometry["padding"]), int(geometry["groups"])
        self.padding_mode = str(geometry["padding_mode"])

    @staticmethod
    def geometry_of(conv: nn.Module) -> dict[str, Any]:
        """Stride, dilation, groups and padding of a float convolution: explicit (left, right, top, …) for a plain one;
        for a transposed one as it has it, with its output padding."""
        transposed = isinstance(conv, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        # torch keeps the padding of every mode, "same" and "valid" included, in the order of F.pad.
        padding: Any = conv.padding if transposed else conv._reversed_padding_repeated_twice
        geometry: dict[str, Any] = {
            "stride": list(conv.stride),  # type: ignore[arg-type]
            "dilation": list(conv.dilation),  # type: ignore[arg-type]
            "groups": conv.groups,
            "padding": list(padding),
            "padding_mode": conv.padding_mode,
        }
        return {**geometry, "output_padding": list(conv.output_padding)} if transposed else geometry  # type: ignore[arg-type]

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # nn.Conv2d's word: it may be called by keyword
        x = self.checked(input)
        if x.ndim == self.spatial + 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        last = channels_last(x)
        if not self.is_integer or self.input_format is None:
            x = self.quantized_input(x)
            y = self._float(x, self.qweight().dequantize(x.dtype), None if self.bias is None else self.bias.to(x))
        elif last and self._is_pointwise:
            y = self._by_pixels(x)
        else:
            y = self._by_images(x, self.input_format, last)
        return y if last and self.spatial > 1 else y.contiguous()

    def _by_images(self, x: torch.Tensor, fmt: Format, last: bool) -> torch.Tensor:
        """In integers, each image one row; last: x is in channels last, and so is the result."""
        static = {"scale": self.input_scale, "zero_point": self.input_zero_point}
        codes_NK, scale_N1, _ = quantize_rows(_flat(self.balanced_input(x), last), fmt, **static)
        ones = (1,) * self.spatial
        scales = scale_N1 * self.weight_scales().reshape(1, -1)  # [N, O], or [N, 1]
        y = self._sums(_unflat(codes_NK, x, last)) * scales.view(*scales.shape, *ones)
        return (y if self.bias is None else y + self.bias.view(1, -1, *ones)).to(x.dtype)

    @property
    def _is_pointwise(self) -> bool:
        """Whether one scale serves all pixels and each output sees one: what a linear layer does to rows."""
        static = self.input_scale is not None and self.input_scale.numel() == 1
        whole = self.groups == 1 and prod(self.weight_shape[2:]) == 1 and not any(self.padding)
        return static and whole and not isinstance(self, QConvTranspose)

    def _by_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """A pointwise convolution in channels last, by the fused linear kernel: each pixel is a row."""
        kept = (slice(None), slice(None), *(slice(None, None, step) for step in self.stride))
        x = x[kept] if max(self.stride) > 1 else x
        return self.by_rows(x.movedim(1, -1)).movedim(-1, 1)

    def balanced_input(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, C, …] times the multiplier of its channels, in float32, if there is one."""
        if self.input_multiplier is None:
            return x
        return x.float() * self.input_multiplier.view(1, -1, *(1,) * self.spatial)

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input as its format has it (each image one row), in x's type."""
        images = self.balanced_input(x)
        if self.input_format is None:
            return images.to(x.dtype)
        static = {"scale": self.input_scale, "zero_point": self.input_zero_point}
        fmt, last = self.input_format, channels_last(x)
        # Groups and pairs are neighbours in the order of channels, whatever the memory format.
        alone = isinstance(fmt.dtype, QDtype) and fmt.granularity.kind in ("row", "tensor")
        rounded = _unflat(fake_quantize(_flat(images, last and alone), fmt, **static), x, last and alone).to(x.dtype)
        return rounded.movedim(1, -1).contiguous().movedim(-1, 1) if last and not alone else rounded

    def _float(self, x: torch.Tensor, weight_OK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight = weight_OK.view(self.weight_shape)
        return type(self).convolve(self._pad(x), weight, bias, self.stride, 0, self.dilation, self.groups)

    def _pad(self, x: torch.Tensor, zero: int = 0) -> torch.Tensor:
        if not any(self.padding):
            return x
        if self.padding_mode == "zeros":
            return F.pad(x, self.padding, value=zero)
        # The other modes copy pixels; torch has them for floats only, and float32 holds every code.
        floats = x if x.dtype == torch.float64 else x.float()
        return F.pad(floats, self.padding, mode=self.padding_mode).to(x.dtype)

    def _sums(self, codes: torch.Tensor) -> torch.Tensor:
        """Σ(code − zero point)·weight of int8 codes, exact and then rounded to float32 [N, O, …]."""
        product_NO = self._integer(codes)
        if self.input_zero_point is not None and self.weight_sum is not None:
            product_NO = product_NO.int() - (self.input_zero_point * self.weight_sum).view(1, -1, *(1,) * self.spatial)
        return product_NO.float()

    def _integer(self, codes: torch.Tensor) -> torch.Tensor:
        """Exact sums [N, O, …] of int8 codes, whole numbers in int32 or float32."""
        weight_OK = self.weight_codes()
        codes = self._pad(codes, 0 if self.input_zero_point is None else int(self.input_zero_point))
        if self.groups > 1 and weight_OK.shape[1] <= _EXACT_FLOAT32_K:
            weight = weight_OK.view(self.weight_shape).float()
            where = (self.stride, 0, self.dilation, self.groups)
            return exact(lambda: type(self).convolve(codes.float(), weight, None, *where), codes.device)
        parts = zip(codes.chunk(self.groups, dim=1), weight_OK.chunk(self.groups, dim=0), strict=True)
        return torch.cat([self._im2col_product(part, weight) for part, weight in parts], dim=1)

    def _im2col_product(self, codes: torch.Tensor, weight_OK: torch.Tensor) -> torch.Tensor:
        n, windows = self.spatial, codes
        for axis, (size, step, apart) in enumerate(zip(self.weight_shape[2:], self.stride, self.dilation, strict=True)):
            windows = windows.unfold(2 + axis, apart * (size - 1) + 1, step)[..., ::apart]
        shape = (codes.shape[0], *windows.shape[2 : 2 + n])  # of [N, C, output pixels…, kernel positions…]
        order = (0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))
        columns_PK = windows.permute(order).reshape(prod(shape), weight_OK.shape[1])
        product_PO = int8_matmul(columns_PK, weight_OK)
        return product_PO.view(*shape, len(weight_OK)).movedim(-1, 1)


def channels_last(x: torch.Tensor) -> bool:
    """Whether x [N, C, …] lies in memory pixel by pixel (and not also channel by channel)."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _flat(x: torch.Tensor, last: bool) -> torch.Tensor:
    """x [N, C, …] → [N, all of it], in the order of memory if `last`: a view then."""
    return (x.movedim(1, -1) if last else x).flatten(1)


def _unflat(flat: torch.Tensor, x: torch.Tensor, last: bool) -> torch.Tensor:
    """`_flat` undone: x's shape."""
    return flat.view(x.movedim(1, -1).shape).movedim(-1, 1) if last else flat.view(x.shape)


class QConvTranspose(QConv):
    """Transposed convolutions; `weight_shape` is out first, [O, C/groups, k…]."""

    def __init__(self, *args: Any, geometry: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, geometry=geometry, **kwargs)
        self.output_padding = tuple(geometry["output_padding"])

    def _float(self, x: torch.Tensor, weight_OK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._transposed(x, self._stored(weight_OK, self.groups), bias, self.groups)

    def _transposed(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int
    ) -> torch.Tensor:
        where = (self.stride, self.padding, self.output_padding, groups, self.dilation)
        return type(self).convolve(x, weight, bias, *where)

    def _stored(self, weight_OK: torch.Tensor, groups: int) -> torch.Tensor:
        """Rows of outputs as torch stores them: [C, O/groups, k…]."""
        kernel = self.weight_shape[2:]
        parts = weight_OK.reshape(groups, len(weight_OK) // groups, -1, *kernel).transpose(1, 2)
        return parts.reshape(-1, len(weight_OK) // groups, *kernel)

    def _integer(self, codes: torch.Tensor) -> torch.Tensor:
        weight_OK, positions = self.weight_codes(), prod(self.weight_shape[2:])
        if weight_OK.shape[1] <= _EXACT_FLOAT32_K:
            return exact(lambda: self._float(codes.float(), weight_OK.float(), None), codes.device)
        step = max(1, _EXACT_FLOAT32_K // positions)
        parts = zip(codes.chunk(self.groups, dim=1), weight_OK.chunk(self.groups, dim=0), strict=True)
        return torch.cat([self._sliced(part, weight, step) for part, weight in parts], dim=1)

    def _sliced(self, codes: torch.Tensor, weight_OK: torch.Tensor, step: int) -> torch.Tensor:
        weight = self._stored(weight_OK, 1).float()
        slices = [
            exact(lambda x=x, w=w: self._transposed(x.float(), w, None, 1), codes.device)  # type: ignore[misc]
            for x, w in zip(codes.split(step, dim=1), weight.split(step, dim=0), strict=True)
        ]
        return torch.stack(slices).sum(dim=0, dtype=torch.int32)


def exact(convolution: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """A float32 convolution of integer codes. Rounded, for backends that do not sum products directly."""
    with without_autocast(device):
        return convolution().round_()


class QConv1d(QConv):
    """Replaces nn.Conv1d."""

    replaces, spatial, convolve = nn.Conv1d, 1, staticmethod(F.conv1d)


class QConv2d(QConv):
    """Replaces nn.Conv2d."""

    replaces, spatial, convolve = nn.Conv2d, 2, staticmethod(F.conv2d)

    @property
    def takes_bytes(self) -> bool:
        """Whether sums run in byte products: not those of groups whose sums float32 cannot hold in one piece."""
        return self.groups == 1 or len(self._pieces()) == 1

    def _sums(self, codes: torch.Tensor) -> torch.Tensor:
        if report_conv(codes.device.type)[0] != "onednn" or not self.takes_bytes:
            return super()._sums(codes)
        pieces = self._pieces()
        zero = 0 if self.input_zero_point is None else int(self.input_zero_point)
        shifted = self._pad(codes, zero).view(torch.uint8).bitwise_xor(128)  # + 128, as uint8
        if len(pieces) == 1:
            return self._bytes_product(shifted, pieces[0], zero)
        parts = zip(shifted.split(pieces[0].shape[1], dim=1), pieces, strict=True)
        sums = [self._bytes_product(x, w, zero).int() for x, w in parts]
        return torch.stack(sums).sum(dim=0, dtype=torch.int32).float()

    def _bytes_product(self, x: torch.Tensor, weight: torch.Tensor, zero: int) -> torch.Tensor:
        one = torch.ones(len(weight))
        where = (self.stride, (0, 0), self.dilation, self.groups)
        return conv2d_u8(x, 1.0, zero + 128, weight, one, None, *where)

    def _pieces(self) -> list[torch.Tensor]:
        """`_split` of the weight's codes, kept until the weight changes: torch's kernels rearrange each piece once."""
        if torch.compiler.is_compiling() or self.weight.is_inference():
            return _split(self.weight_codes().view(self.weight_shape))
        version = (self.weight.data_ptr(), self.weight._version)
        known = _PIECES.get(self)
        if known is None or known[0] != version:
            known = _PIECES[self] = version, _split(self.weight_codes().view(self.weight_shape))
        return known[1]


_PIECES: WeakKeyDictionary[QConv2d, tuple[tuple[int, int], list[torch.Tensor]]] = WeakKeyDictionary()


def _split(weight: torch.Tensor) -> list[torch.Tensor]:
    """int8 [O, C, h, w] in pieces of input channels so small that sums over uint8 inputs are exact in float32.

    In one piece, Σ x·w lies between its negative and its positive part, and so does what the zero point takes off it:
    both are whole numbers below 2²⁴, and their sum is rounded once. Sums of several pieces are to be whole themselves.
    """
    sums = torch.stack([weight.clamp(min=0), weight.clamp(max=0).abs()]).sum(dim=(2, 3, 4), dtype=torch.int64)
    if 255 * int(sums.amax()) < 2**24:
        return [weight.contiguous()]
    count = -(-255 * int(sums.sum(dim=0).amax()) // 2**24)
    return [piece.contiguous() for piece in weight.split(-(-weight.shape[1] // (2 * count)), dim=1)]


class QConv3d(QConv):
    """Replaces nn.Conv3d."""

    replaces, spatial, convolve = nn.Conv3d, 3, staticmethod(F.conv3d)


class QConvTranspose1d(QConvTranspose):
    """Replaces nn.ConvTranspose1d."""

    replaces, spatial, convolve = nn.ConvTranspose1d, 1, staticmethod(F.conv_transpose1d)


class QConvTranspose2d(QConvTranspose):
    """Replaces nn.ConvTranspose2d."""

    replaces, spatial, convolve = nn.ConvTranspose2d, 2, staticmethod(F.conv_transpose2d)


class QConvTranspose3d(QConvTranspose):
    """Replaces nn.ConvTranspose3d."""

    replaces, spatial, convolve = nn.ConvTranspose3d, 3, staticmethod(F.conv_transpose3d)


CONVOLUTIONS: dict[str, type[QConv]] = {
    quantized.replaces.__name__: quantized
    for quantized in (QConv1d, QConv2d, QConv3d, QConvTranspose1d, QConvTranspose2d, QConvTranspose3d)
}
