"""What a quantizer of the stem's gradient does to the stem's own gradients, in one backward pass.

    python benchmarks/collapse_step.py --data DIR [--bits 8,6,4] [--batches 6] [--size 48]

The network of collapse.py at its start. The activations are not quantized and neither is the gradient at the second
cut, so that all quantizers meet the same tensor. Medians over batches of ‖quantized − exact‖ / ‖exact‖ for the
gradients of the stem's convolution (W) and BatchNorm (γ, β); beside them SNR and DC ratio of the tensor, and the DC
ratio of its worst channel, over all positions and over those that ReLU6 lets through, which are the ones that β's
gradient sums. Channels whose gradient is almost zero make the worst ones.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from collapse import INTERVENTIONS, METHODS, Setting, network
from collapse_quantizers import quantizer
from collapse_report import spearman
from machine import fingerprint
from torch import Tensor
from torch.nn import functional as F

from evenbits.training.pictures import network_input, read_cifar10

COLUMNS = ("SNR dB", "DC ratio", "worst channel", "worst channel, active", "∂W", "∂γ", "∂β")


def ratios(error: Tensor, grad: Tensor, active: Tensor) -> list[float]:
    """Figures of an error on a gradient, both [N, C, H, W]; active: where it passes ReLU6."""
    flat, e = grad.double(), error.double()
    found = [10 * float(torch.log10(flat.square().sum() / e.square().sum())), _ratio(e, flat)]
    for mask in (torch.ones_like(active), active):
        sums = (e * mask).sum(dim=(0, 2, 3)).abs() / (flat * mask).square().sum(dim=(0, 2, 3)).sqrt().clamp(min=1e-300)
        found.append(float(sums[(flat * mask).abs().amax(dim=(0, 2, 3)) > 0].max()))
    return found


def _ratio(error: Tensor, grad: Tensor) -> float:
    return float(error.sum().abs() / grad.square().sum().sqrt())


def batch(setting: Setting, data: Path, number: int) -> tuple[Tensor, Tensor]:
    """Training pictures and classes."""
    pictures, labels = read_cifar10(data / "cifar10", "train", setting.train)
    picked = torch.randint(len(labels), (setting.batch,), generator=torch.Generator().manual_seed(number))
    return network_input(pictures[picked], setting.size), labels[picked]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", default="8,6,4")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--size", type=int, default=48)
    given = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting("none", 32, 0, size=given.size, train=512)
    pictures, _ = read_cifar10(given.data / "cifar10", "train", setting.train)
    model, _, _ = network(setting, given.data, pictures[:: setting.train // 64])
    stem, rest = model[0], model[1:]
    own = [stem[0].weight, stem[1].weight, stem[1].bias]
    found: dict[tuple[int, str], list[list[float]]] = {}
    for number in range(given.batches):
        x, labels = batch(setting, given.data, number)
        y = stem(x)
        (grad,) = torch.autograd.grad(F.cross_entropy(rest(y), labels), y)
        exact = torch.autograd.grad(y, own, grad, retain_graph=True)
        active = (y > 0) & (y < 6)
        for bits in map(int, given.bits.split(",")):
            for method in (*METHODS, *INTERVENTIONS):
                made = quantizer(method, bits)(grad.contiguous())
                moved = torch.autograd.grad(y, own, made, retain_graph=True)
                errors = [float((m - g).norm() / g.norm()) for m, g in zip(moved, exact, strict=True)]
                found.setdefault((bits, method), []).append(ratios(made - grad, grad, active) + errors)
    print(f"{fingerprint()}\n\n| bits | quantizer | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}")
    for (bits, method), rows in found.items():
        cells = [f"{statistics.median(column):.3g}" for column in zip(*rows, strict=True)]
        print(f"| {bits} | {method} | {' | '.join(cells)} |")
    for words, kept in (("quantizers", METHODS), ("with interventions", (*METHODS, *INTERVENTIONS))):
        print(
            f"\n{correlations([row for (_, method), rows in found.items() if method in kept for row in rows], words)}"
        )


def correlations(rows: list[list[float]], words: str) -> str:
    """Rank correlation of the tensor's figures with the gradients' errors, over all bits, quantizers and batches."""
    columns = list(zip(*rows, strict=True))
    lines = [f"| {words}: {len(rows)} pairs | {' | '.join(COLUMNS[4:])} |", "|---|---|---|---|"]
    for i, title in enumerate(COLUMNS[:4]):
        cells = [f"{found:.2f}" for end in columns[4:] if (found := spearman(columns[i], end)) is not None]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
