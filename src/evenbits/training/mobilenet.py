"""MobileNetV2 as a chain of parts that can be cut anywhere, with BatchNorm put back where weights come without it.

What. The ImageNet weights at hand are folded: every BatchNorm was multiplied into its convolution, y = W*x + b. Fine-
tuning with live statistics, as the original experiments did, needs the BatchNorm back. Of a folded network it cannot be
recovered, but any mean and variance will do if γ and β undo them:

    BN(W*x) = γ (W*x − μ) / √(σ² + ε) + β      with      γ = √(σ² + ε),   β = b + μ

is W*x + b in evaluation mode, for every μ and σ². Here they are the mean and variance of W*x over calibration pictures,
so that training mode, which uses the batch's own, starts close to the same function. γ and β are then not those of the
original training: their size is that of the activations.

Padding is TensorFlow's "SAME" (what is uneven goes right and below), as the weights were trained.

Left out: width multipliers, dropout before the classifier (20 % in the paper; short runs do not overfit).

Source: M. Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", CVPR 2018, table 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from evenbits.errors import EvenbitsError

# Expansion, channels, repeats, first stride: a row of the paper's table 2 each.
BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM, FEATURES = 32, 1280


class SameConv2d(nn.Conv2d):
    """A convolution of stride s whose output is ⌈input / s⌉ wide and high; uneven padding goes right and below."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """float [N, C, H, W] → float [N, O, ⌈H/s⌉, ⌈W/s⌉]."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel > 1:
            pads: list[int] = []
            for size in (x_NCHW.shape[3], x_NCHW.shape[2]):
                missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
                pads += [missing // 2, missing - missing // 2]
            x_NCHW = F.pad(x_NCHW, pads)
        return super().forward(x_NCHW)


class ConvNorm(nn.Sequential):
    """Convolution, BatchNorm and, where asked for, ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        conv = SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), *([nn.ReLU6()] if act else []))


class Inverted(nn.Module):
    """Expand, filter each channel, project; added to the input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expansion
        parts = [] if expansion == 1 else [ConvNorm(inputs, wide, 1)]
        parts += [ConvNorm(wide, wide, 3, stride=stride, groups=wide), ConvNorm(wide, outputs, 1, act=False)]
        self.body = nn.Sequential(*parts)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """float [N, C, H, W] → float [N, O, H/s, W/s]."""
        y: Tensor = self.body(x_NCHW)
        return x_NCHW + y if self.adds else y


class Classifier(nn.Module):
    """Mean over the picture, then one linear layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """float [N, 1280, H, W] → float [N, classes]."""
        logits: Tensor = self.linear(x_NCHW.mean(dim=(2, 3)))
        return logits


def mobilenet(classes: int = 10) -> dict[str, nn.Module]:
    """The parts by name, in order: stem, block0 … block16, features, classifier. Weights are torch's own start."""
    parts: dict[str, nn.Module] = {"stem": ConvNorm(3, STEM, 3, stride=2)}
    channels = STEM
    for expansion, outputs, repeats, first in BLOCKS:
        for i in range(repeats):
            block = Inverted(channels, outputs, expansion=expansion, stride=first if i == 0 else 1)
            parts[f"block{len(parts) - 1}"] = block
            channels = outputs
    parts["features"] = ConvNorm(channels, FEATURES, 1)
    parts["classifier"] = Classifier(classes)
    return parts


def load_folded(parts: Mapping[str, nn.Module], path: Path, pictures_NCHW: Tensor) -> None:
    """Fills everything but the classifier from folded weights `features.0.weight`, `features.0.bias`, …, in order of
    use, and starts each BatchNorm so that evaluation mode is the folded network.

    pictures_NCHW: calibration pictures, float, from which the running statistics come.
    Raises EvenbitsError if the file is missing, damaged or of another network.
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise EvenbitsError(f"the weights {path} cannot be read: {error}") from error
    layers = [m for name, part in parts.items() if name != "classifier" for m in part.modules()]
    pairs = [m for m in layers if isinstance(m, ConvNorm)]
    for i, layer in enumerate(pairs):
        conv, norm = _conv(layer), _norm(layer)
        weight, bias = state.get(f"features.{i}.weight"), state.get(f"features.{i}.bias")
        if weight is None or bias is None or weight.shape != conv.weight.shape:
            raise EvenbitsError(
                f"{path} is not a folded MobileNetV2 1.0: convolution {i} must be features.{i}.weight of shape "
                f"{list(conv.weight.shape)} with a bias; found {None if weight is None else list(weight.shape)}."
            )
        with torch.no_grad():
            conv.weight.copy_(weight.float())
            norm.bias.copy_(bias.float())
            norm.running_var.fill_(1 - norm.eps)  # type: ignore[union-attr]
    _start(parts, pairs, pictures_NCHW)


def _conv(layer: ConvNorm) -> nn.Conv2d:
    conv = layer[0]
    assert isinstance(conv, nn.Conv2d)
    return conv


def _norm(layer: ConvNorm) -> nn.BatchNorm2d:
    norm = layer[1]
    assert isinstance(norm, nn.BatchNorm2d)
    return norm


def _start(parts: Mapping[str, nn.Module], pairs: list[ConvNorm], pictures_NCHW: Tensor) -> None:
    """One forward pass in evaluation mode; each BatchNorm meets W*x, takes its statistics, and stays the same map."""

    def meet(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        norm, seen = module, given[0]
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        mean, var = seen.mean(dim=(0, 2, 3)), seen.var(dim=(0, 2, 3), correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.weight.copy_((var + norm.eps).sqrt())
        norm.bias.add_(mean)

    handles = [_norm(layer).register_forward_pre_hook(meet) for layer in pairs]
    whole = nn.Sequential(*(part for name, part in parts.items() if name != "classifier"))
    training = [part.training for part in parts.values()]
    try:
        with torch.no_grad():
            whole.eval()(pictures_NCHW)
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in zip(parts.values(), training, strict=True):
            part.train(mode)
