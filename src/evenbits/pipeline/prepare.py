"""Everything of a run before the swap: fused modules taken apart, norms folded, then plan, watch, balance and solve,
which work beside the model.

`quantize` swaps once and keeps everything; `diagnose` swaps batch by batch and takes everything back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from evenbits.errors import EvenbitsError
from evenbits.evaluation.running import evaluation_mode
from evenbits.nn.base import QuantizedLayer, check_formats
from evenbits.nn.replace import replace_modules
from evenbits.numerics.search import SearchCost, counting_cost
from evenbits.pipeline.balance import balance
from evenbits.pipeline.balanced import Balanced
from evenbits.pipeline.batches import Batches
from evenbits.pipeline.methods import Methods, default_method
from evenbits.pipeline.norms import folded_norms
from evenbits.pipeline.only_faster import probed
from evenbits.pipeline.plan import LayerPlan, plan_layers, untied
from evenbits.pipeline.result import ProbeRow
from evenbits.pipeline.solve import Solved, solve
from evenbits.pipeline.unfuse import Unfusing, unfused
from evenbits.pipeline.watch import Watched, watch
from evenbits.schemes.scheme import Scheme, resolve


@dataclass(frozen=True)
class Prepared:
    """Layers and folds that are ready to be swapped in, and how they came about. parts: what was taken apart; norms:
    what to know about norms that were folded; ties: about tied weights; speeds, probe: what was found before."""

    scheme: Scheme
    methods: Methods
    plans: list[LayerPlan]
    batches: Batches | None
    watched: Watched | None
    balanced: Balanced
    solved: dict[str, Solved]
    cost: SearchCost
    parts: Unfusing
    norms: tuple[str, ...]
    ties: tuple[str, ...]
    speeds: tuple[str, ...]
    probe: tuple[ProbeRow, ...]

    @property
    def chosen(self) -> list[LayerPlan]:
        """The plans of the layers that are quantized."""
        return [plan for plan in self.plans if not plan.reason]

    @property
    def modules(self) -> dict[str, QuantizedLayer]:
        """The quantized layers by name."""
        return {name: layer.module for name, layer in self.solved.items()}

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        """What to know about speeds, modules taken apart, norms and ties."""
        return (*self.speeds, *self.parts.notes(model), *self.norms, *self.ties)

    @contextmanager
    def deployed(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model is the quantized one; afterwards it is what it was before, bit for bit."""
        with ExitStack() as undo:
            modules = self.modules
            for fold, scale_S in self.balanced.folds:
                undo.callback(fold.undo)
                fold.apply(scale_S, without=modules)
            undo.callback(replace_modules(model, modules))
            yield


@contextmanager
def preparing(
    model: nn.Module,
    caller: str,
    *,
    scheme: str | Path | Mapping[str, Any] | Scheme,
    method: str | None,
    data: Iterable[Any] | None,
    progress: bool,
    options: Mapping[str, Any],
    keep: bool,
    probe: bool = False,
    only_faster: bool = False,
) -> Iterator[Prepared]:
    """Plans, watches, balances and solves; the arguments are `quantize`'s. Inside the block the model is in evaluation
    mode, fused modules are taken apart and norms folded; afterwards, too, with `keep`, unless there was an error.

    Raises EvenbitsError as `quantize` does.
    """
    scheme = resolve(scheme)
    for formats in scheme.formats:
        check_formats(formats.weights, formats.input_activations)
    method = default_method(scheme) if method is None else method
    methods = Methods.parse(method, options, scheme)
    refuse_quantized(model, caller)
    static = any(formats.static for formats in scheme.formats)
    if data is None and (static or methods.balance is not None):
        what = "static activations need" if static else f"method {method!r} needs"
        raise EvenbitsError(f"{what} calibration data; pass data=[batch, …].")
    batches = None if data is None else Batches(model, data, progress=progress)
    with (
        unfused(model, scheme, batches, keep=keep) as parts,
        evaluation_mode(model),
        folded_norms(model, scheme, batches, keep=keep) as norms,
    ):
        plans = parts.explained(plan_layers(model, scheme))
        plans, watched = watch(model, plans, batches, scheme, methods)
        asked = {"wanted": probe, "keep": only_faster, "progress": progress}
        plans, speeds, rows = probed(model, plans, batches, scheme, **asked)
        chosen = [plan for plan in plans if not plan.reason]
        if not chosen:
            raise EvenbitsError(_nothing_to_do(plans))
        balanced = (
            balance(model, chosen, watched, scheme, methods, progress=progress) if watched is not None else Balanced()
        )
        with counting_cost() as cost:
            solved = solve(model, chosen, scheme, methods, balanced, watched, progress=progress)
        found = (untied(model, chosen), speeds, rows)
        yield Prepared(scheme, methods, plans, batches, watched, balanced, solved, cost, parts, norms, *found)


def refuse_quantized(model: nn.Module, caller: str) -> None:
    """Raises EvenbitsError if what `caller` was given is no module or holds quantized layers."""
    if not isinstance(model, nn.Module):
        raise EvenbitsError(f"{caller} takes a torch.nn.Module; given {type(model).__name__}.")
    already = [name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]
    if already:
        raise EvenbitsError(
            f"the model is quantized already ({len(already)} layers, such as {already[0]}); load the float one."
        )


def _nothing_to_do(plans: list[LayerPlan]) -> str:
    if not plans:
        return "the model has no layer that can be quantized (linear layers and convolutions)."
    listed = "; ".join(f"{plan.name or 'the model'}: {plan.reason}" for plan in plans[:5])
    return f"no layer would be quantized. {listed}{'; …' if len(plans) > 5 else ''}."
