"""`QConv2d`: a 2-D convolution whose weight is integer codes, computed in integers through im2col.

One activation scale per tensor (static) or per image (dynamic: a pixel's channels are spread over neighbouring outputs,
so "per token" has no meaning here). Padding writes the code of zero. The weight's matrix view is (O, C/groups · kh ·
kw).

Grouped and depthwise convolutions are short sums; they run as float32 convolutions of the integer codes, which are
exact while C/groups · kh · kw ≤ 1024, and group by group above.
N: images, C: channels, H, W: height, width, O: out channels, P: output pixels of an image, K: C/groups · kh · kw.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.errors import EvenbitsError
from evenbits.kernels.ops import int8_matmul, quantize_rows
from evenbits.kernels.torch_int8 import without_autocast
from evenbits.nn.base import QuantizedLayer
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.qtensor import QTensor

_EXACT_FLOAT32_K = 1024


class QConv2d(QuantizedLayer):
    """x [N, C, H, W] (or [C, H, W]) → [N, O, H', W']. Replaces nn.Conv2d."""

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
        if self.input_format is not None and not self.input_format.rule.symmetric:
            raise EvenbitsError(
                f"convolutions take symmetric activations, such as 'int8:row'; given {self.input_format}."
            )
        self.geometry = geometry
        self.stride, self.dilation = tuple(geometry["stride"]), tuple(geometry["dilation"])
        self.padding, self.groups = tuple(geometry["padding"]), int(geometry["groups"])
        self.padding_mode = str(geometry["padding_mode"])

    @staticmethod
    def geometry_of(conv: nn.Conv2d) -> dict[str, Any]:
        """Stride, dilation, groups and explicit padding [left, right, top, bottom] of a float convolution."""
        return {
            "stride": list(conv.stride),
            "dilation": list(conv.dilation),
            "groups": conv.groups,
            # torch keeps the padding of every mode, "same" and "valid" included, in the order of F.pad.
            "padding": list(conv._reversed_padding_repeated_twice),
            "padding_mode": conv.padding_mode,
        }

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # nn.Conv2d's word: it may be called by keyword
        x = self.checked(input)
        if x.ndim == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if not self.is_integer or self.input_format is None:
            x = self.quantized_input(x)
            weight = self.qweight().dequantize(x.dtype).view(self.weight_shape)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.conv2d(self._pad(x), weight, bias, self.stride, 0, self.dilation, self.groups)
        codes_NK, scale_N1, _ = quantize_rows(
            self.balanced_input(x).flatten(1), self.input_format, scale=self.input_scale
        )
        product_NOHW = self._integer_conv(self._pad(codes_NK.view(x.shape)))
        y = product_NOHW.float() * (scale_N1 * self.weight_scales().reshape(1, -1))[:, :, None, None]
        return (y if self.bias is None else y + self.bias.view(1, -1, 1, 1)).to(x.dtype)

    def balanced_input(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, C, H, W] times the multiplier of its channels, in float32, if there is one."""
        return x if self.input_multiplier is None else x.float() * self.input_multiplier.view(1, -1, 1, 1)

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input as its format has it (each image one row), in x's type."""
        images = self.balanced_input(x)
        if self.input_format is None:
            return images.to(x.dtype)
        rounded = fake_quantize(images.flatten(1), self.input_format, scale=self.input_scale)
        return rounded.view(x.shape).to(x.dtype)

    def _pad(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        if not any(self.padding):
            return x_NCHW
        if self.padding_mode == "zeros":
            return nn.functional.pad(x_NCHW, self.padding)
        # The other modes copy pixels; torch has them for floats only, and float32 holds every code.
        floats = x_NCHW if x_NCHW.dtype == torch.float64 else x_NCHW.float()
        padded = nn.functional.pad(floats, self.padding, mode=self.padding_mode)
        return padded.to(x_NCHW.dtype)

    def _integer_conv(self, codes_NCHW: torch.Tensor) -> torch.Tensor:
        """Exact int32 [N, O, H', W'] of int8 codes that are padded already."""
        weight_OK = self.weight_codes()
        if self.groups > 1 and weight_OK.shape[1] <= _EXACT_FLOAT32_K:
            weight = weight_OK.view(self.weight_shape).float()
            with without_autocast(weight.device):
                codes = codes_NCHW.float()
                exact = nn.functional.conv2d(codes, weight, None, self.stride, 0, self.dilation, self.groups)
            return exact.round_().to(torch.int32)  # rounded: a Winograd backend is off by far less than 0.5
        parts = zip(codes_NCHW.chunk(self.groups, dim=1), weight_OK.chunk(self.groups, dim=0), strict=True)
        return torch.cat([self._im2col_product(codes, weight) for codes, weight in parts], dim=1)

    def _im2col_product(self, codes_NCHW: torch.Tensor, weight_OK: torch.Tensor) -> torch.Tensor:
        (kh, kw), (dh, dw) = self.weight_shape[2:], self.dilation
        windows = codes_NCHW.unfold(2, dh * (kh - 1) + 1, self.stride[0]).unfold(3, dw * (kw - 1) + 1, self.stride[1])
        windows = windows[..., ::dh, ::dw]  # [N, C, H', W', kh, kw]
        images, _, height, width = windows.shape[:4]
        rows, columns = weight_OK.shape
        columns_PK = windows.permute(0, 2, 3, 1, 4, 5).reshape(images * height * width, columns)
        product_PO = int8_matmul(columns_PK, weight_OK)
        return product_PO.view(images, height, width, rows).permute(0, 3, 1, 2)
