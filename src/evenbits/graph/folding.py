"""Folding a smoothing into the parameters that produced the tensor, and proving first that it changes nothing.

The proof is numeric and sharp. Every fold is tried with shuffled powers of two as factors (none of them 1), while a
hook on each reading layer multiplies its input back. Powers of two scale floating-point numbers exactly, so a legal
fold gives the output of the untouched model to the last bit (norms written as 1 + w, to rounding); a reader that the
trace missed, a wrong axis or a hidden second use gives an error of the order of the output itself. A fold that fails is
dropped and its region is served by an explicit multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from evenbits.graph.regions import Producer, Region

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_STORED = 2.0**-8  # relative error a folded gain may have after rounding to its parameter's type: bfloat16's own
_EXPONENTS = (-2, 1, 2, -1)


class Fold:
    """One region's fold: divides the producer's gain (and shift) by s, and can take it back bit for bit."""

    def __init__(self, model: nn.Module, producer: Producer) -> None:
        self._producer = producer
        self._gain = model.get_parameter(producer.gain)
        self._shift = None if producer.shift is None else model.get_parameter(producer.shift)
        self._saved: list[tuple[nn.Parameter, torch.Tensor]] = []

    def loses(self, scale_I: torch.Tensor) -> bool:
        """Whether the divided gain or shift cannot be stored: overflow in float16, cancellation in 1 + w."""
        for parameter, add in self._parts():
            wanted = (parameter.detach().double() + add) / scale_I.to(parameter.device, torch.float64)
            stored = (wanted - add).to(parameter.dtype).double() + add
            if not bool(((stored - wanted).abs() <= _STORED * wanted.abs()).all()):
                return True
        return False

    def _parts(self) -> list[tuple[nn.Parameter, float]]:
        shift = [] if self._shift is None else [(self._shift, 0.0)]
        return [(self._gain, self._producer.offset), *shift]

    def apply(self, scale_I: torch.Tensor) -> None:
        """Divides the tensor this producer computes by scale_I [I], in place."""
        for parameter, add in self._parts():
            self._saved.append((parameter, parameter.detach().clone()))
            scale = scale_I.to(parameter.device, torch.float64)
            parameter.data.copy_((parameter.data.double() + add) / scale - add)

    def undo(self) -> None:
        """Restores the parameters exactly as they were before the last `apply`."""
        for parameter, before in reversed(self._saved):
            parameter.data.copy_(before)
        self._saved.clear()


def prove(
    model: nn.Module, runs: Sequence[Callable[[], Any]], folds: Sequence[tuple[Region, Fold]], *, seed: int = 0
) -> dict[str, str]:
    """Tries the folds on real forwards. Returns {region name: reason} for those that are not legal; parameters are as
    before.

    runs: forwards of `model`, each on one calibration batch.
    """
    if not folds:
        return {}
    references = [float_outputs(run()) for run in runs]
    for run, reference in zip(runs, references, strict=True):
        if not reference or not outputs_equal(reference, float_outputs(run())):
            reason = "cannot be proved: the model's output is not repeatable"
            return {region.name: reason for region, _ in folds}
    if _holds(model, runs, references, folds, seed):
        return {}
    failed = {
        region.name: "the fold changed the output when tried"
        for region, fold in folds
        if not _holds(model, runs, references, [(region, fold)], seed)
    }
    rest = [(region, fold) for region, fold in folds if region.name not in failed]
    if rest and not _holds(model, runs, references, rest, seed):
        failed |= {region.name: "folds changed the output when tried together" for region, _ in rest}
    return failed


def _holds(
    model: nn.Module,
    runs: Sequence[Callable[[], Any]],
    references: Sequence[list[torch.Tensor]],
    folds: Sequence[tuple[Region, Fold]],
    seed: int,
) -> bool:
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        for region, fold in folds:
            factors = _factors(region.width, generator)
            stack.callback(fold.undo)
            fold.apply(factors)
            for name in region.layers:
                hook = _multiply_by(factors)
                handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        return all(outputs_equal(ref, float_outputs(run())) for run, ref in zip(runs, references, strict=True))


def _factors(width: int, generator: torch.Generator) -> torch.Tensor:
    """Powers of two in random order. None is 1 and neighbours differ in count by at most one, so that even two or three
    channels show a fold that is wrong.
    """
    order = torch.randperm(width, generator=generator)
    return torch.exp2(torch.tensor(_EXPONENTS, dtype=torch.float32)[order % len(_EXPONENTS)])


def _multiply_by(factors_I: torch.Tensor) -> Callable[..., Any]:
    """A hook that multiplies the one tensor a layer is called with, given by position or by keyword."""

    def multiplied(value: Any) -> Any:
        return value * factors_I.to(value.device, value.dtype) if isinstance(value, torch.Tensor) else value

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (multiplied(args[0]), *args[1:]), kwargs
        first = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
        return args, {**kwargs, first: multiplied(kwargs[first])}

    return hook


def float_outputs(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of whatever a model returned, in order."""
    leaves = tree_leaves(output)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def outputs_equal(reference: list[torch.Tensor], output: list[torch.Tensor]) -> bool:
    """Whether two outputs are the same but for rounding in their type."""
    if len(reference) != len(output):
        return False
    for before, after in zip(reference, output, strict=True):
        if before.shape != after.shape:
            return False
        # Only what changed sets the scale: a mask of −1e38 beside the figures must not make every error look small.
        changed = before != after
        if not bool(changed.any()):
            continue
        before, after = before[changed], after[changed]
        limit = _TOLERANCE.get(before.dtype, 1e-5) * float(before.abs().max())
        if not float((before - after).abs().max()) <= limit:
            return False
    return True
