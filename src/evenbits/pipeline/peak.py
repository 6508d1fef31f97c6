"""Peak memory of one variant, in a process of its own: a process that has held another model has its peak already.

`python -m evenbits.pipeline.peak` reads one JSON object from standard input, loads, runs every batch once (and one
token behind a cache) and prints the peak before the model, after loading and in the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from evenbits.checkpoints.sources import open_model
from evenbits.errors import EvenbitsError
from evenbits.evaluation.latency import forward, is_causal, one_token, threads_of
from evenbits.evaluation.memory import peak_bytes
from evenbits.pipeline.bench_inputs import Inputs
from evenbits.pipeline.fuse import fuse
from evenbits.pipeline.variants import on_device, to_type

_LONGEST = 3600


@dataclass(frozen=True)
class Job:
    """model, factory: as `open_model` takes them; fused: as byte chains; dtype: of what is float."""

    model: str
    factory: str | None
    inputs: dict[str, Any]
    batches: tuple[int, ...]
    threads: int
    device: str
    dtype: str = "float32"
    fused: bool = False


@dataclass(frozen=True)
class Peak:
    """Bytes resident at most: before the model, with it loaded, after running it; and on the GPU, if it ran there."""

    before: int
    loaded: int
    peak: int
    gpu: int | None = None


def measured_apart(job: Job) -> Peak:
    """Runs a job in a fresh process. Raises EvenbitsError with its last words if it fails."""
    command = [sys.executable, "-m", "evenbits.pipeline.peak"]
    done = subprocess.run(
        command, input=json.dumps(asdict(job)), capture_output=True, text=True, timeout=_LONGEST, check=False
    )
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] or ["no word"]
        raise EvenbitsError(f"measuring the memory of {job.model} failed: {words[0]}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def run(job: Job) -> Peak:
    """Runs a job in this process."""
    before = peak_bytes()
    source = open_model(job.model, factory=job.factory, dtype=job.dtype)
    model = source.model.to(job.device)
    loaded, inputs = peak_bytes(), Inputs(**job.inputs)
    with threads_of(job.threads), torch.inference_mode():
        for size in job.batches:
            batch = to_type(on_device(inputs.batch(source, size), job.device), job.dtype)
            ran = fuse(model, [batch]).model if job.fused else model
            forward(ran, batch)()
            if is_causal(model) and isinstance(batch, dict) and "input_ids" in batch:
                one_token(model, batch["input_ids"])()
    gpu = torch.cuda.max_memory_allocated() if job.device == "cuda" else None
    return Peak(before, loaded, peak_bytes(), gpu)


def main() -> None:
    """Entry point of the fresh process."""
    given = json.loads(sys.stdin.read())
    given["batches"] = tuple(given["batches"])
    if given["inputs"].get("image"):
        given["inputs"]["image"] = tuple(given["inputs"]["image"])
    sys.stdout.write(json.dumps(asdict(run(Job(**given)))) + "\n")


if __name__ == "__main__":
    main()
