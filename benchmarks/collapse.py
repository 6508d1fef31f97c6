"""Why does training break at 8 to 11 bits per tensor? Fine-tuning with quantized activations and gradients.

    python benchmarks/collapse.py --data DIR --out RUNS             # every run that RUNS does not hold yet
    python benchmarks/collapse.py --data DIR --out RUNS --size 96 --known benchmarks/results/collapse-96px.jsonl
    python benchmarks/collapse.py --out RUNS --table                # the tables of docs/collapse.md from RUNS
    python benchmarks/collapse.py --out RUNS --picture FILE.svg     # the curves
    python benchmarks/collapse.py --data DIR --out RUNS --smoke     # 20 steps of two runs

MobileNetV2 (ImageNet weights, live BatchNorm: training/mobilenet.py) is fine-tuned on CIFAR-10. At two cuts, after the
stem [B, 32, H/2, W/2] and after the last convolution [B, 1280, H/32, W/32], activations are quantized in the forward
and gradients in the backward pass (collapse_quantizers.py). Same seed, same batches and same start for every
quantizer. Every run is one JSON file; a run that exists is not made again, so that the table can be made in pieces.

Measured at every step on the gradient of the stem, before and after its quantizer: SNR, and the DC ratio |Σe| / √Σg²
(comms/telemetry.py).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from collapse_quantizers import INTERVENTIONS, METHODS, SETS, Quantizer, quantizer
from collapse_report import jsonl, report
from machine import fingerprint
from torch import Tensor, nn
from torch.nn import functional as F

from evenbits.comms.telemetry import Sums
from evenbits.training.mobilenet import load_folded, mobilenet
from evenbits.training.pictures import network_input, read_cifar10

_LAST = 50  # steps whose mean loss is the final one


@dataclass(frozen=True)
class Setting:
    """One run. method "none" has 32 bits."""

    method: str
    bits: int
    seed: int
    steps: int = 200
    size: int = 48
    batch: int = 16
    rate: float = 0.01
    train: int = 4096
    test: int = 500
    direction: str = "both"  # or "forward": activations only, "backward": gradients only

    @property
    def name(self) -> str:
        """The name of its file."""
        one_way = "" if self.direction == "both" else f"-{self.direction}"
        return f"{self.method}-{self.bits}{one_way}-seed{self.seed}-{self.size}px-{self.steps}steps"


def plan(seeds: int, **options: Any) -> Iterator[Setting]:
    """The runs, what matters most first: the coarse grids and the interventions, the same grids at other widths, then
    the other methods, with one seed the widths between, and last the interventions at 4 bits.
    """
    grids, others = ("minmax", "zero"), ("multi", "grouped")
    blocks = [(8, (*METHODS, *INTERVENTIONS), seeds), (6, (*grids, *INTERVENTIONS), seeds)]
    blocks += [(bits, grids, seeds) for bits in (4, 11, 16)]
    blocks += [(6, others, 1), *((bits, others, seeds) for bits in (4, 11, 16))]
    blocks += [(bits, METHODS, 1) for bits in (10, 12)]
    blocks += [(4, INTERVENTIONS, seeds)]
    for seed in range(seeds):
        yield Setting("none", 32, seed, **options)
    for bits, methods, count in blocks:
        for seed in range(count):
            for method in methods:
                yield Setting(method, bits, seed, **options)
    for seed in range(seeds):  # which direction hurts at 4 bits
        for method in ("minmax", "zero", "grouped"):
            for direction in ("forward", "backward"):
                yield Setting(method, 4, seed, direction=direction, **options)
    for parts in SETS:  # how many parts are reasonable at 8 bits
        for seed in range(seeds):
            yield Setting(f"multi8x{parts}", 8, seed, **options)


class Cut(nn.Module):
    """Quantizes what passes, and the gradient that comes back, where the error is measured."""

    def __init__(self, forward_by: Quantizer, backward_by: Quantizer) -> None:
        super().__init__()
        self.there, self.back, self.figures = forward_by, backward_by, list[dict[str, Any]]()

    def forward(self, x: Tensor) -> Tensor:
        """x quantized; in evaluation mode x itself is returned, since nothing crosses a link there."""
        return _Quantized.apply(x, self) if self.training else x

    def returned(self, grad: Tensor) -> Tensor:
        """The gradient quantized, and its error measured."""
        made, sums = self.back(grad), Sums()
        sums.add(grad, made)
        self.figures.append(asdict(sums.figures(len(self.figures), 0, "backward", "")))
        return made


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: Cut) -> Tensor:
        ctx.cut = cut
        return cut.there(x.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.cut.returned(grad.contiguous()), None


def cuts(setting: Setting) -> tuple[Cut, Cut]:
    """After the stem and after the last convolution."""

    def made() -> Cut:
        # An intervention changes the gradient's mean error; its activations are those of the grid it starts from.
        there, back = setting.method.partition("-")[0], setting.method
        return Cut(
            quantizer("none" if setting.direction == "backward" else there, setting.bits),
            quantizer("none" if setting.direction == "forward" else back, setting.bits),
        )

    return made(), made()


def network(setting: Setting, data: Path, pictures: Tensor) -> tuple[nn.Sequential, Cut, Cut]:
    """The model with its cuts; the same start for every quantizer of a seed."""
    torch.manual_seed(setting.seed)
    parts = mobilenet(classes=10)
    load_folded(parts, data / "mobilenetv2_imagenet" / "model.safetensors", network_input(pictures, setting.size))
    stem, head = cuts(setting)
    chain: list[nn.Module] = []
    for name, part in parts.items():
        chain += [part, *([stem] if name == "stem" else [head] if name == "features" else [])]
    return nn.Sequential(*chain).to(memory_format=torch.channels_last), stem, head


def run(setting: Setting, data: Path) -> dict[str, Any]:
    """Trains once → the curve, the figures and the accuracy, as plain data."""
    pictures, labels = read_cifar10(data / "cifar10", "train", setting.train)
    model, stem, head = network(setting, data, pictures[:: max(1, setting.train // 64)])
    norm = model[0][1]
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    draw, started = torch.Generator().manual_seed(1000 + setting.seed), time.process_time()
    curve, bias = [], [float(norm.bias.detach().norm())]
    for step in range(setting.steps):
        picked = torch.randint(len(labels), (setting.batch,), generator=draw)
        x = network_input(pictures[picked], setting.size).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels[picked])
        if not math.isfinite(float(loss.detach())):
            break
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(round(float(loss.detach()), 5))
        if step % 20 == 19:
            bias.append(round(float(norm.bias.detach().norm()), 3))
    return {
        **asdict(setting),
        **outcome(setting, curve, model, data),
        "bias_norm": bias,
        "stem": summary(stem),
        "head": summary(head),
        "curve": curve,
        "cpu_seconds": round(time.process_time() - started, 1),
        "machine": fingerprint(),
    }


def outcome(setting: Setting, curve: list[float], model: nn.Module, data: Path) -> dict[str, Any]:
    """Final loss and test accuracy."""
    whole = len(curve) == setting.steps
    last = curve[-_LAST:]
    return {
        "finished": whole,
        "loss": statistics.fmean(last) if whole else None,
        "accuracy": accuracy(setting, model, data) if whole else None,
    }


@torch.no_grad()
def accuracy(setting: Setting, model: nn.Module, data: Path) -> float:
    """Share of right answers on test pictures, in evaluation mode and without quantization."""
    pictures, labels = read_cifar10(data / "cifar10", "test", setting.test)
    model.eval()
    right = 0
    for start in range(0, len(labels), 50):
        x = network_input(pictures[start : start + 50], setting.size)
        right += int((model(x).argmax(1) == labels[start : start + 50]).sum())
    return right / len(labels)


def summary(cut: Cut) -> dict[str, Any]:
    """Medians over the run and over its first and last quarter, for the gradient at one cut."""
    found = cut.figures

    def middle(key: str, part: list[dict[str, Any]]) -> float | None:
        values = [f[key] for f in part if f[key] is not None]
        return statistics.median(values) if values else None

    quarter = max(1, len(found) // 4)
    spans: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "": lambda: found,
        "_first": lambda: found[:quarter],
        "_last": lambda: found[-quarter:],
    }
    keys = ("snr_db", "dc_ratio", "zeros")
    values = {key + span: middle(key, part()) for key in keys for span, part in spans.items()}
    return {**values, "dc_ratio_max": max((f["dc_ratio"] for f in found), default=None)}


def read(out: Path) -> list[dict[str, Any]]:
    """The runs of a folder (a JSON file each) or of a file (a line each)."""
    if out.is_dir():
        return [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    return read_lines(out.read_text())


def read_lines(text: str) -> list[dict[str, Any]]:
    """The runs of a JSON-lines file."""
    return [json.loads(line) for line in text.splitlines()]


def tell(given: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    """What was asked for of the runs that exist."""
    if given.table:
        print(report(runs))
    if given.lines:
        given.lines.write_text(jsonl(runs), encoding="utf-8")
    if given.picture:
        from collapse_picture import draw

        draw(runs, given.picture)


def chosen(settings: list[Setting], patterns: list[str] | None) -> list[Setting]:
    """The runs that fit the patterns, the first pattern's first; all of them without patterns."""
    if patterns is None:
        return settings
    found = [setting for pattern in patterns for setting in settings if fnmatch(setting.name, pattern)]
    if not found:
        raise SystemExit(f"--only {' '.join(patterns)}: no run is called so; {settings[0].name} is one")
    return list(dict.fromkeys(found))


def main() -> None:
    """Makes the runs that are missing, or prints the report of those that exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds cifar10 and mobilenetv2_imagenet")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the runs, one JSON file each; or a JSON-lines file"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=48, help="pixels")
    parser.add_argument("--table", action="store_true", help="print the tables and make no run")
    parser.add_argument("--known", type=Path, help="JSON-lines file of runs that need not be made again")
    parser.add_argument("--lines", type=Path, help="write the runs into one JSON-lines file")
    parser.add_argument("--picture", type=Path, help="draw the curves")
    parser.add_argument("--only", action="append", help="runs whose name fits this pattern (*), repeatable, in order")
    parser.add_argument("--smoke", action="store_true", help="two runs of 20 steps, for the tests")
    given = parser.parse_args()
    if given.table or given.picture or given.lines:
        tell(given, read(given.out))
        return
    if given.data is None:
        parser.error("--data names the folder of the data; nothing is downloaded")
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for known in read(given.known) if given.known else ():
        named = Setting(**{field.name: known[field.name] for field in fields(Setting) if field.name in known}).name
        (given.out / f"{named}.json").write_text(json.dumps(known), encoding="utf-8")
    settings = list(plan(given.seeds, steps=given.steps, size=given.size))
    if given.smoke:
        small = {"steps": 20, "size": 32, "batch": 8, "train": 128, "test": 50}
        settings = [Setting(method, 8, 0, **small) for method in ("minmax", "zero")]
    for setting in chosen(settings, given.only):
        file = given.out / f"{setting.name}.json"
        if file.exists():
            continue
        made = run(setting, given.data)
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(made), encoding="utf-8")
        unfinished.replace(file)
        print(f"{setting.name}: loss {made['loss']}, accuracy {made['accuracy']}, {made['cpu_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
