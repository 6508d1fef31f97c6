"""Tiny convolutional nets of well-known shapes, written out so that no library is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def cbr(inputs: int, outputs: int, kernel: int = 3, act: str = "relu", **kwargs: Any) -> nn.Sequential:
    """Convolution, BatchNorm, activation."""
    acts = {"relu": nn.ReLU(inplace=True), "relu6": nn.ReLU6(inplace=True), "none": nn.Identity()}
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **kwargs)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), acts[act])


class Residual(nn.Module):
    """ResNet's bottleneck; grouped (ResNeXt) if groups > 1."""

    def __init__(self, inputs: int, outputs: int, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.one, self.two = cbr(inputs, 8, 1), cbr(8, 8, groups=groups, stride=stride)
        self.three = cbr(8, outputs, 1, act="none")
        change = inputs != outputs or stride != 1
        self.skip = cbr(inputs, outputs, 1, act="none", stride=stride) if change else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.three(self.two(self.one(x)))
        y += self.skip(x)
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(*cbr(3, 12, stride=2), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(
            Residual(12, 12, groups), Residual(12, 16, groups, stride=2), Residual(16, 16, groups)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1), 1))


class Inverted(nn.Module):
    """MobileNetV2: expand, depthwise, project without activation."""

    def __init__(self, inputs: int, outputs: int, act: str) -> None:
        super().__init__()
        wide = 2 * inputs
        self.expand, self.depth = cbr(inputs, wide, 1, act), cbr(wide, wide, act=act, groups=wide)
        self.project, self.add = cbr(wide, outputs, 1, "none"), inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depth(self.expand(x)))
        return x + y if self.add else y


class MobileNet(nn.Module):
    def __init__(self, act: str = "relu6") -> None:
        super().__init__()
        self.stem, self.last = cbr(3, 8, act=act, stride=2), cbr(12, 20, 1, act)
        self.blocks = nn.Sequential(Inverted(8, 8, act), Inverted(8, 12, act), Inverted(12, 12, act))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(20, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.blocks(self.stem(x))).mean([2, 3]))


class UNet(nn.Module):
    """Two levels; the way up is a transposed convolution and a concatenation with the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = cbr(3, 6), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up2, self.mid = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Conv2d(16, 8, 3, padding=1)
        self.up1, self.out = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.Conv2d(12, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.down1(x)
        two = F.relu(self.down2(F.max_pool2d(one, 2)))
        low = F.leaky_relu(self.bottom(F.avg_pool2d(two, 2)), 0.2)
        y = F.relu(self.mid(torch.cat([two, self.up2(low)], 1)))
        return self.out(torch.cat([self.up1(y), one], 1))


class Fire(nn.Module):
    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.one, self.three = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


class SqueezeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(8, 4, 6), Fire(12, 4, 6)
        )
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(12, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x)).flatten(1)


class DenseNet(nn.Module):
    """BatchNorm and ReLU before each convolution, which reads all maps before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(14), nn.Linear(14, 5)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(10)])
        self.convs = nn.ModuleList([nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(10, 4, 3, padding=1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            maps.append(conv(F.relu(norm(torch.cat(maps, 1)))))
        return self.head(F.relu(self.last(torch.cat(maps, 1))).mean((2, 3)))


class ConvNeXt(nn.Module):
    """Depthwise convolution, LayerNorm over the last dimension, two linear layers, LayerScale, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 2, stride=2), nn.LayerNorm(8)
        self.depth, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma, self.last, self.head = nn.Parameter(torch.rand(8)), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem_norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return self.head(self.last((x + y.permute(0, 3, 1, 2)).mean((2, 3))))


class MobileNetV3(nn.Module):
    """Squeeze and excitation behind a depthwise convolution; Hardswish before, ReLU inside, Hardsigmoid as gate."""

    def __init__(self, act: type[nn.Module] = nn.Hardswish) -> None:
        super().__init__()
        self.expand, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act, self.squeeze, self.excite = act(), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.depth(self.act(self.expand(x))))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return self.project(gate * y)


NETS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": ResNet,
    "ResNeXt": lambda: ResNet(groups=4),
    "MobileNetV2": MobileNet,
    "MobileNetV2 with ReLU": lambda: MobileNet("relu"),
    "U-Net": UNet,
    "SqueezeNet": SqueezeNet,
    "DenseNet": DenseNet,
    "ConvNeXt": ConvNeXt,
    "MobileNetV3": MobileNetV3,
    "MobileNetV3 with ReLU": lambda: MobileNetV3(nn.ReLU),
}
