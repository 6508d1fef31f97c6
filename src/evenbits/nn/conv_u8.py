"""`U8Conv2d`: a quantized convolution inside a chain of bytes. Made from a QConv2d, never stored.

Signed codes of the QConv2d's input become unsigned by adding 128 to codes and zero point, which changes no product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from evenbits.kernels.conv_u8 import conv2d_u8
from evenbits.nn.conv import QConv2d


class Grid(NamedTuple):
    """The uint8 codes of a tensor: value = (code − zero) · scale."""

    scale: float
    zero: int


def input_grid(layer: QConv2d) -> Grid | None:
    """The grid of a layer's static input, or None if it has none that fits a byte chain."""
    fmt, scale = layer.input_format, layer.input_scale
    if fmt is None or scale is None or fmt.dtype.bits != 8 or not layer.is_integer:
        return None
    zero = 0 if layer.input_zero_point is None else int(layer.input_zero_point)
    return Grid(float(scale), zero + (128 if fmt.integer.signed else 0))


class U8Conv2d(nn.Module):
    """x uint8 [N, C, H, W] (and an addend's codes) → uint8, or float32 if `out` is None.

    layer: a static QConv2d; grid: of its input, multiplied by the layer's multiplier, with the layer's scale;
    activation: none, relu or relu6; out, addend: grids. multiplier: float32 [O], positive, of the output behind the
    activation (then there is `out` and no addend): it goes into the weight's scales, and behind relu6, whose bound
    then differs by channel, into a largest code for each (exact: rounding keeps the order).
    """

    def __init__(
        self,
        layer: QConv2d,
        grid: Grid,
        activation: str,
        out: Grid | None,
        addend: Grid | None,
        multiplier: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.out, self.addend, self.activation = grid, out, addend, activation
        codes = layer.weight_codes().view(layer.weight_shape).contiguous()
        scales = layer.weight_scales().reshape(-1).expand(codes.shape[0]).contiguous().float()
        bias, limit = None if layer.bias is None else layer.bias.float(), None
        if multiplier is not None and out is not None:
            scales, bias = scales * multiplier, None if bias is None else bias * multiplier
            if activation == "relu6":
                self.activation = "relu"
                codes_O = (6 * multiplier / out.scale).round_().add_(out.zero).clamp_(0, 255).to(torch.uint8)
                limit = None if bool((codes_O == 255).all()) else codes_O.view(1, -1, 1, 1)
        self.register_buffer("weight", codes, persistent=False)
        self.register_buffer("weight_scale", scales, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("limit", limit, persistent=False)
        left, right, top, bottom = layer.padding
        self.symmetric = left == right and top == bottom
        self.padding = (top, left) if self.symmetric else (0, 0)
        self.explicit = layer.padding
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        self.training = False

    def forward(self, x: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        if not self.symmetric:  # the code of zero is what padding stands for
            x = nn.functional.pad(x, self.explicit, value=self.grid.zero)
        y = conv2d_u8(
            x,
            *self.grid,
            self.get_buffer("weight"),
            self.get_buffer("weight_scale"),
            self._buffers["bias"],
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            activation=self.activation,
            out=self.out,
            addend=None if addend is None or self.addend is None else (addend, *self.addend),
        )
        limit = self._buffers["limit"]
        return y if limit is None else torch.minimum(y, limit)


class PerChannel(nn.Module):
    """x [N, C, H, W] float times `factor` [C]."""

    def __init__(self, factor: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor.float().view(1, -1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.get_buffer("factor")
