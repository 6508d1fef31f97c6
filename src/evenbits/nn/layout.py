"""Where a matrix layer keeps its input and output channels: one description for linear layers and every convolution.

| layer                 | weight            | input channels           | output channels         |
|-----------------------|-------------------|--------------------------|-------------------------|
| Linear                | [O, I]            | dim 1                    | dim 0                   |
| Conv1D (Hugging Face) | [I, O]            | dim 0                    | dim 1                   |
| ConvNd                | [O, I/g, k…]      | (group of the row, dim 1)| dim 0                   |
| ConvTransposeNd       | [I, O/g, k…]      | dim 0                    | (group of the row, dim 1)|

Statistics of an input channel run over everything else that multiplies it: other outputs of its group and the kernel.
A convolution's activation has its channels before the spatial dimensions; `view(-1, C)` on [N, C, H, W] would mix
pixels of all channels (and, as any s keeps the float model equal, no equivalence test would notice).
O: out, I: in, g: groups, k: kernel positions, K: I/g · k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

_CONVOLUTIONS: dict[type[nn.Module], int] = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}


@dataclass(frozen=True)
class Layout:
    """kind: the class's name; spatial: dimensions of the kernel; swapped: input channels are the weight's first
    dimension; channel_dim: of the input and the output, counted from the end (so that unbatched inputs count)."""

    kind: str
    in_channels: int
    out_channels: int
    groups: int
    spatial: int
    swapped: bool

    @property
    def channel_dim(self) -> int:
        return -1 - self.spatial

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape could be the layer's input."""
        return len(shape) > self.spatial and shape[self.channel_dim] == self.in_channels

    def canonical(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight as [g, O/g, I/g, k] (shares memory where strides allow)."""
        kernel = prod(weight.shape[2:])
        if self.swapped:
            stored = weight.reshape(self.groups, self.in_channels // self.groups, -1, kernel)
            return stored.transpose(1, 2)
        return weight.reshape(self.groups, self.out_channels // self.groups, -1, kernel)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight as [O, K]: one row per output channel, as weight methods and formats see it."""
        if weight.ndim == 2:
            return weight.t() if self.swapped else weight
        return self.canonical(weight).reshape(self.out_channels, -1)

    def from_matrix(self, weight_OK: torch.Tensor, kernel: tuple[int, ...]) -> torch.Tensor:
        """The inverse of `matrix` for a kernel of this shape: in the layer's own layout."""
        if not kernel:
            return weight_OK.t() if self.swapped else weight_OK
        if not self.swapped:
            return weight_OK.reshape(self.out_channels, -1, *kernel)
        parts = weight_OK.reshape(self.groups, self.out_channels // self.groups, -1, prod(kernel)).transpose(1, 2)
        return parts.reshape(self.in_channels, -1, *kernel)

    def columns(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight as [R, I]: column i holds everything that multiplies input channel i."""
        return self.canonical(weight).permute(1, 3, 0, 2).reshape(-1, self.in_channels)

    def input_absmax(self, weight: torch.Tensor) -> torch.Tensor:
        """max |w| per input channel, [I]."""
        return self.canonical(weight).abs().amax(dim=(1, 3)).flatten()

    def along_columns(self, figure_I: torch.Tensor, kernel: int) -> torch.Tensor:
        """A figure per input channel as [g, K], one line per group, in the order of `matrix`'s columns."""
        return figure_I.view(self.groups, -1).repeat_interleave(kernel, dim=1)

    def mount_inputs(self, factor_I: torch.Tensor, ndim: int) -> torch.Tensor:
        """A factor per input channel, shaped to multiply a weight of `ndim` dimensions."""
        if self.swapped:
            return factor_I.view(-1, *(1,) * (ndim - 1))
        rows = factor_I.view(self.groups, 1, -1).expand(-1, self.out_channels // self.groups, -1)
        width = self.in_channels // self.groups
        return rows.reshape(-1, width, *(1,) * (ndim - 2)) if self.groups > 1 else factor_I.view(1, -1, *_ones(ndim))

    def mount_outputs(self, factor_O: torch.Tensor, ndim: int) -> torch.Tensor:
        """A factor per output channel, shaped to multiply a weight of `ndim` dimensions."""
        if not self.swapped:
            return factor_O.view(-1, *(1,) * (ndim - 1))
        rows = factor_O.view(self.groups, 1, -1).expand(-1, self.in_channels // self.groups, -1)
        return rows.reshape(self.in_channels, -1, *_ones(ndim))

    def on_activation(self, figure_C: torch.Tensor, ndim: int) -> torch.Tensor:
        """A figure per channel, shaped to multiply an input or output of `ndim` dimensions."""
        return figure_C.view(*(1,) * (ndim - 1 - self.spatial), -1, *(1,) * self.spatial)


def _ones(ndim: int) -> tuple[int, ...]:
    return (1,) * (ndim - 2)


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a linear or convolution layer, else None. A subclass counts if it computes what its base does
    (Falcon's linear layer), and does not if it is there to be read by others (nn.MultiheadAttention's projection)."""
    kind = type(module)
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        inputs, outputs = module.get_parameter("weight").shape
        return Layout("Conv1D", inputs, outputs, 1, 0, True)
    known: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTIONS)
    base = next((kind for kind in known if isinstance(module, kind)), None)
    if base is None or isinstance(module, NonDynamicallyQuantizableLinear) or not _computes_as(module, base):
        return None
    if isinstance(module, nn.Linear):
        return Layout("Linear", module.in_features, module.out_features, 1, 0, False)
    transposed = base in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    sizes = (module.in_channels, module.out_channels, module.groups)
    inputs, outputs, groups = (int(size) for size in sizes)  # type: ignore[arg-type]
    return Layout(base.__name__, inputs, outputs, groups, _CONVOLUTIONS[base], transposed)


def _computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a subclass's forward is its base's, or gives the same numbers on a random input."""
    if type(module).forward is base.forward:
        return True
    if base is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module.get_parameter("weight")
    if weight.is_meta or not weight.is_floating_point():
        return False
    seed = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=seed).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            own = module(x)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False
        expected = nn.functional.linear(x, weight, module.bias)  # type: ignore[arg-type]
    same = isinstance(own, torch.Tensor) and own.shape == expected.shape
    return same and bool(torch.allclose(own, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())))
