"""What every quantized layer shares: packed weight codes, scales that stay float32, an optional input quantizer.

Buffers (tensor names are those of compressed-tensors where it has them):
    weight             int8 [O, K] for 8-bit signed codes, else packed uint8 [O, B] (numerics/packing.py)
    weight_scale       float32 [1], [O, 1] or [O, G];   weight_zero_point  as the format stores it
    bias               float [O];                       weight_sum  int32 [O], Σ codes of a row (affine activations)
    input_scale        float32 [1] if calibrated;       input_zero_point   int32 [1]
    input_multiplier   float32 [I], 1/s of a smoothing that could not be folded into the layer before
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
from evenbits.numerics.format import Format
from evenbits.numerics.packing import packed_width
from evenbits.numerics.qtensor import QTensor

_WEIGHT_BUFFERS = ("weight", "weight_scale", "weight_zero_point", "weight_sum")
_FLOAT32_BUFFERS = ("weight_scale", "input_scale", "input_multiplier")


class QuantizedLayer(nn.Module):
    """Base of QLinear and QConv2d: buffers, formats, byte counts. `weight_shape` is the float weight's."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None
    weight_sum: torch.Tensor | None
    bias: torch.Tensor | None
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None
    input_multiplier: torch.Tensor | None

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
        plain = _plain_int8(weight.format)
        self.register_buffer("weight", weight.packed.view(torch.int8) if plain else weight.packed)
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("weight_zero_point", weight.zero_point)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        needs_sum = self.input_format is not None and not self.input_format.rule.symmetric
        self.register_buffer("weight_sum", weight.codes().sum(dim=1, dtype=torch.int32) if needs_sum else None)
        self.register_buffer("input_scale", None if activation is None else activation.scale)
        self.register_buffer("input_zero_point", None if activation is None else activation.zero_point)
        self.register_buffer("input_multiplier", input_multiplier)
        self.training = False

    @classmethod
    def empty(
        cls,
        weight_shape: tuple[int, ...],
        weight_format: Format,
        input_format: Format | None,
        *,
        static: bool,
        multiplier: int,
        bias: torch.dtype | None,
        **kwargs: Any,
    ) -> QuantizedLayer:
        """A layer of the right shapes without contents (meta tensors), for loading. `multiplier`: its length, or 0."""
        rows, columns = weight_shape[0], prod(weight_shape[1:])
        shape, dtype, zero = (rows, columns), weight_format.dtype, None
        with torch.device("meta"):
            scales = weight_format.granularity.scale_shape(shape)
            if not weight_format.rule.symmetric:
                exact = weight_format.rule.zero_exact
                zero = torch.empty(scales, dtype=dtype.storage if exact else torch.int32)
            packed = torch.empty(rows, packed_width(columns, dtype.bits), dtype=torch.uint8)
            weight = QTensor(packed, torch.empty(scales), zero, weight_format, shape)
            activation = None
            if input_format is not None:
                scale = torch.empty(1) if static else None
                affine = static and not input_format.rule.symmetric
                activation = ActivationQuantizer(
                    input_format, scale, torch.empty(1, dtype=torch.int32) if affine else None
                )
            return cls(
                weight,
                weight_shape,
                None if bias is None else torch.empty(rows, dtype=bias),
                activation,
                torch.empty(multiplier) if multiplier else None,
                **kwargs,
            )

    def qweight(self) -> QTensor:
        """The weight as a QTensor of its matrix view [O, K] (shares memory with the buffers)."""
        shape = (self.weight_shape[0], prod(self.weight_shape[1:]))
        packed = self.weight.view(torch.uint8)
        return QTensor(packed, self.weight_scale, self.weight_zero_point, self.weight_format, shape)

    def weight_codes(self) -> torch.Tensor:
        """int8 codes [O, K]; the buffer itself for 8-bit weights, unpacked for narrower ones."""
        return self.weight if self.weight.dtype == torch.int8 else self.qweight().codes()

    @property
    def is_integer(self) -> bool:
        """Whether the product runs in integers (weights and activations quantized)."""
        return self.input_format is not None

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes, scales, zero points and row sums."""
        return sum(b.nbytes for name in _WEIGHT_BUFFERS if (b := getattr(self, name)) is not None)

    @property
    def float_weight_bytes(self) -> int:
        """Four bytes for every element of the weight, whatever type it was stored in."""
        return 4 * prod(self.weight_shape)

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight: codes, scales, zero points and row sums counted."""
        return 32 * self.weight_bytes / self.float_weight_bytes

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLayer:
        # `.half()` and `.to(bfloat16)` change activations, never scales: those stay float32 (and keep their values).
        kept = {name: getattr(self, name) for name in _FLOAT32_BUFFERS}
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


def _plain_int8(fmt: Format) -> bool:
    return fmt.dtype.bits == 8 and fmt.dtype.signed


def check_formats(weight: Format, activation: Format | None) -> None:
    """Raises EvenbitsError if a layer of these formats cannot be run."""
    if weight.granularity.kind == "axis":
        raise EvenbitsError(f"weights are stored by rows; {weight} has another axis. Use ':row', ':tensor' or ':gN'.")
    if activation is None:
        return
    if not (
        activation.dtype.signed and activation.dtype.bits <= 8 and activation.granularity.kind in ("row", "tensor")
    ):
        raise EvenbitsError(
            f"activations of integer layers are signed, with a scale per row (token) or tensor, such as 'int8:row' or "
            f"'int8:tensor:affine'; given {activation}."
        )
    if activation.rule.range != "minmax" or not activation.rule.zero_exact:
        raise EvenbitsError(f"activations are scaled by their min-max range with zero exact; given {activation}.")
    if not (weight.rule.symmetric and weight.dtype.signed and weight.granularity.kind in ("row", "tensor")):
        raise EvenbitsError(
            f"with quantized activations, weights are signed and symmetric with a scale per row or tensor, such as "
            f"'int8:row'; given {weight}. Leave input_activations out to store {weight} and compute in float."
        )
