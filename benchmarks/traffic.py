"""What crosses a stage boundary: the tensors of rate_distortion.py, synthetic and captured from real models.

gauss, laplace, t3   independent elements, fixed seeds; t3 is Student's t with 3 degrees of freedom
stem act, stem grad  MobileNetV2 (ImageNet weights) on CIFAR-10 pictures at 224 px, after the first convolution and
                     ReLU6: [B, 32, 112, 112], and the loss's gradient there
head act, head grad  the same after the last convolution and ReLU6: [B, 1280, 7, 7]
lm act, lm grad      MiniLM fine-tuned on SST-2, after its third layer of six: [sentences, tokens, 384], padded

The picture model gets a linear classifier of ten classes with fixed random weights in place of its own thousand; the
loss is cross-entropy with CIFAR-10's labels. The sentence model has its own classifier and labels. Both in evaluation
mode.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Expansion, channels, repeats, first stride of each row of the MobileNetV2 paper's table 2.
_BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
SYNTHETIC = ("gauss", "laplace", "t3")


@dataclass(frozen=True)
class Traffic:
    """One tensor of a boundary, in the shape it is sent in."""

    name: str
    x: Tensor


def synthetic(size: int) -> Iterator[Traffic]:
    """Independent elements, `size` of each density, as 1024 columns."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(4, size, generator=generator)
    yield Traffic("gauss", draw[0].view(-1, 1024))
    # The difference of two exponentials is Laplace, and half the sum of two squared normals is exponential.
    yield Traffic(
        "laplace", ((draw[0].square() + draw[1].square()) - (draw[2].square() + draw[3].square())).view(-1, 1024)
    )
    yield Traffic("t3", (draw[0] / (draw[1:].square().mean(dim=0)).sqrt()).view(-1, 1024))


def captured(data: Path, pictures: int, sentences: int) -> Iterator[Traffic]:
    """Activations and gradients of both models; data: the folder of real models and data."""
    yield from mobilenet(data, pictures)
    yield from minilm(data, sentences)


def mobilenet(data: Path, pictures: int) -> Iterator[Traffic]:
    """The two cuts of MobileNetV2."""
    from safetensors.torch import load_file

    state = {k: v.float() for k, v in load_file(data / "mobilenetv2_imagenet" / "model.safetensors").items()}
    images, labels = cifar10(data, pictures)
    stem, head = stages(state, images)
    generator = torch.Generator().manual_seed(0)
    classifier = torch.randn(10, head.shape[1], generator=generator) / head.shape[1] ** 0.5
    loss = F.cross_entropy(head.mean(dim=(2, 3)) @ classifier.T, labels)
    stem_gradient, head_gradient = torch.autograd.grad(loss, (stem, head))
    for name, x in (("stem act", stem), ("stem grad", stem_gradient), ("head act", head), ("head grad", head_gradient)):
        yield Traffic(name, x.detach())


def stages(state: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """MobileNetV2 up to its last ReLU6, BatchNorm folded into convolutions `features.0` … in order of use; (what is
    after the first layer, what is after the last)."""
    count = iter(range(len(state)))

    def layer(x: Tensor, *, stride: int = 1, act: bool = True) -> Tensor:
        place = next(count)
        weight, bias = state[f"features.{place}.weight"], state[f"features.{place}.bias"]
        kernel = weight.shape[-1]
        if kernel > 1:  # "SAME" padding: what is uneven goes right and below
            missing = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
            x = F.pad(x, (missing // 2, missing - missing // 2) * 2)
        x = F.conv2d(x, weight, bias, stride, groups=x.shape[1] // weight.shape[1])
        return F.relu6(x) if act else x

    stem = layer(images, stride=2).requires_grad_()
    x = stem
    for expansion, channels, repeats, first in _BLOCKS:
        for i in range(repeats):
            stride, y = first if i == 0 else 1, x
            y = layer(y) if expansion != 1 else y
            y = layer(layer(y, stride=stride), act=False)
            x = x + y if stride == 1 and x.shape[1] == channels else y
    return stem, layer(x)


def cifar10(data: Path, count: int) -> tuple[Tensor, Tensor]:
    """Test pictures evenly spaced over the classes, [count, 3, 224, 224] in −1 … 1, and their labels."""
    from PIL import Image

    with np.load(data / "cifar10" / "test.npz", allow_pickle=False) as table:
        files, offsets, labels = table["jpeg"], table["offsets"], table["labels"]
    made, kept = [], np.linspace(0, len(labels) - 1, count).astype(int)
    for i in kept:
        with Image.open(io.BytesIO(files[offsets[i] : offsets[i + 1]].tobytes())) as image:
            made.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1)
    large = F.interpolate(torch.stack(made), size=(224, 224), mode="bilinear", align_corners=False)
    return large, torch.from_numpy(labels[kept].astype(np.int64))


def minilm(data: Path, sentences: int) -> Iterator[Traffic]:
    """The middle of MiniLM, one padded batch of SST-2."""
    import transformers

    folder = str(data / "minilm_glue" / "sst2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    made = transformers.AutoModelForSequenceClassification
    model = made.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    rows = [line.split("\t") for line in (data / "sst2" / "dev.tsv").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row[0] in ("0", "1")][:sentences]
    found: list[Tensor] = []

    def keep(_module: object, _given: object, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden.retain_grad()
        found.append(hidden)

    layers = model.base_model.encoder.layer
    handle = layers[len(layers) // 2 - 1].register_forward_hook(keep)
    given = tokenizer([row[1] for row in rows], return_tensors="pt", padding=True)
    model(**given, labels=torch.tensor([int(row[0]) for row in rows])).loss.backward()
    handle.remove()
    assert found[0].grad is not None
    yield Traffic("lm act", found[0].detach())
    yield Traffic("lm grad", found[0].grad)
