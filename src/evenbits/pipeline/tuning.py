"""Drives the searches of a balance method: one walk over the data serves the open candidates of every region.

    region, parallel     all regions at once: as many walks as the longest search has rounds
    region, sequential   block by block in the order of the forward; what is chosen stands in the model while later
                         blocks are tuned, so that they see quantized inputs (dynamic α)
    block                the searches of a block's regions are sent the same losses, those of the block's output, and
                         so choose alike

A block is a child of a list of modules (ModuleList, Sequential) that holds regions apart, of the outermost such: a
ResNet's stages, an encoder and a decoder are several lists. A region that belongs to no block, or to several, is a
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
    roots = _block_roots(model, regions)
    found: list[tuple[str, list[Region]]] = []
    for region in regions:
        homes = {_block_of(name, roots) for name in region.layers}
        block = homes.pop() if len(homes) == 1 else ""
        known = next((members for name, members in found if name == block and block), None)
        if known is None:
            found.append((block, [region]))
        else:
            known.append(region)
    return found


def _block_roots(model: nn.Module, regions: Sequence[Region]) -> list[str]:
    """The lists whose children are blocks: outermost ones that hold layers of two regions apart, or all there is in one
    child."""
    names = [name for region in regions for name in region.layers]
    found: list[str] = []
    single: list[str] = []
    for root, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or _under(root, found):
            continue
        inside = {_block_of(name, [root]) for name in names} - {""}
        # A list of lists has no children that run: theirs are the blocks.
        if any(isinstance(model.get_submodule(child), nn.ModuleList) for child in inside):
            continue
        if len(inside) > 1:
            found.append(root)
        elif inside and not inside & set(names):
            single.append(root)
    for root in single:
        if not _under(root, found) and not any(_under(other, [root]) for other in found):
            found.append(root)
    return found


def _under(name: str, roots: Sequence[str]) -> bool:
    return any(root == "" or name.startswith(f"{root}.") for root in roots)


def _block_of(name: str, roots: Sequence[str]) -> str:
    for root in roots:
        prefix = f"{root}." if root else ""
        if name.startswith(prefix):
            return prefix + name[len(prefix) :].partition(".")[0]
    return ""
