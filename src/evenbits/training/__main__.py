"""`python -m evenbits.training`, alone or under torchrun.

    torchrun --nproc-per-node 2 -m evenbits.training --recipe cifar10_mobilenetv2 --forward int4:g128 \
        --backward int8:g128 --data DIR --out RUN

One process: the cuts are coded and decoded in place. Several: a pipeline with one stage each, or replicas if
--data-parallel names a codec. Data come from a folder, by default that of the environment variable
EVENBITS_TEST_DATA, or ./data; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from evenbits.comms.guard import GuardWarning
from evenbits.comms.telemetry import Telemetry
from evenbits.errors import EvenbitsError
from evenbits.training.engines import Engine, Local, Staged
from evenbits.training.loop import Interrupted, Run, batch_of, rank, to_stderr
from evenbits.training.machine import DATA, data_folder, device_of, join
from evenbits.training.recipe import Recipe, read_recipe, shipped
from evenbits.training.tasks import build

HELP = {
    "task": "cifar10, cola or rte",
    "weights": "of the model, below the data folder",
    "cuts": "parts to cut after, joined by commas",
    "forward": "codec of activations, such as int4:g128, or a ladder for --guard raise: int4:g128>int8:g128",
    "backward": "codec of their gradients, or a ladder",
    "guard": "warn when a codec harms, or raise: climb the ladder",
    "prune_embeddings": "let a codec that prunes cut right behind an embedding",
    "schedule": "1f1b or gpipe",
    "data_parallel": "replicas instead of stages: codec of their gradients, +ef for error feedback",
    "batch": "examples per step",
    "microbatches": "pieces of a batch",
    "steps": "how many steps",
    "epochs": "instead of steps",
    "optimizer": "sgd or adamw",
    "rate": "learning rate at the start",
    "decay": "weight decay",
    "size": "pixels, or tokens",
    "train": "how many training examples, 0 for all",
    "test": "how many test examples, 0 for all",
    "seed": "of new weights and of the order of examples",
}


def parser() -> argparse.ArgumentParser:
    """The options: those of the run, and every value of a recipe."""
    made = argparse.ArgumentParser(
        "python -m evenbits.training", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    made.add_argument("--recipe", required=True, help=f"{', '.join(shipped())}, or a YAML file")
    made.add_argument("--data", type=Path, help=f"folder of data and weights; default: {DATA}, or ./data")
    made.add_argument("--out", type=Path, help="folder of the log and the checkpoints; without it none are written")
    made.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    made.add_argument("--telemetry-every", type=int, default=10, metavar="STEPS")
    made.add_argument("--resume", action="store_true", help="continue the run in --out")
    made.add_argument("--device", default="auto", help="cpu, cuda (one GPU per process), or auto, the default")
    made.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="of a link that stalls")
    for entry in fields(Recipe):
        if isinstance(entry.default, bool):
            flag = f"--{entry.name.replace('_', '-')}"
            made.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=HELP[entry.name])
            continue
        kind: Any = str if entry.name == "cuts" else type(entry.default)
        made.add_argument(f"--{entry.name.replace('_', '-')}", type=kind, help=HELP[entry.name])
    return made


def recipe_of(given: argparse.Namespace) -> Recipe:
    """The recipe with the values that were given. Raises EvenbitsError for wrong ones."""
    values = {entry.name: getattr(given, entry.name) for entry in fields(Recipe)}
    changes = {name: value for name, value in values.items() if value is not None}
    if "cuts" in changes:
        changes["cuts"] = tuple(name for name in changes["cuts"].split(",") if name)
    return read_recipe(given.recipe, changes)


def train(given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The run → last loss, score and bytes of this rank."""
    recipe = recipe_of(given)
    if recipe.data_parallel and not dist.is_initialized():
        raise EvenbitsError(
            "--data-parallel needs several processes: torchrun --nproc-per-node 2 -m evenbits.training …"
        )
    if recipe.data_parallel and recipe.batch % (dist.get_world_size() * recipe.microbatches):
        raise EvenbitsError(f"a batch of {recipe.batch} must divide by replicas times microbatches.")
    task, telemetry = build(recipe, data_folder(given.data)), Telemetry(every=given.telemetry_every, keep=1000)
    if dist.is_initialized() and not recipe.data_parallel:
        engine: Engine = Staged(recipe, task.parts, telemetry, batch_of(task.train, task, recipe, 0, device)[0], device)
    else:
        engine = Local(recipe, task.parts, telemetry, device)
    run = Run(recipe, task, engine, out=given.out, every=given.checkpoint_every, say=to_stderr)
    run.start(given.resume)
    loss = run.go()
    return {"loss": loss, task.metric_name: run.score(), "steps": run.done, "bytes": engine.bytes_sent()}


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """What a guard says is for the person at the terminal: one line, without a place in the source."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
            if issubclass(category, GuardWarning):
                to_stderr(f"evenbits.training: {message}")
            else:
                usual(message, category, *rest, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", GuardWarning)
        yield


def main(words: list[str] | None = None) -> int:
    """Exit code 0; 1 for errors that the user can mend; 128 + number after a signal."""
    given = parser().parse_args(words)
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        device = device_of(given.device)
        if many:
            join(device, given.timeout)
        with _plain_warnings():
            made = train(given, device)
    except Interrupted as end:
        to_stderr(f"evenbits.training: {end}")
        return 128 + end.number
    except EvenbitsError as error:
        to_stderr(f"evenbits.training: {' '.join(str(error).split())}")
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if made["loss"] is not None:
        sys.stdout.write(json.dumps({"rank": rank(), **made}) + "\n")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    raise SystemExit(main())
