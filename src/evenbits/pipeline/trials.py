"""Trying candidates: the layers of a region as they would be deployed, run beside the float ones on calibration data.

Every candidate is built as the integer layer that would be swapped in, with its s as an explicit multiply, which gives
what a fold gives. Losses are running sums over all batches; nothing of an activation is kept. Candidates' weights are
held for as many regions at a time as fit a budget, one at least, and each such part is one walk over the data. Of a
block (scope "block") all candidates are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from evenbits.algorithms.base import Rebalance
from evenbits.errors import EvenbitsError
from evenbits.graph.folding import float_outputs
from evenbits.graph.regions import Region
from evenbits.nn.base import QuantizedLayer
from evenbits.nn.replace import replace_modules
from evenbits.observers.calibrate import watching
from evenbits.pipeline.activations import activation_quantizers, is_searched
from evenbits.pipeline.balanced import Balanced
from evenbits.pipeline.methods import Methods
from evenbits.pipeline.plan import LayerPlan
from evenbits.pipeline.solve import build_layer, layer_stats
from evenbits.pipeline.watch import Watched, without_cache
from evenbits.schemes.scheme import Scheme

_BUDGET = 256 * 2**20  # codes of candidates' weights held at a time: a byte each, or less where they are packed
Candidates: TypeAlias = Mapping[str, Sequence[Rebalance]]
Built: TypeAlias = Mapping[str, Sequence[QuantizedLayer]]
Walk: TypeAlias = Callable[[Iterator[Callable[[], Any]]], Iterator[Callable[[], Any]]]


class Trials:
    """Builds and measures candidates. Raises EvenbitsError for activations whose scale takes a search of its own."""

    def __init__(
        self, model: nn.Module, plans: Mapping[str, LayerPlan], scheme: Scheme, methods: Methods, watched: Watched
    ) -> None:
        self.model, self.methods, self.watched = model, methods, watched
        self._plans, self._scheme = plans, scheme
        for name in plans:
            if is_searched(scheme.of(name)):
                raise EvenbitsError(
                    f"layer {name}: a search for alpha needs dynamic activations or static ones that span the range; "
                    f"{scheme.of(name).input_activations} is searched itself. Give alpha as a number."
                )

    def build(self, region: Region, candidate: Rebalance) -> dict[str, QuantizedLayer]:
        """The region's layers under a candidate, each with its own explicit multiply."""
        layouts = {name: self._plans[name].channels for name in region.layers}
        scale_S = candidate.scale_I
        scales = {} if scale_S is None else {n: scale_S[i.to(scale_S.device)] for n, i in region.index.items()}
        balanced = Balanced(scales, frozenset(scales), layouts=layouts)
        plans = [self._plans[name] for name in region.layers]
        activations = activation_quantizers(self.model, plans, self._scheme, balanced, self.watched)
        built = {}
        for plan in plans:
            stats = layer_stats(plan, balanced, self.watched)
            module, activation = self.model.get_submodule(plan.name), activations[plan.name]
            layer, _, _ = build_layer(module, plan, self._scheme, self.methods, balanced, stats, activation)
            built[plan.name] = layer
        return built

    def by_layer(self, regions: Sequence[Region], candidates: Candidates, walk: Walk) -> dict[str, list[list[float]]]:
        """Region → for each candidate the relative squared output error of each layer that ran."""
        losses: dict[str, list[list[float]]] = {}
        for part in self._parts(regions, candidates):
            built = {region.name: [self.build(region, c) for c in candidates[region.name]] for region in part}
            columns = {
                name: [layers[name] for layers in built[region.name]] for region in part for name in region.layers
            }
            errors, energy = self._errors(columns, walk)
            for region in part:
                # A layer that nothing reached has no loss, and no α of its own that min, max or mean could count.
                ran = [n for n in region.layers if energy[n] or any(errors[n])] or region.layers
                count = len(built[region.name])
                losses[region.name] = [[_relative(errors[n][i], energy[n]) for n in ran] for i in range(count)]
        return losses

    def by_block(self, block: str, regions: Sequence[Region], candidates: Candidates, walk: Walk) -> list[float]:
        """For each candidate (the same number for every region) the relative squared error of the block's output."""
        count = len(candidates[regions[0].name])
        module = self.model.get_submodule(block)
        errors, energy, inside = [0.0] * count, 0.0, [False]
        trials = [
            {n: q for r in regions for n, q in self.build(r, candidates[r.name][i]).items()} for i in range(count)
        ]

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal energy
            if inside[0]:
                return
            inside[0] = True
            try:
                reference = float_outputs(output)
                energy += sum(_energy(y) for y in reference)
                for index, layers in enumerate(trials):
                    with replaced(self.model, layers):
                        now = self.model.get_submodule(block)  # another one, if the block is the layer itself
                        changed = float_outputs(now(*args, **kwargs))
                    errors[index] += sum(_energy(a - b) for a, b in zip(changed, reference, strict=True))
            finally:
                inside[0] = False

        handle = module.register_forward_hook(hook, with_kwargs=True)
        try:
            self._walk(walk)
        finally:
            handle.remove()
        return [_relative(error, energy) for error in errors]

    def _parts(self, regions: Sequence[Region], candidates: Candidates) -> Iterator[list[Region]]:
        part: list[Region] = []
        held = 0
        for region in regions:
            elements = sum(self.model.get_submodule(name).get_parameter("weight").numel() for name in region.layers)
            size = elements * len(candidates[region.name])
            if part and held + size > _BUDGET:
                yield part
                part, held = [], 0
            part, held = [*part, region], held + size
        yield part

    def _errors(self, built: Built, walk: Walk) -> tuple[dict[str, list[float]], dict[str, float]]:
        errors = {name: [0.0] * len(layers) for name, layers in built.items()}
        energy = dict.fromkeys(built, 0.0)

        def see(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
            energy[name] += _energy(y)
            for index, layer in enumerate(built[name]):
                errors[name][index] += _energy(layer(x) - y)

        with watching(self.model, built, see):
            self._walk(walk)
        return errors, energy

    def _walk(self, walk: Walk) -> None:
        with without_cache(self.model):
            for run in walk(self.watched.source.every()):
                run()


@contextmanager
def replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The named modules replaced inside the block."""
    restore = replace_modules(model, layers)
    try:
        yield
    finally:
        restore()


def _energy(y: torch.Tensor) -> float:
    return float(y.detach().double().square().sum())


def _relative(error: float, energy: float) -> float:
    return error / energy if energy > 0 else error
