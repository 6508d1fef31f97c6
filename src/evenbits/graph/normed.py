"""Norms: what they read is fixed at one, their gain and bias are sources.

InstanceNorm divides each channel by its own deviation, which takes any factor out again: f(s·x) = f(x) per channel, so
nothing would have to be compensated. That holds for eps = 0 only. With eps it computes (x − μ) / √(σ² + eps / s²), and
as s is not known before it is chosen (up to 10⁴), such a reader is fixed like the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def normed(gain_at: int, shift_at: int | None, channel_dim: int) -> Callable[..., Any]:
    """The rule of a norm whose gain and bias stand at these places among its arguments."""

    def rule(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
        x, name = args[0], func._schema.name.rpartition("::")[2].removeprefix("native_")
        why, labels = _why_not_invariant(func, args, kwargs), look.labels(x)
        along = labels is not None and all(size == 1 for dim, size in enumerate(labels.shape) if dim != 1)
        if why is not None or not along:
            look.fix(labels, f"its tensor is also read by {name}{look.place}{why or ''}")
        gain = look.parameter(args[gain_at]) if len(args) > gain_at else None
        gain = gain if gain is not None else look.labels(args[gain_at]) if len(args) > gain_at else None
        shift = args[shift_at] if shift_at is not None and len(args) > shift_at else None
        if gain is None or gain.ndim != 1:
            look.fix(gain, "a norm's gain of more than one dimension")
            return None
        if shift is not None:
            found = look.parameter(shift)
            found = found if found is not None else look.labels(shift)
            if found is None:
                look.fix(gain, "its bias is no parameter")
                return None
            look.variables.unify(gain, found)
        shape = [1] * x.ndim
        shape[channel_dim] = -1
        labels = gain.view(shape)
        return [labels] if isinstance(output, (list, tuple)) else labels

    return rule


def _why_not_invariant(func: Any, args: Any, kwargs: Any) -> str | None:
    """None if the norm takes factors per channel out again; else more words about the reason, or ""."""
    named = {spec.name: value for spec, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    if not named.get("training", named.get("train", False)):
        return ""
    eps = named.get("eps", named.get("epsilon", 1.0))
    return f", whose eps of {eps:g} does not grow with its input" if eps else None
