"""`QLinear`: a linear layer whose weight is integer codes.

With quantized activations the product runs in integers (kernels/ops.py); packed 4-bit weights are decoded inside it,
a piece at a time. Without (weight-only), and for values that are no integers (NormalFloat), packed 4-bit weights meet
float activations, again from their bytes (`is_streamed`). What is left is decoded whole for each call and multiplied in
float, which saves bytes and takes time: zero points, other widths, activations in float64, and inputs that want a
gradient.
On a GPU with FP8 products activations of `fp8:row` and packed 4-bit weights are multiplied as they are (`is_fp8`);
elsewhere they are float numbers like any others.
"""

from __future__ import annotations

import torch
from torch import nn

from evenbits.kernels import pair_fp8
from evenbits.kernels.ops import linear_pair, linear_pair_float, linear_pair_fp8
from evenbits.kernels.pair_codes import e4m3_codes, float_codes, pair_codes
from evenbits.nn.base import QuantizedLayer


class QLinear(QuantizedLayer):
    """x [..., I] → [..., O]. Replaces nn.Linear and Hugging Face's Conv1D (whose weight is [I, O]).

    is_packed: the product runs in integers from packed 4-bit weights, in groups too (kernels/pair_codes.py).
    is_streamed: float activations are multiplied with packed 4-bit bytes (kernels/weight_only.py).
    is_fp8: E4M3 activations would be, where there is a kernel (kernels/pair_fp8.py).
    """

    is_packed: bool
    is_streamed: bool
    is_fp8: bool

    @property
    def in_features(self) -> int:
        return self.weight_shape[1]

    @property
    def out_features(self) -> int:
        return self.weight_shape[0]

    def arranged(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] in the order of the weight's columns, where that is another."""
        return x if self.input_permutation is None else x.index_select(-1, self.input_permutation.int())

    def choose_product(self) -> None:
        super().choose_product()
        codes, activation = pair_codes(self.weight_format, self.in_features), self.input_format
        packed = codes is not None and activation is not None and self.integer_input
        self.is_packed = packed and not (codes.group and not activation.rule.symmetric)  # type: ignore[union-attr]
        self.is_integer = self.is_integer or self.is_packed
        streamed = not isinstance(float_codes(self.weight_format, self.in_features), str)
        self.is_streamed = streamed and not self.is_integer
        exact = not isinstance(e4m3_codes(self.weight_format, self.in_features), str)
        self.is_fp8 = exact and str(activation) in pair_fp8.ACTIVATIONS

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # nn.Linear's word: it may be called by keyword
        x = self.arranged(self.checked(input))
        if not self.is_integer or self.input_format is None:
            return self._float_product(x)
        if self.is_packed:
            return linear_pair(
                x,
                self.weight,
                self.weight_scale,
                self.weight_format,
                self.bias,
                self.input_format,
                global_scale=self.weight_global_scale,
                multiplier=self.input_multiplier,
                scale=self.input_scale,
                zero_point=self.input_zero_point,
                weight_sum=self.weight_sum,
            )
        return self.by_rows(x)

    def _float_product(self, x: torch.Tensor) -> torch.Tensor:
        learns = torch.is_grad_enabled() and x.requires_grad
        if x.dtype == torch.float64 or learns or not self.is_streamed:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(self.quantized_input(x), self.qweight().dequantize(x.dtype), bias)
        plain = self.input_format is None
        if self.is_fp8 and self.input_scale is None and pair_fp8.is_served(x.device.type):
            return linear_pair_fp8(
                x,
                self.weight,
                self.weight_scale,
                self.weight_format,
                self.bias,
                global_scale=self.weight_global_scale,
                multiplier=self.input_multiplier,
            )
        return linear_pair_float(
            x if plain else self.quantized_input(x),
            self.weight,
            self.weight_scale,
            self.weight_format,
            self.bias,
            global_scale=self.weight_global_scale,
            multiplier=self.input_multiplier if plain else None,
        )
