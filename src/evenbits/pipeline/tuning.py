"""Drives the searches of a balance method: one walk over the data serves the open candidates of every region.

    region, parallel     all regions at once: as many walks as the longest search has rounds
    region, sequential   block by block in the order of the forward; what is chosen stands in the model while later
                         blocks are tuned, so that they see quantized inputs (dynamic α)
    block                the searches of a block's regions are sent the same losses, those of the block's output, and
                         so choose alike

A block is a child of the first list of modules that holds two of the regions apart; a region that belongs to none is a
block of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from evenbits.algorithms.alpha import Search
from evenbits.algorithms.base import Rebalance
from evenbits.graph.regions import Region
from evenbits.pipeline.trials import Trials, Walk, replaced


def tune(
    trials: Trials, regions: Sequence[Region], searches: Mapping[str, Search], *, progress: bool = False
) -> dict[str, Rebalance]:
    """Runs the searches (region name → search) to their end. Returns region name → choice."""
    tuning = trials.methods.tuning
    if tuning.scope == "region" and not tuning.sequential:
        return _rounds(trials, "", regions, searches, progress=progress)
    found: dict[str, Rebalance] = {}
    with ExitStack() as stack:
        for block, members in blocks(trials.model, regions):
            shared = block if tuning.scope == "block" else ""
            found |= _rounds(trials, shared, members, {r.name: searches[r.name] for r in members}, progress=progress)
            if tuning.sequential:
                for region in members:
                    stack.enter_context(replaced(trials.model, trials.build(region, found[region.name])))
    return found


def _rounds(
    trials: Trials, block: str, regions: Sequence[Region], searches: Mapping[str, Search], *, progress: bool
) -> dict[str, Rebalance]:
    pending = {region.name: next(searches[region.name]) for region in regions}
    found: dict[str, Rebalance] = {}
    rounds = 0
    while pending:
        rounds += 1
        open_regions = [region for region in regions if region.name in pending]
        walk = _watched_walk(f"tuning {block or 'α'}, round {rounds}", trials.watched.batches, progress)
        if block:
            shared = trials.by_block(block, open_regions, pending, walk)
            losses = {region.name: [[loss] for loss in shared] for region in open_regions}
        else:
            losses = trials.by_layer(open_regions, pending, walk)
        for name, sent in losses.items():
            try:
                pending[name] = searches[name].send(sent)
            except StopIteration as end:
                found[name] = end.value
                del pending[name]
    return found


def _watched_walk(label: str, total: int, progress: bool) -> Walk:
    def walk(runs: Iterator[Callable[[], Any]]) -> Iterator[Callable[[], Any]]:
        return iter(tqdm(runs, desc=label, total=total, unit="batch", leave=False, disable=not progress or None))

    return walk


def blocks(model: nn.Module, regions: Sequence[Region]) -> list[tuple[str, list[Region]]]:
    """Regions by block, in the order of the forward. The name of a block of one region alone is ""."""
    root = _block_root(model, regions)
    found: list[tuple[str, list[Region]]] = []
    for region in regions:
        homes = {_block_of(name, root) for name in region.layers}
        block = homes.pop() if len(homes) == 1 else ""
        known = next((members for name, members in found if name == block and block), None)
        if known is None:
            found.append((block, [region]))
        else:
            known.append(region)
    return found


def _block_root(model: nn.Module, regions: Sequence[Region]) -> str | None:
    root: str
    names = [name for region in regions for name in region.layers]
    for root, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            inside = {_block_of(name, root) for name in names} - {""}
            if len(inside) > 1:
                return root
    return None


def _block_of(name: str, root: str | None) -> str:
    prefix = f"{root}." if root else ""
    if root is None or not name.startswith(prefix):
        return ""
    return prefix + name[len(prefix) :].partition(".")[0]
