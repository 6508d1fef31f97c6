"""What fused kernels (cpu/, triton/) are called with: how rows become codes, and a weight as stored.

M: rows, K: columns, N: outputs, B: bytes of a packed row, G: groups.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

INT8_WEIGHT, NIBBLES, PAIRS, WIDE_PAIRS = range(4)


class Rows(NamedTuple):  # made at every call: a frozen dataclass takes four times as long
    """How activations become codes.

    kernels: who will do it. code_min, code_max, levels, affine: of the format. multiplier float32 [K]; scale float32
    [1] and zero_point int32 [1]: calibrated ones, else every row gets its own. finite: infinities spoil a row although
    there is a scale.
    """

    kernels: Kernels
    code_min: int
    code_max: int
    levels: float
    affine: bool
    multiplier: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    finite: bool = False


class Weight(NamedTuple):
    """A weight as stored. bytes: int8 [N, K] or uint8 [N, B]; scale: [1], [N, 1] or [N, G] with `group` columns each;
    tables: 48 numbers (pair_codes.py), of packed ones; row_sum: int32 [N], for affine activations."""

    bytes: torch.Tensor
    scale: torch.Tensor
    kind: int = INT8_WEIGHT
    tables: tuple[int, ...] = ()
    unit: float = 1.0
    group: int = 0
    global_scale: torch.Tensor | None = None
    row_sum: torch.Tensor | None = None


class E4M3Kernels(Protocol):
    """What a backend with E4M3 products offers; triton/calls.py is one."""

    def linear_e4m3(
        self,
        x: torch.Tensor,
        weight: Weight,
        values: tuple[float, ...],
        bias: torch.Tensor | None,
        multiplier: torch.Tensor | None,
        activation: str = "none",
    ) -> torch.Tensor:
        """x [..., K] float → y [..., N]: pair_fp8.py in one call."""


class Kernels(Protocol):
    """What a backend of fused kernels offers; cpu/calls.py and triton/calls.py are two."""

    def quantize(self, x: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [..., K] → (codes int8 [M, K], scale float32 [M, 1], zero point int32 [M, 1])."""

    def linear(
        self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, rows: Rows, activation: str = "none"
    ) -> torch.Tensor:
        """x [..., K] float → y [..., N]: linear.py in one call."""

    def linear_float(
        self,
        x: torch.Tensor,
        weight: Weight,
        values: tuple[float, ...],
        bias: torch.Tensor | None,
        multiplier: torch.Tensor | None,
        activation: str = "none",
    ) -> torch.Tensor:
        """x [..., K] float → y [..., N], activations unquantized: weight_only.py in one call."""
