"""Three ways to make a step: in one process, as a stage of a pipeline, as one of several replicas.

All three cut a batch into the same microbatches, add their gradients and divide by their number, so that a pipeline and
the one-process study of it go through the same numbers. The learning rate is set from outside; optimizer and codecs
keep their own state, which `state` returns for a checkpoint.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F

from evenbits.comms.ddp import QuantizedReduce
from evenbits.comms.embeddings import refusal
from evenbits.comms.feedback import ErrorFeedback
from evenbits.comms.guard import Guard
from evenbits.comms.stages import CodecStage
from evenbits.comms.telemetry import Telemetry
from evenbits.errors import EvenbitsError
from evenbits.training.chain import Chain, boundaries, stages
from evenbits.training.cuts import FakeCut
from evenbits.training.recipe import Recipe

CPU = torch.device("cpu")
SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
Inputs = tuple[Tensor, ...]


def mean_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean cross-entropy of one microbatch."""
    return F.cross_entropy(logits, classes)


class Engine(ABC):
    """This rank's part of the model. chain: its module; device: where it lies, and where inputs must; telemetry: of
    what it sends; schedule: torch's or None.
    """

    chain: Chain
    device: torch.device
    optimizer: torch.optim.Optimizer
    telemetry: Telemetry
    schedule: Any = None

    @abstractmethod
    def step(self, step: int, inputs: Inputs, classes: Tensor) -> float | None:
        """Forward, backward and the optimizer's step on one batch → mean loss, or None where the loss is not."""

    @abstractmethod
    def guesses(self, inputs: Inputs) -> Tensor | None:
        """The likeliest class of each example, int64 [N], or None where the outputs are not; N as in training."""

    @abstractmethod
    def bytes_sent(self) -> int:
        """Bytes of all messages of this rank so far, in training."""

    @abstractmethod
    def codec_state(self) -> dict[str, Any]:
        """What the codecs must remember."""

    @abstractmethod
    def load_codec_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `codec_state`."""

    def state(self) -> dict[str, Any]:
        """Weights, optimizer, codecs and random numbers of this rank."""
        return {
            "model": dict(self.chain.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "codecs": self.codec_state(),
            "random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.chain.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.load_codec_state(state["codecs"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["device_random"] is not None:
            torch.cuda.set_rng_state(state["device_random"], self.device)

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def _optimizer(recipe: Recipe, chain: nn.Module) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(chain.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    return torch.optim.SGD(chain.parameters(), lr=recipe.rate, momentum=0.9, weight_decay=recipe.decay)


class Local(Engine):
    """The whole model in this process, coded and decoded at its cuts (cuts.py); alone, or as one of several replicas
    whose gradients are coded (comms/ddp.py). BatchNorm's statistics are each replica's own, and rank 0's are kept.
    """

    def __init__(
        self, recipe: Recipe, parts: Mapping[str, nn.Module], telemetry: Telemetry, device: torch.device = CPU
    ) -> None:
        self.recipe, self.telemetry, self.device = recipe, telemetry, device
        self.guard, edge, pieces = guard_of(recipe), recipe.edge, stages(parts, recipe.cuts)
        if recipe.cuts and not edge.prune_embeddings and (why := refusal(Chain(pieces[0]), edge.forward)):
            raise EvenbitsError(f"cut {recipe.cuts[0]!r}: {why}.")
        self.cuts = [FakeCut(i, edge, telemetry, self.guard, device) for i in range(len(recipe.cuts))]
        whole: dict[str, nn.Module] = {}
        for i, stage in enumerate(pieces):
            whole.update(stage)
            if i < len(self.cuts):
                whole[f"cut{i}"] = self.cuts[i]
        self.chain = Chain(whole).to(device)
        self.optimizer = _optimizer(recipe, self.chain)
        self.model: Any = self.chain
        self.hook: QuantizedReduce | None = None
        self._before = 0
        if recipe.data_parallel:
            self.model = nn.parallel.DistributedDataParallel(self.chain)
            feedback = ErrorFeedback() if recipe.feedback else None
            self.hook = QuantizedReduce(self.chain, codec=recipe.replica_codec, feedback=feedback)
            self.hook.register(self.model)

    def step(self, step: int, inputs: Inputs, classes: Tensor) -> float:
        """One step; the loss of this replica's share."""
        count, total = self.recipe.microbatches, 0.0
        for cut in self.cuts:
            cut.begin(step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        pieces = zip(zip(*(x.chunk(count) for x in inputs), strict=True), classes.chunk(count), strict=True)
        for i, (given, wanted) in enumerate(pieces):
            alone = self.model.no_sync() if self.hook is not None and i + 1 < count else contextlib.nullcontext()
            with alone:
                loss = mean_loss(self.model(*given), wanted)
                if not bool(torch.isfinite(loss)) and self.hook is None:
                    raise diverged(step, self.recipe)
                loss.backward()
            total += float(loss.detach())
        _scale(self.chain, count)
        self.optimizer.step()
        self.telemetry.close_step()
        return total / count

    @torch.no_grad()
    def guesses(self, inputs: Inputs) -> Tensor:
        """Forward codecs included, since a pipeline would use them too."""
        self.chain.eval()
        for cut in self.cuts:
            cut.advance()
        logits = [
            self.chain(*given) for given in zip(*(x.chunk(self.recipe.microbatches) for x in inputs), strict=True)
        ]
        return torch.cat(logits).argmax(1)

    def bytes_sent(self) -> int:
        """Of gradients between replicas; without replicas, what a pipeline would have sent."""
        return self._before + (sum(cut.bytes for cut in self.cuts) if self.hook is None else self.hook.bytes_sent)

    def codec_state(self) -> dict[str, Any]:
        """Bytes so far, the hook's errors, rungs and what the guard has seen."""
        return {
            "bytes": self.bytes_sent(),
            "hook": {} if self.hook is None else self.hook.state_dict(),
            "rungs": [lane.following for cut in self.cuts for lane in cut.lanes.values()],
            "guard": {} if self.guard is None else self.guard.state(),
            "figures": {} if self.guard is None else self.telemetry.state(),
        }

    def load_codec_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `codec_state`."""
        self._before = state["bytes"]
        if self.hook is not None:
            self.hook.load_state_dict(state["hook"])
        lanes = [lane for cut in self.cuts for lane in cut.lanes.values()]
        for lane, rung in zip(lanes, state["rungs"], strict=True):
            lane.hear(rung)
        if self.guard is not None:
            self.guard.load(state["guard"])
            self.telemetry.load(state["figures"])


class Staged(Engine):
    """One stage of a pipeline; as many ranks as stages."""

    def __init__(
        self,
        recipe: Recipe,
        parts: Mapping[str, nn.Module],
        telemetry: Telemetry,
        example: Inputs,
        device: torch.device = CPU,
    ) -> None:
        self.recipe, self.telemetry, self.rank, self.device = recipe, telemetry, dist.get_rank(), device
        chains = [Chain(part) for part in stages(parts, recipe.cuts)]
        if dist.get_world_size() != len(chains):
            raise EvenbitsError(
                f"{len(recipe.cuts)} cuts ({', '.join(recipe.cuts)}) make {len(chains)} stages, one per process; there "
                f"are {dist.get_world_size()} processes. Change --nproc-per-node or --cuts."
            )
        micro = tuple(x[: recipe.batch // recipe.microbatches].cpu() for x in example)
        shapes = [tuple(_like(x, device) for x in tensors) for tensors in boundaries(chains, micro)]
        self.chain = chains[self.rank].to(device)
        self.optimizer = _optimizer(recipe, self.chain)
        self.stage = CodecStage(
            self.chain,
            self.rank,
            len(chains),
            device,
            codec=recipe.edge,
            telemetry=telemetry,
            guard=guard_of(recipe),
            input_args=shapes[self.rank],
            output_args=shapes[self.rank + 1],
        )
        self.schedule = SCHEDULES[recipe.schedule](self.stage, recipe.microbatches, loss_fn=mean_loss)
        self._before = 0

    def step(self, step: int, inputs: Inputs, classes: Tensor) -> float | None:
        """One step; the loss on the last stage. Raises LinkError on all ranks together."""
        self.chain.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        given = inputs if self.stage.is_first else ()
        if self.stage.is_last:
            self.schedule.step(*given, target=classes, losses=losses)
        else:
            self.schedule.step(*given)
        self.optimizer.step()
        self.telemetry.close_step()
        return sum(float(loss.detach()) for loss in losses) / len(losses) if losses else None

    @torch.no_grad()
    def guesses(self, inputs: Inputs) -> Tensor | None:
        """Through the same stages and forward codecs; sizes as in training. Use it after the last step."""
        self.chain.eval()
        if not self.stage.is_last:
            self.schedule.eval(*(inputs if self.stage.is_first else ()))
            return None
        # torch computes a loss in evaluation too; the classes it compares with are of no consequence.
        logits = self.schedule.eval(target=torch.zeros(self.recipe.batch, dtype=torch.long, device=self.device))
        return torch.as_tensor(logits).argmax(1)

    def bytes_sent(self) -> int:
        """Payloads and trailers of this stage, those before a resumed run included."""
        return self._before + self.stage.bytes_sent()

    def codec_state(self) -> dict[str, Any]:
        """The stage's."""
        return {"bytes": self.bytes_sent(), "stage": self.stage.codec_state()}

    def load_codec_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `codec_state`."""
        self._before = state["bytes"]
        self.stage.load_codec_state(state["stage"])


def guard_of(recipe: Recipe) -> Guard | None:
    """The guard that a recipe asks for."""
    return Guard(act=recipe.guard) if recipe.guard else None


def _like(x: Tensor, device: torch.device) -> Tensor:
    """An example tensor of a stage's boundary, on its device."""
    return torch.zeros_like(x, device=device).requires_grad_(x.requires_grad)


def _scale(chain: nn.Module, count: int) -> None:
    for parameter in chain.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(count)


def diverged(step: int, recipe: Recipe) -> EvenbitsError:
    """The error for a loss that is not finite."""
    return EvenbitsError(
        f"the loss of step {step} is NaN or infinite (rate {recipe.rate}, codecs {recipe.forward}/{recipe.backward}). "
        "Continue from the last checkpoint with a lower rate or milder codecs; the log shows SNR and DC ratio."
    )
