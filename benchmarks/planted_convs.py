"""Smoothing on single convolutions: planted outlier channels, and which α a search finds.

    python benchmarks/planted_convs.py [--small] [--json]

Table 1. Two input channels, 80 and 30 times as loud as the others, with smaller weights; W8A8 static, weights by row.
SQNR of the integer layer's output in dB, over all of the input, which is what it was calibrated on. The last column has
the input's scale searched for the least squared error (`int8:tensor:mse`), which clips a few extremes; `auto` cannot be
had with that, so α is 0.65. The column before it has weights in groups of 64 along the row (`int8:g64`),
whose product is a float one.

Table 2. Convolutions with one gain per channel, log-normal, and two planted outliers. For every seed: the α of least
true loss (float64, from the definition of the formats); the one our search finds; and the one found when the loss
rounds the weight with one scale per input channel, as Intel Neural Compressor 2.6 does for Conv2d. Then how many times
the best loss of 0, 0.05, …, 1 each of the two costs. The last is our reading of that code, not a run of it.
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import torch
from machine import fingerprint
from torch import nn
from torch.nn import functional as F

import evenbits

_LOUD = {17: 80.0, 40: 30.0}
_STATIC = {"weights": "int8:row", "input_activations": "int8:tensor", "dynamic": False}
_GROUPED = {**_STATIC, "weights": "int8:g64"}
_CLIPPED = {**_STATIC, "input_activations": "int8:tensor:mse"}
# shape, kernel, by what the loud channels' weights are smaller, output channels
_CASES = (
    ((4, 256, 182, 182), 1, 2.5, 16),
    ((4, 256, 182, 182), 3, 2.5, 16),
    ((4, 256, 182, 182), 3, 8.0, 16),
    ((2, 64, 24, 24), 3, 8.0, 32),
)
_WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": (_STATIC, {"method": "rtn"}),
    "0.5": (_STATIC, {"method": "smoothquant", "alpha": 0.5}),
    "0.65": (_STATIC, {"method": "smoothquant", "alpha": 0.65}),
    "auto": (_STATIC, {"method": "smoothquant", "alpha": "auto"}),
    "0.8, int8:g64": (_GROUPED, {"method": "smoothquant", "alpha": 0.8}),
    "0.65, input :mse": (_CLIPPED, {"method": "smoothquant", "alpha": 0.65}),
}
_ALPHAS = [round(0.05 * i, 2) for i in range(21)]


def planted(shape: tuple[int, ...], kernel: int, smaller: float, out: int) -> tuple[nn.Module, torch.Tensor]:
    """The layer and its input [N, C, H, W]."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    conv = nn.Conv2d(shape[1], out, kernel, padding=kernel // 2, bias=False)
    with torch.no_grad():
        for channel, gain in _LOUD.items():
            x[:, channel] *= gain
        conv.weight[:, list(_LOUD)] /= smaller
    return nn.Sequential(conv).eval(), x


@torch.no_grad()
def decibels(model: nn.Module, x: torch.Tensor, way: str) -> tuple[float, float | None]:
    """SQNR of the quantized layer's output, and the α that it has."""
    scheme, options = _WAYS[way]
    quantized = copy.deepcopy(model)
    batches = list(x.split(1))
    result = evenbits.quantize(quantized, scheme=scheme, data=batches, **options)
    signal = error = 0.0
    for batch in batches:
        expected = model(batch).double()
        signal += float(expected.square().sum())
        error += float((quantized(batch).double() - expected).square().sum())
    alpha = result.regions[0].alpha if result.regions else None
    return float(10 * torch.log10(torch.tensor(signal / error))), alpha


def synthetic(seed: int) -> tuple[nn.Conv2d, list[torch.Tensor]]:
    """A 3 × 3 convolution and three batches with uneven channels."""
    torch.manual_seed(seed)
    layer, gain_C = nn.Conv2d(32, 16, 3), 10 ** (torch.randn(32) * 0.3)
    gain_C[[3, 20]] = torch.tensor([200.0, 60.0])
    return layer.eval(), [torch.randn(2, 32, 8, 8) * gain_C.view(-1, 1, 1) for _ in range(3)]


def _rounded(x: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    step = absmax / 127
    return (x / step).round().clamp(-127, 127) * step


@torch.no_grad()
def loss(layer: nn.Conv2d, xs: list[torch.Tensor], alpha: float, weight_scales_over: tuple[int, ...]) -> float:
    """Relative squared error of the output in float64. weight_scales_over: the dimensions that share a weight scale,
    (1, 2, 3) for one per output channel, (0, 2, 3) for one per input channel."""
    weight, bias = layer.weight.double(), layer.bias.double()  # type: ignore[union-attr]
    absmax_C = torch.stack([x.double().abs().amax((0, 2, 3)) for x in xs]).amax(0)
    s = (absmax_C**alpha / weight.abs().amax((0, 2, 3)) ** (1 - alpha)).view(1, -1, 1, 1)
    even = [x.double() / s for x in xs]
    largest = torch.stack([x.abs().max() for x in even]).max()
    quiet = weight * s
    quiet = _rounded(quiet, quiet.abs().amax(weight_scales_over, keepdim=True))
    exact = [F.conv2d(x.double(), weight, bias) for x in xs]
    found = [F.conv2d(_rounded(x, largest), quiet, bias) for x in even]
    error = sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))
    return error / sum(float(y.square().sum()) for y in exact)


def searched(seed: int) -> dict[str, float]:
    """The row of a seed: three α and what two of them cost, as multiples of the least true loss of 0, 0.05, …, 1."""
    layer, xs = synthetic(seed)
    true = {alpha: loss(layer, xs, alpha, (1, 2, 3)) for alpha in _ALPHAS}
    least = min(true.values())
    drawn = min(_ALPHAS, key=lambda alpha: loss(layer, xs, alpha, (0, 2, 3)))
    model = nn.Sequential(copy.deepcopy(layer))
    result = evenbits.quantize(model, scheme=_STATIC, method="smoothquant", data=xs, alpha="auto:0:1:0.05")
    ours = result.regions[0].alpha
    assert ours is not None
    best = min(true, key=true.__getitem__)
    costs = {"ours costs": loss(layer, xs, ours, (1, 2, 3)) / least, "by input channel costs": true[drawn] / least}
    return {"seed": seed, "best": best, "ours": round(ours, 3), "by input channel": drawn, **costs}


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="only the last row of table 1, and one seed")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    first = []
    for case in _CASES[-1:] if given.small else _CASES:
        model, x = planted(*case)
        about = {"shape": case[0], "kernel": case[1], "smaller": case[2]}
        first.append(about | {way: decibels(model, x, way) for way in _WAYS})
    second = [searched(seed) for seed in range(1 if given.small else 6)]
    if given.json:
        print(json.dumps({"machine": fingerprint(), "planted": first, "search": second}))
        return
    cells = [
        [f"{list(row['shape'])}, {row['kernel']} × {row['kernel']}", f"{row['smaller']}"]
        + [f"{row[w][0]:.1f}" + (f" ({row[w][1]:.2f})" if w == "auto" else "") for w in _WAYS]
        for row in first
    ]
    print(_table(["input, kernel", "weights smaller by", *_WAYS], cells), end="\n\n")
    print(_table(list(second[0]), [[f"{v:.4g}" for v in row.values()] for row in second]))


if __name__ == "__main__":
    main()
