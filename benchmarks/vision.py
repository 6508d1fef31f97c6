"""Image classifiers to sweep α on: MobileNetV2 on ImageNet pictures, ResNet-20 and ResNet-56 on CIFAR-10.

    python benchmarks/vision.py prepare DIR     calibration and evaluation arrays, cut once and for all
    python benchmarks/vision.py check           accuracy of the float models against what the data's notes say
    evenbits sweep benchmarks/vision.py:mobilenet_v2_planted --scheme W8A8_STATIC --task classification \\
        --calibration DIR/imagenet-calibration.npz --data DIR/imagenet-evaluation.npz -o OUT

Weights and pictures are read from EVENBITS_TEST_DATA. The models take pictures in 0..1 and normalise them themselves,
so that the arrays are plain uint8, and work in channels last. ImageNet: 500 pictures, one per even class; every fifth
is calibration, the other 400 are evaluation. CIFAR-10: 100 training pictures and every fifth test picture; the other
8000 test pictures are kept for confirmation.

The planted models compute the same function with a few channels enlarged by powers of two from 8 to 64, and their
readers' weights made as much smaller. ResNets: channels between the two convolutions of each block, where the ReLU
lets a positive factor pass. MobileNetV2: channels of the linear bottlenecks only, as ReLU6 lets no factor pass.

Source: M. Sandler et al., "MobileNetV2", CVPR 2018; K. He et al., "Deep Residual Learning", CVPR 2016 (section 4.2).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

# expansion, channels, blocks, stride of the first
_STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
_FACTORS = (8.0, 16.0, 32.0, 64.0)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_README = {"mobilenet_v2": 0.862, "resnet20": 0.8103, "resnet56": 0.832}  # as the data's notes give them


def _conv(channels: int, out: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Module:
    """A convolution with TensorFlow's SAME padding, for even lengths: with stride 2 one pixel, right and below."""
    if stride == 1:
        return nn.Conv2d(channels, out, size, padding=size // 2, groups=groups)
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, out, size, stride, groups=groups))


class Bottleneck(nn.Module):
    """Expand, filter each channel by itself, project without a non-linearity. `layers` are the model's own."""

    def __init__(self, layers: list[nn.Module], residual: bool) -> None:
        super().__init__()
        self.layers, self.residual = nn.ModuleList(layers), residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.layers[:-1]:
            y = F.relu6(layer(y))
        y = self.layers[-1](y)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """1.0, for 224 × 224; batch norms are in the convolutions. x [N, 3, H, W] in 0..1 → logits [N, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 32, 3, 2)
        self.stages, channels = nn.ModuleList(), 32
        for expansion, out, count, first_stride in _STAGES:
            stage = nn.Sequential()
            for index in range(count):
                stride, inner = first_stride if index == 0 else 1, channels * expansion
                layers: list[nn.Module] = [] if expansion == 1 else [_conv(channels, inner)]
                layers += [_conv(inner, inner, 3, stride, groups=inner), _conv(inner, out)]
                stage.append(Bottleneck(layers, residual=stride == 1 and channels == out))
                channels = out
            self.stages.append(stage)
        self.head, self.classifier = _conv(channels, 1280), _conv(1280, 1001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.stem((2 * x - 1).contiguous(memory_format=torch.channels_last)))
        for stage in self.stages:
            x = stage(x)
        x = F.relu6(self.head(x)).mean((2, 3), keepdim=True)
        return self.classifier(x).flatten(1)[:, 1:]  # class 0 is background

    def convolutions(self) -> list[nn.Conv2d]:
        """In the order of the forward, which is the order of the stored weights."""
        return [module for module in self.modules() if isinstance(module, nn.Conv2d)]


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters (option A: every second pixel, missing channels zero)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.widens = channels != out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.widens:
            missing = (y.shape[1] - x.shape[1]) // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, missing, missing))
        return F.relu(x + y)


class ResNet(nn.Module):
    """6·blocks + 2 layers for 32 × 32 pictures. x [N, 3, 32, 32] in 0..1 → logits [N, 10]."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Block(a, b, stride), *(Block(b, b, 1) for _ in range(blocks - 1))) for a, b, stride in widths
        )
        self.linear = nn.Linear(64, 10)
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.linear(x.mean((2, 3)))
        return logits


def mobilenet_v2() -> MobileNetV2:
    """With the stored ImageNet weights."""
    stored, model = load_file(_data("mobilenetv2_imagenet/model.safetensors")), MobileNetV2()
    with torch.no_grad():
        for index, layer in enumerate(model.convolutions()):
            layer.weight.copy_(stored[f"features.{index}.weight"])
            assert layer.bias is not None
            layer.bias.copy_(stored[f"features.{index}.bias"])
    return model.eval()


def resnet20() -> ResNet:
    """With the stored CIFAR-10 weights."""
    return _resnet("resnet20", 3)


def resnet56() -> ResNet:
    """With the stored CIFAR-10 weights."""
    return _resnet("resnet56", 9)


def mobilenet_v2_planted() -> MobileNetV2:
    """The same function with outlier channels in its linear bottlenecks."""
    return plant_mobilenet(mobilenet_v2())


def resnet20_planted() -> ResNet:
    """The same function with outlier channels inside its blocks."""
    return plant_resnet(resnet20())


def resnet56_planted() -> ResNet:
    """The same function with outlier channels inside its blocks."""
    return plant_resnet(resnet56())


@torch.no_grad()
def plant_resnet(model: ResNet, seed: int = 0) -> ResNet:
    """Enlarges one channel in 16 between the two convolutions of every block, in place: gain and bias of the batch norm
    times the factor, the second convolution's columns divided by it."""
    generator = torch.Generator().manual_seed(seed)
    for block in (module for module in model.modules() if isinstance(module, Block)):
        factor_C = _factors(block.bn1.num_features, 16, generator)
        block.bn1.weight.mul_(factor_C)
        block.bn1.bias.mul_(factor_C)
        block.conv2.weight.div_(factor_C.view(1, -1, 1, 1))
    return model


@torch.no_grad()
def plant_mobilenet(model: MobileNetV2, seed: int = 0) -> MobileNetV2:
    """Enlarges one channel in 16 of every stage's bottleneck, in place: rows and bias of the projections whose sum it
    is times the factor, columns of the convolutions that read it divided by it."""
    generator = torch.Generator().manual_seed(seed)
    stages = [list(stage) for stage in model.stages]
    for index, stage in enumerate(stages):
        following = stages[index + 1][0].layers[0] if index + 1 < len(stages) else model.head
        readers = [block.layers[0] for block in stage[1:]] + [following]
        factor_C = _factors(stage[0].layers[-1].out_channels, 16, generator)
        for block in stage:
            block.layers[-1].weight.mul_(factor_C.view(-1, 1, 1, 1))
            block.layers[-1].bias.mul_(factor_C)
        for reader in readers:
            reader.weight.div_(factor_C.view(1, -1, 1, 1))
    return model


def _factors(channels: int, one_in: int, generator: torch.Generator) -> torch.Tensor:
    chosen = torch.randperm(channels, generator=generator)[: max(1, channels // one_in)]
    factor_C = torch.ones(channels)
    factor_C[chosen] = torch.tensor(_FACTORS)[torch.randint(len(_FACTORS), chosen.shape, generator=generator)]
    return factor_C


def _resnet(name: str, blocks: int) -> ResNet:
    model = ResNet(blocks)
    model.load_state_dict(load_file(_data(f"resnet_cifar10/{name}.safetensors")))
    return model.eval()


def _data(name: str) -> Path:
    folder = os.environ.get("EVENBITS_TEST_DATA")
    if not folder:
        raise SystemExit("EVENBITS_TEST_DATA must name the folder of models and data sets.")
    return Path(folder) / name


def imagenet() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [500, 3, 224, 224], the centres of the pictures, and their classes, int64 [500]."""
    classes = range(0, 1000, 2)
    return pictures(classes), np.array(classes, dtype=np.int64)


def pictures(classes: Iterable[int]) -> np.ndarray:
    """The centres of the pictures of these (even) classes, uint8 [N, 3, 224, 224]."""
    names = [synset for synset, _ in json.loads(_data("imagenet_samples/labels.json").read_text(encoding="utf-8"))]
    found = []
    with zipfile.ZipFile(_data("imagenet_samples/even.zip")) as stored:
        for index in classes:
            picture = _pixels(stored.read(f"{names[index]}.jpg"))
            top, left = (picture.shape[0] - 224) // 2, (picture.shape[1] - 224) // 2
            found.append(picture[top : top + 224, left : left + 224])
    return _channels_first(found)


def cifar10(split: str, keep: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 3, 32, 32] and classes int64 [N]; they are stored sorted by class."""
    stored = np.load(_data(f"cifar10/{split}.npz"), allow_pickle=False)
    jpeg, ends, labels = stored["jpeg"], stored["offsets"], stored["labels"].astype(np.int64)
    rows = range(len(labels))[keep]
    return _channels_first([_pixels(jpeg[ends[i] : ends[i + 1]].tobytes()) for i in rows]), labels[keep]


def _pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def _channels_first(pictures: Iterable[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(np.stack(list(pictures)).transpose(0, 3, 1, 2))


def prepare(folder: Path) -> None:
    """Writes the five arrays. Pictures sorted by class are mixed by a fixed order, so that every batch has all."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y = imagenet()
    fifth = np.arange(len(y)) % 5 == 0
    _write(folder / "imagenet-calibration.npz", x[fifth], y[fifth])
    _write(folder / "imagenet-evaluation.npz", x[~fifth], y[~fifth])
    _write(folder / "cifar10-calibration.npz", *cifar10("train", slice(250, None, 500)))
    x, y = cifar10("test")
    fifth = np.arange(len(y)) % 5 == 0
    _write(folder / "cifar10-evaluation.npz", x[fifth], y[fifth])
    _write(folder / "cifar10-confirmation.npz", x[~fifth], y[~fifth])


def _write(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    order = np.random.default_rng(0).permutation(len(y))
    np.savez(path, inputs=x[order], labels=y[order])
    print(f"{path}: {len(y)} pictures of {len(set(y.tolist()))} classes")


def check() -> list[dict[str, Any]]:
    """Accuracy of each float model and of its planted twin, beside the data's notes (all 500, or all 10,000)."""
    import evenbits

    rows = []
    pictures = {"mobilenet_v2": imagenet(), "resnet20": cifar10("test")}
    pictures["resnet56"] = pictures["resnet20"]
    for name, noted in _README.items():
        x, y = pictures[name]
        data = [(torch.from_numpy(x[i : i + 50]) / 255, torch.from_numpy(y[i : i + 50])) for i in range(0, len(y), 50)]
        for variant in (name, f"{name}_planted"):
            found = evenbits.evaluate(globals()[variant](), task="classification", data=data)
            rows.append({"model": variant, "n": found.n, "accuracy": found.metrics["accuracy"], "noted": noted})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare").add_argument("folder", type=Path)
    commands.add_parser("check")
    options = parser.parse_args()
    if options.command == "prepare":
        prepare(options.folder)
    elif any(round(row["accuracy"], 4) != row["noted"] for row in check()):
        raise SystemExit("an accuracy is not the noted one")


if __name__ == "__main__":
    main()
