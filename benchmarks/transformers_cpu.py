"""BERT-base and OPT-125M (random weights): evenbits beside torch, OpenVINO, ONNX Runtime, torchao and others.

    python benchmarks/transformers_cpu.py [--peers PYTHON] [--threads 1] [--rounds 12] [--model bert] [--variant TEXT]
                                          [--json FILE]

--peers names a Python of an environment of its own for what is not torch, because such packages bring other versions:

    python -m venv peers && peers/bin/pip install torch transformers onnx onnxscript onnxruntime openvino nncf
    peers/bin/pip install --no-deps torchao bitsandbytes optimum-quanto ninja -e .

Every variant lives in a process of its own (transformers_worker.py), and they run by turns, one call at a time,
forwards and backwards, while the others wait. One thread: CPU time of the process, 25th percentile; more: least wall
time, which needs a quiet machine. A variant that cannot be installed or run is a row that says why.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import fingerprint
from transformers_worker import COMPILED, GRAPHS, MODULES, TASKS

from evenbits.kernels import report

WORKER = Path(__file__).with_name("transformers_worker.py")
PEERS = ("torchao", "bitsandbytes", "optimum-quanto", "ONNX Runtime", "OpenVINO")
SLOW = 3.0  # seconds
PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "nncf", "torchao", "bitsandbytes", "optimum-quanto")
VARIANTS = (
    *MODULES,
    *(COMPILED + name for name in ("torch float32", "torch bfloat16", "evenbits W8A8", "evenbits W4A8_OVP")),
    COMPILED + "torchao int8 dynamic",
    *GRAPHS,
)


@dataclass
class Worker:
    """A process with one variant of a model, and the seconds of its tasks."""

    process: subprocess.Popen[str]
    decibels: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def answer(self) -> Any:
        """The next line, or EOFError if the process has gone."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"its process ended with exit code {self.process.wait()}")
        return json.loads(line)

    def call(self, task: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        return float(self.answer())

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def is_peer(variant: str) -> bool:
    return variant.removeprefix(COMPILED).startswith(PEERS)


def started(python: str, variant: str, model: str, threads: int, log: Path) -> Worker:
    """A worker that is ready, or whose `wrong` says why not."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    with log.open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [python, str(WORKER), variant, model, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    worker = Worker(process)
    try:
        ready = worker.answer()
    except EOFError as error:
        worker.wrong = {task: str(error) for task in TASKS[model]}
        return worker
    worker.decibels, worker.wrong = ready["decibels"], ready["wrong"]
    worker.seconds = {task: [] for task in ready["tasks"]}
    return worker


def measured(model: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model: all its tasks, all variants."""
    workers: dict[str, Worker] = {}
    rows: list[dict[str, Any]] = []
    try:
        for variant in (name for name in VARIANTS if wanted(name, given.variant)):
            if is_peer(variant) and given.peers is None:
                rows += [missing(task, variant, "not measured: no --peers") for task in TASKS[model]]
                continue
            python = given.peers if is_peer(variant) else sys.executable
            workers[variant] = started(python, variant, model, given.threads, given.log)
            print(f"{model}: {variant}: {workers[variant].wrong or 'ready'}", file=sys.stderr, flush=True)
        for task in TASKS[model]:
            alternate({name: worker for name, worker in workers.items() if task in worker.seconds}, task, given.rounds)
            rows += [row(task, name, worker, given.threads) for name, worker in workers.items()]
    finally:
        for worker in workers.values():
            worker.end()
    return rows


def wanted(variant: str, texts: list[str] | None) -> bool:
    return texts is None or variant == "torch float32" or any(text in variant for text in texts)


def alternate(workers: dict[str, Worker], task: str, rounds: int) -> None:
    """Each worker once a round, forwards and backwards by turns; the first two rounds do not count, and of calls that
    take seconds three do."""
    for turn in range(rounds + 2):
        for name in list(workers) if turn % 2 else list(workers)[::-1]:
            taken = workers[name].seconds[task]
            if len(taken) >= 3 and min(taken) > SLOW:
                continue
            try:
                seconds = workers[name].call(task)
            except (EOFError, OSError) as error:
                workers[name].wrong[task] = str(error)
                workers[name].seconds.pop(task)
                del workers[name]
                continue
            if turn > 1:
                taken.append(seconds)


def row(task: str, variant: str, worker: Worker, threads: int) -> dict[str, Any]:
    times = sorted(worker.seconds.get(task, []))
    if not times:
        return missing(task, variant, worker.wrong.get(task, "no sample"))
    low, middle, high = (times[len(times) * share // 4] for share in (1, 2, 3))
    typical = low if threads == 1 else times[0]
    found = {"ms": 1e3 * typical, "quartiles_ms": [1e3 * low, 1e3 * middle, 1e3 * high], "samples": len(times)}
    return {"task": task, "variant": variant, **found, "decibels": worker.decibels.get(task)}


def missing(task: str, variant: str, why: str) -> dict[str, Any]:
    return {"task": task, "variant": variant, "ms": None, "why": why}


def show(model: str, rows: list[dict[str, Any]]) -> None:
    """Tables in Markdown: times float32 of the same task and run."""
    for task in TASKS[model]:
        here = [row for row in rows if row["task"] == task]
        base = next(row["ms"] for row in here if row["variant"] == "torch float32")
        print(f"\n| {model}, {task} | ms | quartiles | × float32 | dB to float32 |\n|---|---|---|---|---|")
        for found in here:
            if found["ms"] is None:
                print(f"| {found['variant']} | – | {found['why']} | – | – |")
                continue
            low, _, high = found["quartiles_ms"]
            near = "exact" if found["decibels"] > 200 else f"{found['decibels']:.0f}"
            spread = f"{found['ms']:.1f} | {low:.1f} … {high:.1f}"
            print(f"| {found['variant']} | {spread} | {base / found['ms']:.2f} | {near} |")
    sys.stdout.flush()


def versions(python: str) -> dict[str, str]:
    """Package → version in another Python."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "print(json.dumps({n: found[n] for n in sys.argv[1:] if n in found}))"
    )
    done = subprocess.run([python, "-c", code, *PACKAGES], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", metavar="PYTHON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--model", choices=TASKS, action="append")
    parser.add_argument("--variant", action="append", help="Only variants with this text (and float32). Repeatable.")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="What the variants print.")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = "CPU time, 25th percentile" if given.threads == 1 else "least wall time"
    print(f"{given.threads} thread(s), {clock} of {given.rounds} rounds, {report()[0].reason}")
    found = {}
    for model in given.model or TASKS:
        found[model] = measured(model, given)
        show(model, found[model])
    known = {"here": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}}
    if given.peers:
        known["peers"] = versions(given.peers)
    print("\n" + "; ".join(f"{where}: {' '.join(map(' '.join, names.items()))}" for where, names in known.items()))
    if given.json:
        data = {"machine": fingerprint(), "threads": given.threads, "versions": known, "rows": found}
        given.json.write_text(json.dumps(data), encoding="utf-8")


if __name__ == "__main__":
    main()
