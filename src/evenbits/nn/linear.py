"""`QLinear`: a linear layer whose weight is integer codes.

With quantized activations the product runs in integers (kernels/ops.py); packed 4-bit weights are decoded inside it,
a piece at a time. Without (weight-only), and for values that are no integers (NormalFloat), the weight is decoded for
each call and the product runs in float: bytes are saved, time is not; `is_integer` says which.
"""

from __future__ import annotations

import torch
from torch import nn

from evenbits.kernels.ops import linear_pair, linear_w8a8
from evenbits.kernels.pair_codes import pair_codes
from evenbits.nn.base import QuantizedLayer


class QLinear(QuantizedLayer):
    """x [..., I] → [..., O]. Replaces nn.Linear and Hugging Face's Conv1D (whose weight is [I, O])."""

    @property
    def in_features(self) -> int:
        return self.weight_shape[1]

    @property
    def out_features(self) -> int:
        return self.weight_shape[0]

    def arranged(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] in the order of the weight's columns, where that is another."""
        return x if self.input_permutation is None else x.index_select(-1, self.input_permutation)

    @property
    def is_packed(self) -> bool:
        """Whether the product runs in integers from packed 4-bit weights, in groups too (kernels/pair_codes.py)."""
        codes, activation = pair_codes(self.weight_format, self.in_features), self.input_format
        if codes is None or activation is None or not self.integer_input:
            return False
        return not codes.group or activation.rule.symmetric

    @property
    def is_integer(self) -> bool:
        """Whether the product runs in integers."""
        return self.is_packed or super().is_integer

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # nn.Linear's word: it may be called by keyword
        x = self.arranged(self.checked(input))
        if not self.is_integer or self.input_format is None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(self.quantized_input(x), self.qweight().dequantize(x.dtype), bias)
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
        return linear_w8a8(
            x,
            self.weight_codes(),
            self.weight_scales(),
            self.bias,
            self.input_format,
            multiplier=self.input_multiplier,
            scale=self.input_scale,
            zero_point=self.input_zero_point,
            weight_sum=self.weight_sum,
        )
