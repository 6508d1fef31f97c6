"""Sentences: what quantized and pruned traffic does to CoLA and RTE.

    python benchmarks/glue_traffic.py --data DIR --out RUNS             # every run that RUNS does not hold yet
    python benchmarks/glue_traffic.py --out RUNS --report               # the tables of docs/training.md from RUNS
    python benchmarks/glue_traffic.py --data DIR --out RUNS --smoke     # four steps of two runs

The upper half of MiniLM (six layers, fine-tuned on SST-2 before) is fine-tuned through the package's own loop in one
process, cut after its fourth and fifth layer: what would cross a link between three stages is coded and decoded there,
activations forward and gradients backward, in training and in the test (training/cuts.py). Same seed, same start, same
batches for every setting. "quant" is a min/max grid per tensor without a zero, and "prune" keeps the larger half and
sends the gradient on the same elements, as in the experiment that is repeated. One JSON file per run; a run that exists
is not made again.

To fit one core, embedding and lower half are frozen (their outputs are computed once and kept as float16), matrix
products take bfloat16 inputs, and sentences are cut short; the same for every setting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from machine import fingerprint
from torch.nn.attention import SDPBackend, sdpa_kernel

from evenbits.comms.telemetry import Telemetry
from evenbits.errors import EvenbitsError
from evenbits.training.chain import Chain
from evenbits.training.engines import Inputs, Local
from evenbits.training.loop import Interrupted, Run, to_stderr
from evenbits.training.recipe import Recipe, read_recipe
from evenbits.training.tasks import Examples, Task, build

SETTINGS = {
    "none": "raw",
    "quant 4": "uint4:tensor:affine:free",
    "quant 8": "uint8:tensor:affine:free",
    "prune 0.5": "top0.5+raw",
    "multi 8 × 8": "multi8x8",
    "multi 4 × 16": "multi4x16",
    "prune 0.5, quant 8": "top0.5+uint8:tensor:affine:free",
    "prune 0.5, quant 4": "top0.5+uint4:tensor:affine:free",
    "prune 0.5, multi 8 × 8": "top0.5+multi8x8",
    "prune 0.5, multi 4 × 16": "top0.5+multi4x16",
    "quant 10": "uint10:tensor:affine:free",
    "quant 16": "uint16:tensor:affine:free",
    "quant 4, zero on the grid": "uint4:tensor:affine",
    "groups of 128, 4 bits": "int4:g128",
}
TASKS: dict[str, dict[str, Any]] = {
    "cola": {"size": 16, "batch": 32, "steps": 532, "rate": 2e-4, "test": 0},
    "rte": {"size": 64, "batch": 16, "steps": 240, "rate": 6e-5, "test": 800},
}
CUTS = ("layer3", "layer4")
FROZEN = ("embedding", "layer0", "layer1", "layer2")


@dataclass(frozen=True)
class Job:
    """One run: a task, one of SETTINGS, a seed and how many steps."""

    task: str
    setting: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """The name of its file."""
        words = "".join(c if c.isalnum() or c == "." else "-" for c in self.setting.replace(" × ", "x"))
        return f"{self.task}-{words.replace('--', '-')}-seed{self.seed}-{self.steps}steps"

    def recipe(self, changes: dict[str, Any]) -> Recipe:
        """The package's recipe with this run's codec."""
        codec = SETTINGS[self.setting]
        values = {**TASKS[self.task], "task": self.task, "steps": self.steps, "seed": self.seed, "cuts": CUTS}
        return read_recipe(
            "text_classification", {**values, "forward": codec, "backward": codec, "microbatches": 1, **changes}
        )


class Heard(Local):
    """The engine of one process, with a faster optimizer of the same rule, and the losses kept."""

    def __init__(self, recipe: Recipe, parts: Any, telemetry: Telemetry) -> None:
        super().__init__(recipe, parts, telemetry)
        self.optimizer = torch.optim.AdamW(
            self.chain.parameters(), lr=recipe.rate, weight_decay=recipe.decay, fused=True
        )
        self.curve: list[float] = []

    def step(self, step: int, inputs: Inputs, classes: torch.Tensor) -> float:
        """One step, its loss kept."""
        loss = super().step(step, inputs, classes)
        self.curve.append(round(loss, 5))
        return loss


def plan(tasks: list[str], seeds: int) -> Iterator[Job]:
    """The runs, seed by seed, so that an unfinished table has whole columns."""
    for seed in range(seeds):
        for task in tasks:
            for setting in SETTINGS:
                yield Job(task, setting, seed, TASKS[task]["steps"])


@cache
def examples(task: str, size: int, train: int, test: int, data: Path) -> tuple[Examples, Examples]:
    """A task's training and test examples behind the frozen parts: float16 [N, T, C] and marks [N, T]."""
    made = build(read_recipe("text_classification", {"task": task, "size": size, "train": train, "test": test}), data)
    below = Chain({name: made.parts[name] for name in FROZEN}).eval()

    @torch.no_grad()
    def behind(found: Examples) -> Examples:
        pieces = [below(*given) for given in zip(*(x.split(64) for x in found.inputs), strict=True)]
        return Examples((torch.cat([h.half() for h, _ in pieces]), found.inputs[1]), found.labels)

    return behind(made.train), behind(made.test)


def upper(recipe: Recipe, data: Path) -> Task:
    """The task of what is trained: parts above the frozen ones, examples behind them."""
    train, test = examples(recipe.task, recipe.size, recipe.train, recipe.test, data)
    whole = build(replace(recipe, train=recipe.batch, test=1), data)  # of its examples none is used
    parts = {name: part for name, part in whole.parts.items() if name not in FROZEN}
    return replace(whole, parts=parts, train=train, test=test, ready=lambda x: (x[0].float(), x[1]))


def run(job: Job, data: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Trains once → the curve, the score and the codecs' figures, as plain data."""
    recipe, started = job.recipe(changes), time.process_time()
    task, telemetry = upper(recipe, data), Telemetry(every=10)
    engine = Heard(recipe, task.parts, telemetry)
    whole, error, score = Run(recipe, task, engine, out=None, every=0, say=to_stderr), "", None
    try:
        whole.go()
        score = whole.score()
    except Interrupted:  # and one that was stopped is none
        raise
    except EvenbitsError as fault:  # a run that diverged is a result
        error = str(fault)
    common = float(task.test.labels.bincount().max()) / len(task.test.labels)
    last = engine.curve[-max(1, recipe.steps // 5) :]
    return {
        **asdict(job),
        "recipe": asdict(recipe),
        "error": error,
        "metric": task.metric_name,
        "score": score,
        "test_examples": len(task.test.labels),
        "commonest_class": common,
        "loss": statistics.fmean(last) if last else None,
        "lanes": {f"{d}{e}": lane(telemetry, e, d) for e in range(len(CUTS)) for d in ("forward", "backward")},
        "bytes": engine.bytes_sent(),
        "curve": engine.curve,
        "cpu_seconds": round(time.process_time() - started, 1),
        "machine": fingerprint(),
    }


def lane(telemetry: Telemetry, edge: int, direction: str) -> dict[str, float | None]:
    """Medians over the measured steps of one cut and direction."""
    found = [f for f in telemetry.history if f.edge == edge and f.direction == direction]

    def middle(key: str) -> float | None:
        values = [getattr(f, key) for f in found if getattr(f, key) is not None]
        return statistics.median(values) if values else None

    return {key: middle(key) for key in ("snr_db", "dc_ratio", "bits_per_element")}


def report(runs: list[dict[str, Any]]) -> str:
    """Markdown: one table per task, one line per setting, one figure per seed."""
    made = []
    for task in TASKS:
        mine = [r for r in runs if r["task"] == task]
        if mine:
            made.append("\n".join(table(mine)))
    return "\n\n".join(made)


def table(runs: list[dict[str, Any]]) -> list[str]:
    """The lines of one task. Bits and SNR are of the first cut; the last column is the larger ratio of both cuts."""
    figure = runs[0]["metric"]
    titles = ("setting", "bits, forward and backward", figure, "mean", "final loss", "SNR dB forward", "backward")
    lines = [f"| {' | '.join((*titles, 'DC ratio backward'))} |", "|" + "---|" * (len(titles) + 1)]
    for setting in SETTINGS:
        same = sorted((r for r in runs if r["setting"] == setting), key=lambda r: r["seed"])
        if not same:
            continue
        scores = [r["score"] for r in same if r["score"] is not None]
        bits = [text(same[0]["lanes"][f"{d}0"]["bits_per_element"], 2) for d in ("forward", "backward")]
        ratios = [[r["lanes"][f"backward{e}"]["dc_ratio"] for e in range(len(CUTS))] for r in same]
        largest = [max((x for x in pair if x is not None), default=None) for pair in ratios]
        cells = [
            setting,
            ", ".join(bits),
            " ".join(text(r["score"], 3) for r in same),
            text(statistics.fmean(scores) if scores else None, 3),
            " ".join(text(r["loss"], 3) for r in same),
            *(" ".join(text(r["lanes"][f"{d}0"]["snr_db"], 1) for r in same) for d in ("forward", "backward")),
            " ".join(text(x, 2) for x in largest),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def text(value: float | None, digits: int) -> str:
    """A figure, or a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"


def main() -> None:
    """Makes the runs that are missing, or prints the report of those that exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds cola, rte and minilm_glue")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, one JSON file each")
    parser.add_argument("--tasks", default="cola,rte")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="print the tables and make no run")
    parser.add_argument("--smoke", action="store_true", help="two runs of four steps, for the tests")
    given = parser.parse_args()
    if given.report:
        print(report([json.loads(path.read_text()) for path in sorted(given.out.glob("*.json"))]))
        return
    if given.data is None:
        parser.error("--data names the folder of the data; nothing is downloaded")
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    given.out.mkdir(parents=True, exist_ok=True)
    jobs, changes = list(plan(given.tasks.split(","), given.seeds)), {}
    if given.smoke:
        jobs, changes = [Job("cola", s, 0, 4) for s in ("none", "quant 4")], {"batch": 8, "train": 64, "test": 32}
    for job in jobs:
        file = given.out / f"{job.name}.json"
        if file.exists():
            continue
        # Masked attention over so few tokens is three times faster as plain products.
        with sdpa_kernel(SDPBackend.MATH):
            made = run(job, given.data, changes)
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(made), encoding="utf-8")
        unfinished.replace(file)
        print(f"{job.name}: {made['metric']} {text(made['score'], 3)}, {made['cpu_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
