"""Before the first payload: every stage shows its card, and every rank reads all of them.

A card says evenbits' version, the wire's version, the codecs of both edges and the shapes and types that will travel.
They are exchanged over the job's key-value store and not over the link itself, as JSON with keys that do not change
between versions: so two versions that would misunderstand each other's messages still understand that they differ, and
every rank comes to the same words. A stage that shows no card (another stage class, a process that died) is named
after the timeout.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from evenbits._version import __version__
from evenbits.comms.wire import WIRE_VERSION, AgreedError, Edge, LinkError

Card = dict[str, Any]


def shapes(metas: Iterable[Any] | None) -> list[Any]:
    """Tensor metas → [[shape, type] or None], as a card writes them."""
    return [m and [list(m.shape), str(m.dtype).removeprefix("torch.")] for m in metas or ()]


def card(
    before: Edge | None,
    after: Edge | None,
    *,
    chunks: int,
    rungs: dict[str, int],
    step: int,
    refuses: str = "",
    delta: str = "",
    **metas: Any,
) -> Card:
    """One stage's card. rungs: {"edge.direction": rung of the ladder in use}; step: steps done so far; delta: how
    activations are delta-coded; metas: inputs, outputs, input_grads, output_grads as tensor metas or None.
    """
    return {
        "evenbits": __version__,
        "wire": WIRE_VERSION,
        "torch": torch.__version__.partition("+")[0],
        "before": before and str(before),
        "after": after and str(after),
        "microbatches": chunks,
        "rungs": rungs,
        "step": step,
        "refuses": refuses,
        "delta": delta,
        **{name: shapes(meta) for name, meta in metas.items()},
    }


def board(group: dist.ProcessGroup | None) -> Store:
    """The part of the job's store that belongs to the pipelines of this process group."""
    name = "default" if group is None else group.group_name
    return PrefixStore(f"evenbits/{name}", _get_default_store())


def show(store: Store, rank: int, cards: dict[int, Card]) -> int:
    """Put up the cards of a rank's stages and return the turn: how often this rank has shown cards so far in this job.
    All ranks of a group build their pipelines in the same order, so they count alike.
    """
    turn = int(store.add(f"turn/{rank}", 1))
    for stage, mine in cards.items():
        store.set(f"card/{turn}/{stage}", json.dumps(mine))
    return turn


def read(store: Store, stages: int, turn: int, timeout: timedelta) -> list[Card]:
    """The cards of all stages. Raises LinkError naming the stages that showed none within the timeout."""
    keys = [f"card/{turn}/{stage}" for stage in range(stages)]
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [stage for stage, key in enumerate(keys) if not store.check([key])]
        raise LinkError(
            f"stages {missing} did not show their codecs within {timeout.total_seconds():.0f} s. Every stage of a "
            "pipeline must be a CodecStage (every rank must have the hook), and every process must be alive."
        ) from error
    extended = getattr(store, "has_extended_api", lambda: False)()  # missing in torch's stubs; files have none
    found = store.multi_get(keys) if extended else [store.get(key) for key in keys]
    return [json.loads(text) for text in found]


_EVERYWHERE = (
    ("evenbits", "versions of evenbits"),
    ("wire", "wire formats"),
    ("microbatches", "numbers of microbatches"),
    ("step", "steps done"),
    ("delta", "delta coders"),
)


def disagreements(cards: list[Card]) -> list[str]:
    """What keeps these stages from working together, in words; empty if nothing does."""
    found = [f"stage {i}: {c['refuses']}" for i, c in enumerate(cards) if c["refuses"]]
    for name, words in _EVERYWHERE:
        values = {i: c.get(name) for i, c in enumerate(cards)}
        if len(set(map(str, values.values()))) > 1:
            found.append(f"{words} differ: {_by_stage(values)}")
    for i, (left, right) in enumerate(pairwise(cards)):
        for mine, theirs, words in (
            (left["after"], right["before"], "codecs"),
            (left["outputs"], right["inputs"], "activations"),
            (left["output_grads"], right["input_grads"], "gradients"),
            (_rungs(left, i), _rungs(right, i), "rungs"),
        ):
            if mine != theirs:
                found.append(f"{words} of edge {i} differ: stage {i} has {mine}, stage {i + 1} has {theirs}")
    return found


def _rungs(shown: Card, edge: int) -> dict[str, int]:
    return {name: rung for name, rung in shown["rungs"].items() if name.startswith(f"{edge}.")}


def _by_stage(values: dict[int, Any]) -> str:
    return ", ".join(f"stage {stage} has {value}" for stage, value in values.items())


def shake(group: dist.ProcessGroup | None, cards: dict[int, Card], stages: int, timeout: timedelta) -> None:
    """Show the cards of this rank's stages, read all, compare. Raises AgreedError, with the same words on every rank,
    if anything differs.
    """
    store = board(group)
    turn = show(store, dist.get_rank(group), cards)
    found = disagreements(read(store, stages, turn, timeout))
    if found:
        raise AgreedError(
            "the stages of this pipeline do not fit together: " + "; ".join(found) + ".", dist.get_world_size(group)
        )


def agree_on(group: dist.ProcessGroup | None, what: str, settings: Card, timeout: timedelta) -> None:
    """All ranks of a group show one card each; all must be equal. Raises AgreedError, on every rank, otherwise."""
    mine = {"evenbits": __version__, "wire": WIRE_VERSION, **settings}
    store = PrefixStore(what, board(group))
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    cards = read(store, world, show(store, rank, {rank: mine}), timeout)
    for name in mine:
        values = {r: c.get(name) for r, c in enumerate(cards)}
        if any(value != values[0] for value in values.values()):
            listed = ", ".join(f"rank {r} has {value}" for r, value in values.items())
            raise AgreedError(f"the ranks of this group differ in {name!r}: {listed[:1000]}.", world)
