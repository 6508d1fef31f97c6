"""What every quantized layer shares: packed weight codes, scales that stay float32, an optional input quantizer.

Buffers (tensor names are those of compressed-tensors where it has them):
    weight             int8 [O, K] for 8-bit signed codes, else packed uint8 [O, B]
    weight_scale       [1], [O, 1] or [O, G], weight_zero_point, weight_global_scale, weight_kinds: as in QTensor
    bias               float [O];                       weight_sum  int32 [O], Σ codes of a row (affine activations)
    input_scale        float32 [1] if calibrated;       input_zero_point   int32 [1]
    input_multiplier   float32 [I], 1/s of a smoothing that could not be folded into the layer before
    input_permutation  int16 [I] (int32 from 32768 channels), order of the weight's columns if it could not be folded
O: out, I: in, K: columns of the weight's matrix view (I, or I·kh·kw / groups), G: groups, B: bytes per row.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.errors import EvenbitsError
from evenbits.kernels.ops import linear_w8a8
from evenbits.kernels.pair_codes import pair_codes
from evenbits.numerics.elements import fits_int8
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.format import Format
from evenbits.numerics.qdtypes import QDtype
from evenbits.numerics.qtensor import QTensor

# What is stored to say what the weight does to an input, and so counts in its true bits; the bias is float either way.
WEIGHT_BUFFERS = (
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    "weight_kinds",
    "weight_sum",
    "input_multiplier",
    "input_permutation",
)
_SCALE_BUFFERS = ("weight_scale", "weight_global_scale", "input_scale", "input_multiplier")


class QuantizedLayer(nn.Module):
    """Base of QLinear and QConv: buffers, formats, byte counts. `weight_shape` is the float weight's."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None
    weight_global_scale: torch.Tensor | None
    weight_kinds: torch.Tensor | None
    weight_sum: torch.Tensor | None
    bias: torch.Tensor | None
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None
    input_multiplier: torch.Tensor | None
    input_permutation: torch.Tensor | None
    is_integer: bool  # whether the product runs in integers

    def __init__(
        self,
        weight: QTensor,
        weight_shape: tuple[int, ...],
        bias: torch.Tensor | None,
        activation: ActivationQuantizer | None,
        input_multiplier: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight_format = weight.format
        self.weight_shape = tuple(weight_shape)
        self.input_format = None if activation is None else activation.format
        check_formats(self.weight_format, self.input_format)
        self.choose_product()
        needs_sum = self.is_integer and self.input_format is not None and not self.input_format.rule.symmetric
        buffers = {
            "weight": weight.packed.view(torch.int8) if _plain_int8(weight.format) else weight.packed,
            "weight_scale": weight.scale,
            "weight_zero_point": weight.zero_point,
            "weight_global_scale": weight.global_scale,
            "weight_kinds": weight.kinds,
            "bias": None if bias is None else bias.detach().clone(),
            "weight_sum": _row_sums(weight) if needs_sum else None,
            "input_scale": None if activation is None else activation.scale,
            "input_zero_point": None if activation is None else activation.zero_point,
            "input_multiplier": input_multiplier,
            "input_permutation": None,
        }
        # Those that are there first: torch.export (2.13) pairs buffers with inputs by position and counts absent ones.
        for name in sorted(buffers, key=lambda name: buffers[name] is None):
            self.register_buffer(name, buffers[name])
        self.training = False

    @classmethod
    def empty(
        cls,
        weight_shape: tuple[int, ...],
        weight_format: Format,
        input_format: Format | None,
        *,
        static: bool,
        global_scale: bool,
        multiplier: int,
        permutation: int = 0,
        bias: torch.dtype | None,
        **kwargs: Any,
    ) -> QuantizedLayer:
        """A layer of the right shapes without contents (meta tensors), for loading.

        multiplier, permutation: lengths of these buffers, 0 if there are none.
        """
        shape = (weight_shape[0], prod(weight_shape[1:]))
        with torch.device("meta"):
            weight = QTensor.empty(weight_format, shape, global_scale=global_scale)
            activation = None
            if input_format is not None:
                scale = torch.empty(1) if static else None
                affine = static and not input_format.rule.symmetric
                activation = ActivationQuantizer(
                    input_format, scale, torch.empty(1, dtype=torch.int32) if affine else None
                )
            layer = cls(
                weight,
                weight_shape,
                None if bias is None else torch.empty(shape[0], dtype=bias),
                activation,
                torch.empty(multiplier) if multiplier else None,
                **kwargs,
            )
            if permutation:
                layer.input_permutation = torch.empty(permutation, dtype=index_type(permutation))
            return layer

    def qweight(self) -> QTensor:
        """The weight as a QTensor of its matrix view [O, K] (shares memory with the buffers)."""
        shape = (self.weight_shape[0], prod(self.weight_shape[1:]))
        return QTensor(
            packed=self.weight.view(torch.uint8),
            scale=self.weight_scale,
            zero_point=self.weight_zero_point,
            format=self.weight_format,
            shape=shape,
            global_scale=self.weight_global_scale,
            kinds=self.weight_kinds,
        )

    def weight_codes(self) -> torch.Tensor:
        """The weight's values as int8 [O, K]: the buffer itself for 8-bit weights, unpacked for narrower ones."""
        return self.weight if self.weight.dtype == torch.int8 else self.qweight().values().to(torch.int8)

    def weight_scales(self) -> torch.Tensor:
        """The weight's scales as float32."""
        return self.weight_scale if self.weight_scale.dtype == torch.float32 else self.qweight().scales()

    def choose_product(self) -> None:
        """Decides by the formats how the product runs: in integers with int8 activations and weights whose values are
        int8, one scale a row. Once, when the layer is made: torch.compile cannot trace properties that call others of
        the same name."""
        weight = self.weight_format
        by_rows = weight.granularity.kind in ("row", "tensor") and weight.rule.symmetric
        self.is_integer = self.integer_input and by_rows and fits_int8(weight.dtype)

    def by_rows(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] → [..., O] by the fused linear kernel, from int8 codes of the weight [O, I] (`is_integer`)."""
        assert self.input_format is not None
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

    @property
    def integer_input(self) -> bool:
        """Whether activations are signed integers of at most 8 bits with one scale a row or tensor."""
        activation = self.input_format
        if activation is None or not isinstance(activation.dtype, QDtype) or not activation.dtype.signed:
            return False
        plain = activation.rule.range == "minmax" and activation.rule.zero_exact
        return plain and activation.granularity.kind in ("row", "tensor")

    @staticmethod
    def checked(x: torch.Tensor) -> torch.Tensor:
        """x, or EvenbitsError if it is not floating-point: some models cast inputs to the type of a layer's weight."""
        if not x.is_floating_point():
            raise EvenbitsError(
                f"a quantized layer was given {x.dtype}: the model casts its input to the type of the layer's weight, "
                "which is integer now. Keep this layer in float (ignore), or pass calibration data so that it is found."
            )
        return x

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] times the multiplier, if there is one, and as the input format has it; in x's type."""
        balanced = x if self.input_multiplier is None else x.float() * self.input_multiplier
        if self.input_format is None:
            return balanced.to(x.dtype)
        scale, zero_point = self.input_scale, self.input_zero_point
        return fake_quantize(balanced, self.input_format, scale=scale, zero_point=zero_point).to(x.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes, scales, zero points and row sums, and of a smoothing or an order of channels not folded."""
        return sum(b.nbytes for name in WEIGHT_BUFFERS if (b := getattr(self, name)) is not None)

    @property
    def float_weight_bytes(self) -> int:
        """Four bytes for every element of the weight, whatever type it was stored in."""
        return 4 * prod(self.weight_shape)

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight: everything of `weight_bytes` counted."""
        return 32 * self.weight_bytes / self.float_weight_bytes

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLayer:
        # `.half()` and `.to(bfloat16)` change activations, never scales: those stay float32 (and keep their values).
        kept = {name: getattr(self, name) for name in _SCALE_BUFFERS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        shape = "×".join(map(str, self.weight_shape))
        return (
            f"{shape}, weight={self.weight_format}, input={self.input_format or 'float'}, bias={self.bias is not None}"
        )


def index_type(count: int) -> torch.dtype:
    """The narrowest type that an order of `count` channels is stored in."""
    return torch.int16 if count <= 1 << 15 else torch.int32


def _row_sums(weight: QTensor) -> torch.Tensor:
    """Σ of each row's integers (FP4's are halves), int32 [O]."""
    codes = pair_codes(weight.format, weight.shape[1])
    return (weight.values() / (1.0 if codes is None else codes.unit)).to(torch.int32).sum(1, dtype=torch.int32)


def _plain_int8(fmt: Format) -> bool:
    return isinstance(fmt.dtype, QDtype) and fmt.dtype.bits == 8 and fmt.dtype.signed


def check_formats(weight: Format, activation: Format | None) -> None:
    """Raises EvenbitsError if a layer of these formats cannot be run."""
    if weight.granularity.kind == "axis":
        raise EvenbitsError(f"weights are stored by rows; {weight} has another axis. Use ':row', ':tensor' or ':gN'.")
    if activation is not None and activation.granularity.kind == "axis":
        raise EvenbitsError(
            f"activations are quantized by tokens; {activation} has another axis. Use ':row' or ':tensor'."
        )
