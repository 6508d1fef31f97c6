"""The table of docs/qat.md: a digit classifier at 3 and 4 bits, rounded after training (PTQ) and trained with it (QAT).

    python benchmarks/qat_digits.py [--json] [--victims] [--steps 200] [--seeds 3]

DigitNet twice: as it is, and with three channels of its first BatchNorm 16 times larger and the next layer's columns 16
times smaller, which computes the same in float and is what outlier channels do to quantizers. QAT learns from
mixtures of 128 images to match the float network's outputs (no labels); 500 held-out digits judge.
Everything but `seed` is fixed. --victims: pairs only, with and without gradients through victims.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from machine import fingerprint
from torch import Tensor, nn

import evenbits
from evenbits.demo.model import DigitNet, calibration_digits, evaluation_digits, load_digit_net
from evenbits.nn.qat import FakeQuantizer, QATLinear
from evenbits.pipeline.qat import convert_qat, prepare_qat

SCHEMES = {
    "ovp4": {"weights": "ovp4:row", "input_activations": "ovp4:tensor", "dynamic": False},
    "int4": {"weights": "int4:row:mse", "input_activations": "int4:tensor:mse", "dynamic": False},
    "flint3": {"weights": "flint3:row", "input_activations": "flint3:tensor", "dynamic": False},
    "int3": {"weights": "int3:row:mse", "input_activations": "int3:tensor:mse", "dynamic": False},
}
LEARNING_RATE = 1e-3
FACTOR = 16.0
FIGURES = ("accuracy", "divergence", "error")


def network(*, planted: bool) -> DigitNet:
    """DigitNet in evaluation mode; planted: with three outlier channels, the same function."""
    model = load_digit_net()
    if planted:
        picked = torch.randperm(16, generator=torch.Generator().manual_seed(0))[:3]
        with torch.no_grad():
            for parameter in (model.bn1.weight, model.bn1.bias):
                parameter[picked] *= FACTOR
            model.conv2.weight[:, picked] /= FACTOR
    return model


def batches(steps: int, seed: int, size: int = 64) -> Iterator[Tensor]:
    """Mixtures of two calibration digits with a little noise, float32 [N, 1, 8, 8]; the float network labels them."""
    images, _ = calibration_digits()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        first, second = (images[torch.randint(len(images), (size,), generator=generator)] for _ in range(2))
        x = first.lerp(second, 0.5 * torch.rand(size, 1, 1, 1, generator=generator))
        yield (x + 0.05 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


@torch.no_grad()
def judge(model: nn.Module, teacher: nn.Module) -> dict[str, float]:
    """Accuracy on the held-out digits, and the mean Kullback-Leibler divergence from the float network in nats."""
    images, labels = evaluation_digits()
    y = model(images)
    loss = F.kl_div(y.log_softmax(1), teacher(images).softmax(1), reduction="batchmean")
    return {"accuracy": float((y.argmax(1) == labels).float().mean()), "divergence": float(loss)}


def ptq(scheme: dict[str, Any], *, planted: bool) -> dict[str, float]:
    """Rounded after training: scales from all 128 images, methods as `evenbits quantize` chooses them."""
    model, method = network(planted=planted), "olive" if scheme["weights"].startswith("ovp") else "rtn"
    evenbits.quantize(model, scheme=scheme, method=method, data=[calibration_digits()[0]])
    return judge(model, network(planted=planted))


def qat(scheme: dict[str, Any], seed: int, steps: int, *, planted: bool, victims: bool = True) -> dict[str, float]:
    """Trained with its roundings in evaluation mode (BatchNorm's statistics stay), converted, judged."""
    model = network(planted=planted)
    teacher = copy.deepcopy(model)
    prepare_qat(model, scheme)
    model(calibration_digits()[0])
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            module.victim_gradient = victims
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x in batches(steps, seed):
        with torch.no_grad():
            target = teacher(x).softmax(1)
        optimizer.zero_grad()
        F.kl_div(model(x).log_softmax(1), target, reduction="batchmean").backward()
        optimizer.step()
        schedule.step()
    convert_qat(model)
    return judge(model, teacher)


def relearned(seed: int, *, victims: bool, steps: int = 300) -> dict[str, float]:
    """A linear layer of pairs, taught by one whose outliers are elsewhere: relative squared error at the end."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    start, teacher, mix = normal(32, 64), normal(32, 64), normal(64, 64) / 8
    for weight in (start, teacher):
        weight[torch.rand(weight.shape, generator=generator) < 0.04] *= 10
    layer = QATLinear(nn.Parameter(start), None, "ovp4-int:row")
    layer.weight_quantizer.victim_gradient = victims
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps + 1):
        size = 2048 if step == steps else 128
        x = normal(size, 64) @ mix + 0.3 * normal(size, 64)
        y = x @ teacher.t()
        loss = (layer(x) - y).square().mean()
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return {"error": float(loss.detach() / y.square().mean())}


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation of every figure over the seeds."""
    found: dict[str, Any] = {"seeds": len(runs)}
    for key in runs[0]:
        values = [run[key] for run in runs]
        found[key] = round(statistics.mean(values), 5)
        found[f"{key}_spread"] = round(statistics.stdev(values), 5) if len(values) > 1 else 0.0
    return found


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line per network, format and way; each as soon as it is measured."""
    for victims in (True, False) if options.victims else ():
        runs = [relearned(seed, victims=victims) for seed in range(options.seeds)]
        way = "QAT" if victims else "QAT, victims without gradient"
        yield {"model": "linear, outliers elsewhere", "format": "ovp4", "way": way, **summary(runs)}
    for planted in (False, True):
        name = "DigitNet, outlier channels" if planted else "DigitNet"
        yield {"model": name, "format": "float", "way": "", **summary([judge(*[network(planted=planted)] * 2)])}
        for label, scheme in SCHEMES.items():
            if options.victims and label != "ovp4":
                continue
            line = {"model": name, "format": label, **scheme}
            yield {**line, "way": "PTQ", **summary([ptq(scheme, planted=planted)])}
            for victims in (True, False) if options.victims else (True,):
                start = time.perf_counter()
                seeds = range(options.seeds)
                runs = [qat(scheme, seed, options.steps, planted=planted, victims=victims) for seed in seeds]
                seconds = round((time.perf_counter() - start) / len(runs), 1)
                way = "QAT" if victims else "QAT, victims without gradient"
                yield {**line, "way": way, **summary(runs), "steps": options.steps, "seconds_each": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--victims", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(fingerprint()) if options.json else fingerprint(), flush=True)
    for row in rows(options):
        if options.json:
            print(json.dumps(row), flush=True)
            continue
        found = [f"{key} {row[key]:.4f} ± {row[key + '_spread']:.4f}" for key in FIGURES if key in row]
        print(f"{row['model']:27} {row['format']:7} {row['way']:30} {'   '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
