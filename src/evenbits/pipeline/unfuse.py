"""Taking fused modules apart before anything else, so that what they hold is layers like all others.

    find        modules that keep several layers' weights in one parameter        (nn/unfuse.py)
    prove       each unfused form against the original, on the inputs of the first calibration batch
    replace     the proven ones; whatever fails later, the originals come back, the same objects, bit for bit
    settle      a module none of whose layers was quantized gets its original back, too

The unfused layers' weights are views of the fused ones: a fold into them is a fold into the original. Attention is one
known module, and its form needs data only as a check; experts are recognised by their shapes, and without a proof
(random inputs, if no batch reaches them) they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from evenbits.errors import EvenbitsError
from evenbits.evaluation.running import evaluation_mode
from evenbits.graph.folding import outputs_equal
from evenbits.nn.layout import layout_of
from evenbits.nn.replace import replace_modules
from evenbits.nn.unfuse import fused_modules, unfuse, unfused_form
from evenbits.nn.views import own_memory
from evenbits.pipeline.batches import REFUSALS, Batches
from evenbits.pipeline.plan import LayerPlan, check_finite
from evenbits.schemes.scheme import Scheme

_DIFFERENT = "its unfused form gives another output"
_IGNORED = "ignored by the scheme"


@dataclass
class Unfusing:
    """What was taken apart (name → kind), the originals, and why the other fused modules were not (name → reason)."""

    kinds: dict[str, str] = field(default_factory=dict)
    originals: dict[str, nn.Module] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def explained(self, plans: list[LayerPlan]) -> list[LayerPlan]:
        """The plans, with the reasons why fused modules stay in the lines of their parameters."""
        return [replace(plan, reason=self._reason(plan)) for plan in plans]

    def _reason(self, plan: LayerPlan) -> str:
        owners = [name for name in self.reasons if plan.layout is None and plan.name.startswith(f"{name}.")]
        return self.reasons[owners[0]] if owners else plan.reason

    def settle(self, model: nn.Module, plans: list[LayerPlan]) -> list[LayerPlan]:
        """Puts the originals of modules without a planned layer back; returns the plans with their lines."""
        for name in list(self.kinds):
            inside = [plan for plan in plans if plan.name.startswith(f"{name}.") and plan.layout is not None]
            if any(not plan.reason for plan in inside):
                continue
            reason = f"none of its layers would be quantized ({inside[0].name}: {inside[0].reason})"
            replace_modules(model, {name: self.originals[name]})
            plans = _relined(plans, name, self.originals[name], reason)
            del self.kinds[name], self.originals[name]
        return plans

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        """What to know about it, in sentences."""
        if not self.kinds:
            return ()
        padded = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False)
            if any(inner.startswith(f"{name}." if name else "") for inner in self.kinds)
        ]
        note = f"taken apart into linear layers: {', '.join(self.kinds)}"
        if not padded:
            return (note,)
        where = ", ".join(name or "the model" for name in padded)
        return (note, f"{where}: with a padding mask, outputs at padded positions are no longer set to zero")


def _relined(plans: list[LayerPlan], name: str, original: nn.Module, reason: str) -> list[LayerPlan]:
    at = next(index for index, plan in enumerate(plans) if plan.name.startswith(f"{name}."))
    lines = []
    for part, parameter in original.named_parameters():
        if parameter.ndim >= 2:
            owner = original.get_submodule(part.rpartition(".")[0])
            lines.append(LayerPlan(f"{name}.{part}", type(owner).__name__, tuple(parameter.shape), reason))
    rest = [plan for plan in plans[at:] if not plan.name.startswith(f"{name}.")]
    return [*plans[:at], *lines, *rest]


@contextmanager
def unfused(model: nn.Module, scheme: Scheme, batches: Batches | None, *, keep: bool = True) -> Iterator[Unfusing]:
    """Inside the block fused modules of `model` are linear layers, where that is proved and the scheme wants it.

    With `keep` they stay so afterwards. On an error the originals are put back. Raises EvenbitsError for parameters
    that are not finite.
    """
    found = fused_modules(model)
    if not found:
        yield Unfusing()
        return
    check_finite(model)
    done = Unfusing(reasons={name: fused.reason for name, fused in found.items() if fused.reason})
    wanted = {name: fused.kinds for name, fused in found.items() if fused.kinds}
    ignored = [name for name, kinds in wanted.items() if _ignored(model, name, kinds[0], scheme)]
    done.reasons |= dict.fromkeys(ignored, _IGNORED)
    wanted = {name: kinds for name, kinds in wanted.items() if name not in ignored}
    with evaluation_mode(model), torch.no_grad():
        done.reasons |= _prove(model, wanted, done, batches)
    done.originals = {name: model.get_submodule(name) for name in done.kinds}
    restore = unfuse(model, done.kinds)
    try:
        yield done
    except BaseException:
        restore()
        raise
    if not keep:
        restore()
        return
    for name in done.kinds:
        own_memory(model.get_submodule(name))


def _ignored(model: nn.Module, name: str, kind: str, scheme: Scheme) -> bool:
    form = unfused_form(model.get_submodule(name), kind)
    layers = [f"{name}.{part}" for part, module in form.named_modules() if layout_of(module) is not None]
    return scheme.ignores(name) or all(scheme.ignores(layer) for layer in layers)


def _prove(
    model: nn.Module, wanted: Mapping[str, tuple[str, ...]], done: Unfusing, batches: Batches | None
) -> dict[str, str]:
    """Fills in `done.kinds`; returns why the others are not among them."""
    trials = {name: _Trial(model.get_submodule(name), kinds) for name, kinds in wanted.items()}
    runs = batches is not None and _run(model, trials, batches)
    for trial in trials.values():
        trial.finish()
    done.kinds = {name: trial.kind for name, trial in trials.items() if trial.kind}
    reasons = {name: trial.reason for name, trial in trials.items() if not trial.kind}
    if runs and batches is not None and not _runs_with(model, done.kinds, batches):
        for name, kind in list(done.kinds.items()):
            if not _runs_with(model, {name: kind}, batches):
                reasons[name] = "the model does not run with its unfused form: something else reads its parameters"
                del done.kinds[name]
    return reasons


def _run(model: nn.Module, trials: Mapping[str, _Trial], batches: Batches) -> bool:
    """Runs the first batch while the trials watch. A batch the model cannot run is reported by the calibration."""
    with ExitStack() as stack:
        for name, trial in trials.items():
            handle = model.get_submodule(name).register_forward_hook(trial.see, with_kwargs=True)
            stack.callback(handle.remove)
        try:
            batches.run(batches.kept[0])
        except (*REFUSALS, EvenbitsError):
            return False
    return True


def _runs_with(model: nn.Module, kinds: Mapping[str, str], batches: Batches) -> bool:
    restore = unfuse(model, kinds)
    try:
        for batch in batches.kept:  # a later one may take a path that reads the parameters directly
            batches.run(batch)
    except (*REFUSALS, EvenbitsError):
        return False
    finally:
        restore()
    return True


class _Trial:
    """One fused module: its unfused forms compute beside it, and those that differ are dropped."""

    def __init__(self, module: nn.Module, kinds: tuple[str, ...]) -> None:
        self._module = module
        self._forms = {kind: unfused_form(module, kind).eval() for kind in kinds}
        self._called = False
        self.kind, self.reason = "", ""

    def see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Compares the forms with one call of the module."""
        if any(isinstance(leaf, torch.Tensor) and leaf.is_nested for leaf in tree_leaves((args, kwargs))):
            return
        self._called = True
        for kind in list(self._forms):
            if reason := _differs(lambda kind=kind: self._forms[kind](*args, **kwargs), output):  # type: ignore[misc]
                self.reason = reason
                del self._forms[kind]

    def finish(self) -> None:
        """Decides on a kind, after random inputs if no call was seen and the shapes alone do not say what it is."""
        if not self._called and "attention" not in self._forms:
            self._try_random()
        self.kind = next(iter(self._forms), "")

    def _try_random(self) -> None:
        for kind, form in list(self._forms.items()):
            inputs = _random_inputs(form)
            if inputs is None:
                self.reason = "its unfused form cannot be proved: its weights are not there"
            else:
                try:
                    output = self._module(*inputs)
                except (*REFUSALS, EvenbitsError) as error:
                    self.reason = (
                        f"its unfused form cannot be proved: no batch reached it, and it refuses a random one ({error})"
                    )
                else:
                    self.reason = _differs(lambda form=form, given=inputs: form(*given), output)  # type: ignore[misc]
            if self.reason:
                del self._forms[kind]


def _random_inputs(form: Any) -> tuple[torch.Tensor, ...] | None:
    """Hidden states, experts and weights of a few tokens, for unfused experts; None on the meta device."""
    weight = next(form.parameters())
    if weight.is_meta:
        return None
    seed, tokens, k = torch.Generator().manual_seed(0), 16, min(2, form.expert_count)
    x_TH = torch.randn(tokens, weight.shape[1], generator=seed)
    score_TE = torch.rand(tokens, form.expert_count, generator=seed)
    weight_Tk, index_Tk = score_TE.topk(k, dim=-1)
    return x_TH.to(weight.device, weight.dtype), index_Tk.to(weight.device), weight_Tk.to(weight.device, weight.dtype)


def _differs(compute: Callable[[], Any], expected: Any) -> str:
    try:
        found = compute()
    except (*REFUSALS, EvenbitsError) as error:
        return f"its unfused form fails ({type(error).__name__}: {error})"
    return "" if _same(_tensors(expected), _tensors(found)) else _DIFFERENT


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _same(expected: list[torch.Tensor], found: list[torch.Tensor]) -> bool:
    """Equal but for rounding; a number that is none in one must be none in the other."""
    holes = [torch.equal(a.isnan(), b.isnan()) for a, b in zip(expected, found, strict=False) if a.shape == b.shape]
    return all(holes) and outputs_equal([x.nan_to_num() for x in expected], [x.nan_to_num() for x in found])
