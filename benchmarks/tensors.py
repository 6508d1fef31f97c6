"""The tensors of formats_sqnr.py: synthetic families with fixed seeds, and real weights and activations.

Synthetic, [rows, columns]; n is standard normal, U uniform:

gauss, laplace, t5, t3, t2.2  independent; tN is Student's t with N degrees of freedom
outliers   n; 0.3 % of the elements times U(4, 14)
OPT        n; 6 channels times U(20, 100)                BERT  n; 20 channels times U(4, 20)
product    n · n                                         GELU  gelu(n)
GLU        silu(n) · n, channels times exp(0.5 n)
adjacent   n; 10 pairs (even channel, odd channel) times U(10, 40), the same for both
adjacent3  likewise, the odd one three times more

Real, at most `rows` rows of each, evenly spaced, float32:

GPT-2      the 16 attention weights, transposed to [output, input]
MiniLM     every Linear weight
MNv2       MobileNetV2's classifier and convolutions as [O, I·kh·kw]; MNv2-dw: its depthwise ones, K = 9
FFN-in     inputs of MiniLM's feed-forward layers (after the norm), sentences of SST-2; FFN-mid: after the GELU
MNv2-in    inputs of MobileNetV2's 1 × 1 convolutions after a ReLU6, a row per pixel, two pictures of ImageNet
OPT-125m   n · m: tokens of normal noise, channel c times m[c], the largest |x| of that channel over a corpus, at the
OPT-1.3b   inputs of q_proj and fc1: a real profile of outlier channels on made-up tokens; every layer of 125m, every
           sixth of 1.3b
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

WEIGHTS = ("GPT-2", "MiniLM", "MNv2")
ACTIVATIONS = ("FFN-in", "FFN-mid", "MNv2-in", "OPT-125m", "OPT-1.3b")
NARROW = ("MNv2-dw",)
REAL = (*WEIGHTS, *ACTIVATIONS, *NARROW)
_SENTENCES = 48


@dataclass(frozen=True)
class Sample:
    """One tensor [R, K] of a family."""

    family: str
    name: str
    x: Tensor


class Draw:
    """Random matrices of one shape from one seed."""

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        self.shape = (rows, columns)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*(shape or self.shape), generator=self.generator)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*(shape or self.shape), generator=self.generator)

    def student(self, freedom: float) -> Tensor:
        x = self.normal()
        gamma = torch._standard_gamma(torch.full(self.shape, freedom / 2), generator=self.generator)
        return x / (2 * gamma / freedom).sqrt()

    def laplace(self) -> Tensor:
        return -self.uniform(1e-9, 1.0).log() * self.uniform(-1, 1).sign()

    def outliers(self) -> Tensor:
        x = self.normal()
        return torch.where(self.uniform(0, 1) < 0.003, x * self.uniform(4, 14), x)

    def loud(self, channels: int, low: float, high: float) -> Tensor:
        x = self.normal()
        picked = torch.randperm(self.shape[1], generator=self.generator)[:channels]
        x[:, picked] *= self.uniform(low, high, channels)
        return x

    def adjacent(self, ratio: float) -> Tensor:
        x, loud = self.normal(), self.uniform(10, 40, 10)
        even = 2 * torch.randperm(self.shape[1] // 2, generator=self.generator)[:10]
        x[:, even] *= loud
        x[:, even + 1] *= loud * ratio
        return x

    def gated(self) -> Tensor:
        gain = (0.5 * self.normal(self.shape[1])).exp()
        return torch.nn.functional.silu(self.normal()) * self.normal() * gain


SYNTHETIC: dict[str, Callable[[Draw], Tensor]] = {
    "gauss": lambda draw: draw.normal(),
    "laplace": lambda draw: draw.laplace(),
    "t5": lambda draw: draw.student(5),
    "t3": lambda draw: draw.student(3),
    "outliers": lambda draw: draw.outliers(),
    "OPT": lambda draw: draw.loud(6, 20, 100),
    "BERT": lambda draw: draw.loud(20, 4, 20),
    "product": lambda draw: draw.normal() * draw.normal(),
    "GLU": lambda draw: draw.gated(),
    "GELU": lambda draw: torch.nn.functional.gelu(draw.normal()),
    "t2.2": lambda draw: draw.student(2.2),
    "adjacent": lambda draw: draw.adjacent(1.0),
    "adjacent3": lambda draw: draw.adjacent(3.0),
}


def synthetic(rows: int, columns: int, seeds: int) -> Iterator[Sample]:
    """Every synthetic family, once per seed."""
    for family, made in SYNTHETIC.items():
        for seed in range(seeds):
            yield Sample(family, f"seed {seed}", made(Draw(rows, columns, seed)))


def real(data: Path, rows: int) -> Iterator[Sample]:
    """Every real tensor below `data`."""
    for source in (_gpt2, _minilm, _mobilenet, _captured, _pictured, _opt):
        for sample in source(data):
            x, most = sample.x.detach().float(), min(rows, len(sample.x))
            kept = torch.linspace(0, len(x) - 1, most).long()
            yield Sample(sample.family, sample.name, x[kept].contiguous())


def _load(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _gpt2(data: Path) -> Iterator[Sample]:
    for name, x in _load(data / "gpt2_attn_weights" / "gpt2_124m_attn_4layers.safetensors").items():
        if ".attn." in name and x.ndim == 2:
            yield Sample("GPT-2", name, x.T)


def _minilm(data: Path) -> Iterator[Sample]:
    for name, x in _load(data / "minilm_glue" / "sst2" / "model.safetensors").items():
        if x.ndim == 2 and "embeddings" not in name:
            yield Sample("MiniLM", name, x)


def _mobilenet(data: Path) -> Iterator[Sample]:
    for name, x in _load(data / "mobilenetv2_imagenet" / "model.safetensors").items():
        if x.ndim > 1:
            yield Sample("MNv2-dw" if x.ndim == 4 and x.shape[1] == 1 else "MNv2", name, x.flatten(1))


def _captured(data: Path) -> Iterator[Sample]:
    import transformers

    folder = str(data / "minilm_glue" / "sst2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    made = transformers.AutoModelForSequenceClassification
    model = made.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    families = {"intermediate.dense": "FFN-in", "output.dense": "FFN-mid"}
    found: dict[tuple[str, str], list[Tensor]] = {}
    for name, module in model.named_modules():
        family = families.get(".".join(name.split(".")[-2:]))
        if family and ".attention." not in name:
            seen = found.setdefault((family, name), [])
            module.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].flatten(0, 1)))
    lines = (data / "sst2" / "dev.tsv").read_text(encoding="utf-8").splitlines()
    with torch.inference_mode():
        for sentence in (line.partition("\t")[2] for line in lines[:_SENTENCES]):
            model(**tokenizer(sentence, return_tensors="pt"))
    for (family, name), parts in found.items():
        yield Sample(family, name, torch.cat(parts))


def _pictured(data: Path) -> Iterator[Sample]:
    import vision

    os.environ["EVENBITS_TEST_DATA"] = str(data)  # where vision.py looks
    model, found = vision.mobilenet_v2(), dict[str, Tensor]()

    def keep(name: str, x_NCHW: Tensor) -> None:
        found[name] = x_NCHW.permute(0, 2, 3, 1).flatten(0, 2)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1) and module.in_channels >= 96:
            module.register_forward_pre_hook(lambda _, given, name=name: keep(name, given[0]))
    with torch.inference_mode():
        model(torch.from_numpy(vision.pictures([0, 500])).float() / 255)
    yield from (Sample("MNv2-in", name, x) for name, x in found.items() if len(x) > 2 and float(x.min()) >= 0)


def _opt(data: Path) -> Iterator[Sample]:
    for size, step in (("125m", 1), ("1.3b", 6)):
        for name, loudest in _load(data / "opt_act_stats" / f"a_scales_opt-{size}.safetensors").items():
            layer = next((int(word) for word in name.split(".") if word.isdigit()), -1)
            if name.endswith(("q_proj", "fc1")) and layer % step == 0:
                yield Sample(f"OPT-{size}", name, Draw(128, len(loudest), layer).normal() * loudest)
