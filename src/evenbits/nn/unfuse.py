"""Which modules of a model keep several layers' weights in one parameter, and their unfused forms.

| kind                | module                                                    | unfused form                      |
|---------------------|-----------------------------------------------------------|-----------------------------------|
| attention           | nn.MultiheadAttention                                     | UnfusedAttention (attention.py)   |
| experts             | 3-D expert weights, each matrix stored as [out, in]       | UnfusedExperts (experts.py)       |
| experts_transposed  | 3-D expert weights, each matrix stored as [in, out]       | UnfusedExperts, turned            |
| batch_norm          | a BatchNorm that was folded into the layer before it      | FoldedNorm (folded.py)            |

The kind is what a checkpoint records: with the module's own shapes it says all there is to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from evenbits.errors import EvenbitsError, unknown_name
from evenbits.nn.attention import UnfusedAttention, why_fused
from evenbits.nn.experts import UnfusedExperts, looks_fused, why_not
from evenbits.nn.folded import FoldedNorm
from evenbits.nn.replace import replace_modules

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

FORMS: dict[str, Callable[[Any], nn.Module]] = {
    "attention": UnfusedAttention,
    "experts": UnfusedExperts,
    "experts_transposed": partial(UnfusedExperts, turned=True),
    "batch_norm": lambda module: FoldedNorm(),
}


@dataclass(frozen=True)
class Fused:
    """A fused module: the kinds it may be unfused as (several if its shapes leave it open), or the reason why none."""

    kinds: tuple[str, ...]
    reason: str = ""


def fused_modules(model: nn.Module) -> dict[str, Fused]:
    """Every fused module of `model` by name, whether it can be unfused or not."""
    homes: dict[int, set[str]] = {}
    for parent in model.modules():
        for name, parameter in parent._parameters.items():
            if parameter is not None:
                homes.setdefault(id(parameter), set()).add(f"{id(parent)}.{name}")
    found: dict[str, Fused] = {}
    for name, module in model.named_modules():
        fused = _kinds(module)
        if fused is None:
            continue
        tied = [part for part, p in module.named_parameters() if len(homes[id(p)]) > 1]
        replaced = "forward" in vars(module)
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
        reason = (
            fused.reason
            or ("" if name else "the model is this single module; wrap it in another to have it taken apart")
            or (f"its {tied[0]} is tied to another parameter" if tied else "")
            or ("its forward was replaced" if replaced else "")
            or ("it has forward hooks, which would be lost" if hooked else "")
        )
        found[name] = Fused((), reason) if reason else fused
    return found


def _kinds(module: nn.Module) -> Fused | None:
    if isinstance(module, nn.MultiheadAttention):
        reason = why_fused(module)
        return Fused((), reason) if reason else Fused(("attention",))
    if isinstance(module, (UnfusedAttention, UnfusedExperts)) or not looks_fused(module):
        return None
    reasons = {"experts": why_not(module, turned=False), "experts_transposed": why_not(module, turned=True)}
    fitting = tuple(kind for kind, reason in reasons.items() if not reason)
    return Fused(fitting) if fitting else Fused((), reasons["experts"])


def unfused_form(module: nn.Module, kind: str) -> nn.Module:
    """The unfused form of a module; its layers' weights are views of the module's parameters.

    Raises EvenbitsError for an unknown kind and for a module that cannot be taken apart so.
    """
    if kind not in FORMS:
        raise unknown_name("kind of fused module", kind, FORMS)
    if kind == "attention" and (not isinstance(module, nn.MultiheadAttention) or why_fused(module)):
        raise EvenbitsError(f"{type(module).__name__} is no nn.MultiheadAttention that can be taken apart.")
    if kind == "batch_norm" and not isinstance(module, BATCH_NORMS):
        raise EvenbitsError(f"{type(module).__name__} is no BatchNorm that could have been folded.")
    return FORMS[kind](module)


def unfuse(model: nn.Module, kinds: Mapping[str, str]) -> Callable[[], None]:
    """Puts the unfused forms in the places of the named modules (name → kind). Returns what takes it back.

    Raises EvenbitsError, with the model unchanged, for a name or kind that does not fit.
    """
    present = dict(model.named_modules(remove_duplicate=False))
    for name in kinds:
        if name not in present or not name:
            raise EvenbitsError(f"the model has no module {name!r} to take apart.")
    return replace_modules(model, {name: unfused_form(present[name], kind) for name, kind in kinds.items()})


def unfused_kind(module: nn.Module | None) -> str | None:
    """The kind that an unfused form in a model was made as; None for any other module."""
    if isinstance(module, UnfusedAttention):
        return "attention"
    if isinstance(module, FoldedNorm):
        return "batch_norm"
    if isinstance(module, UnfusedExperts):
        return "experts_transposed" if module.turned else "experts"
    return None
