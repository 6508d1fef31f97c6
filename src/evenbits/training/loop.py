"""Steps, log, checkpoints, and an end that can be continued from.

    OUT/run.json              the recipe and the number of ranks; a resumed run must have the same
    OUT/log-rank0.jsonl       a line per step: step, loss, seconds, bytes sent so far, and the codecs' figures
    OUT/checkpoints/…         state.py

A resumed run equals one that was not interrupted bit by bit: weights, optimizer, random numbers, codec state and the
order of examples. Lines of the log that lie after the checkpoint are removed, and written again.

SIGTERM and Ctrl-C end the run after the current step, with a checkpoint. All ranks agree on that in a reduction of one
number per step, which also carries a loss that is not finite, so that no rank waits for one that has gone.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from evenbits.comms.faults import one_error
from evenbits.errors import CheckpointError, EvenbitsError
from evenbits.training import state
from evenbits.training.engines import Engine, Inputs, diverged
from evenbits.training.recipe import Recipe
from evenbits.training.tasks import Examples, Task, order

Say = Callable[[str], None]


class Interrupted(EvenbitsError):
    """The run was asked to end; it has left a checkpoint. number: of the signal."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"interrupted after step {step}; the same command with --resume continues from there.")
        self.number = number


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def steps_of(recipe: Recipe, task: Task) -> int:
    """How many steps the recipe asks for."""
    return recipe.epochs * max(1, len(task.train.labels) // recipe.batch) if recipe.epochs else recipe.steps


def batch_of(
    examples: Examples, task: Task, recipe: Recipe, step: int, device: torch.device
) -> tuple[Inputs, torch.Tensor]:
    """One step's inputs and classes on `device`; a replica's share of them."""
    if len(examples.labels) < recipe.batch:
        raise EvenbitsError(f"{len(examples.labels)} training examples do not fill a batch of {recipe.batch}.")
    picked = order(examples, recipe.seed, step, recipe.batch)
    if recipe.data_parallel:
        picked = picked[rank() :: world()]
    return task.ready(tuple(x[picked].to(device) for x in examples.inputs)), examples.labels[picked].to(device)


class Run:
    """One run of an engine. out: its folder, None to write nothing; every: steps between checkpoints, 0 for none before
    the end; say: takes a line of progress now and then.
    """

    def __init__(self, recipe: Recipe, task: Task, engine: Engine, *, out: Path | None, every: int, say: Say) -> None:
        self.recipe, self.task, self.engine = recipe, task, engine
        self.out, self.every, self.say = out, every, say
        self.total, self.done, self.stopping = steps_of(recipe, task), 0, 0
        self.settings = {"recipe": json.loads(json.dumps(asdict(recipe))), "ranks": world()}

    def start(self, resume: bool) -> None:
        """Continue from the newest checkpoint, or claim an empty folder.

        Raises CheckpointError if the folder holds a run and `resume` was not asked for, or another run.
        """
        if self.out is None:
            return
        note, last = self.out / "run.json", state.newest(self.out)
        if note.exists():
            self._same(json.loads(note.read_text(encoding="utf-8")), resume)
        self._meet()  # No rank may find what rank 0 writes now.
        if rank() == 0 and not note.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps(self.settings, indent=1), encoding="utf-8")
        if last is not None:
            kept = state.read(last / f"rank{rank()}.safetensors")
            self.engine.load(kept["engine"])
            self.done = kept["step"]
            self.say(f"continues after step {self.done}")
        self._forget_later_lines()

    def _same(self, before: dict[str, Any], resume: bool) -> None:
        if not resume:
            raise CheckpointError(f"{self.out} holds a run; add --resume to continue it, or name another folder.")
        flat = [{"ranks": given["ranks"], **given["recipe"]} for given in (before, self.settings)]
        differing = [key for key in flat[1] if flat[0].get(key) != flat[1][key]]
        if differing:
            key = differing[0]
            raise CheckpointError(
                f"the run in {self.out} has {key} = {flat[0].get(key)!r}, this command {flat[1][key]!r}; a run is "
                "continued with the settings it began with."
            )

    def _log(self) -> Path:
        assert self.out is not None
        return self.out / f"log-rank{rank()}.jsonl"

    def _forget_later_lines(self) -> None:
        file = self._log()
        if file.exists():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            file.write_text("".join(line for line in whole if json.loads(line)["step"] < self.done), encoding="utf-8")

    def go(self) -> float | None:
        """The steps that are left → the last loss, None where the loss is not.

        Raises Interrupted after a signal, and EvenbitsError if the loss is not finite.
        """
        loss, began, first = None, time.monotonic(), self.done
        with self._listening():
            while self.done < self.total:
                started = time.monotonic()
                loss = self._step()
                self._write(loss, time.monotonic() - started)
                self.done += 1
                stop = self._agreed()
                if stop or self.done == self.total or (self.every and self.done % self.every == 0):
                    self.save()
                if stop:
                    raise Interrupted(stop, self.done)
                self._progress(loss, (time.monotonic() - began) / (self.done - first))
        return loss

    def _step(self) -> float | None:
        step, recipe = self.done, self.recipe
        self.engine.set_rate(recipe.rate * (1 + math.cos(math.pi * step / self.total)) / 2)
        inputs, classes = batch_of(self.task.train, self.task, recipe, step, self.engine.device)
        with self._together():
            return self.engine.step(step, inputs, classes)

    def _together(self) -> AbstractContextManager[None]:
        """Whatever stops one rank becomes one error on all of them."""
        return one_error(self.engine.schedule) if dist.is_initialized() else nullcontext()

    def _meet(self) -> None:
        if dist.is_initialized():
            with self._together():
                dist.barrier()

    def _largest(self, number: int) -> int:
        """Of all ranks' numbers."""
        if not dist.is_initialized():
            return number
        found = torch.tensor(number, device=self.engine.device)
        with self._together():
            dist.all_reduce(found, dist.ReduceOp.MAX)
            return int(found)

    def _agreed(self) -> int:
        """The signal that any rank has heard, or 0."""
        return self._largest(self.stopping)

    def _write(self, loss: float | None, seconds: float) -> None:
        """The line of a step. A loss that is not finite ends the run on all ranks."""
        if self._largest(0 if loss is None or math.isfinite(loss) else 1):
            raise diverged(self.done, self.recipe)
        if self.out is None:
            return
        figures = [asdict(f) for f in self.engine.telemetry.history if f.step == self.done]
        line = {"step": self.done, "loss": loss, "seconds": seconds, "bytes": self.engine.bytes_sent()}
        with self._log().open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "codecs": figures}, allow_nan=False) + "\n")

    def _progress(self, loss: float | None, pace: float) -> None:
        if loss is None or (self.recipe.data_parallel and rank()):
            return
        if self.done % max(1, self.total // 20) == 0 or self.done == self.total:
            left = round(pace * (self.total - self.done))
            clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
            codecs = self.engine.telemetry.brief()
            self.say(f"step {self.done}/{self.total}  loss {loss:.4f}  {codecs}{pace:.3f} s/step  {clock} left")

    def save(self) -> None:
        """A checkpoint of all ranks."""
        if self.out is None:
            return
        folder = state.folder_of(self.out, self.done)
        state.write(folder / f"rank{rank()}.safetensors", {"step": self.done, "engine": self.engine.state()})
        self._meet()
        if rank() == 0:
            state.complete(folder)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def heard(number: int, _frame: Any) -> None:
            self.stopping = number

        before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def score(self) -> float | None:
        """The task's figure on its test examples, where the outputs are; None elsewhere. Forward codecs included."""
        test, size = self.task.test, self.recipe.batch // (world() if self.recipe.data_parallel else 1)
        found: list[torch.Tensor] = []
        for start in range(0, len(test.labels), size):
            picked = torch.arange(start, start + size).clamp(max=len(test.labels) - 1)  # every batch has one size
            stored = tuple(x[picked].to(self.engine.device) for x in test.inputs)
            with self._together():
                guesses = self.engine.guesses(self.task.ready(stored))
            if guesses is not None:
                found.append(guesses.cpu())
        return self.task.metric(torch.cat(found)[: len(test.labels)], test.labels) if found else None


def to_stderr(line: str) -> None:
    """A line for the person at the terminal."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
