"""Folding a smoothing into the parameters that produced the tensor, and proving first that it changes nothing.

The proof is numeric and sharp. Every fold is tried with shuffled powers of two as factors (none of them 1), while a
hook on each reading layer multiplies its input back. Powers of two scale floating-point numbers exactly, so a legal
fold gives the output of the untouched model to the last bit (norms written as 1 + w, to rounding); a reader that the
trace missed, a wrong axis or a hidden second use gives an error of the order of the output itself. Where the model
repeats itself to the last bit the fold has to, too, so that a branch of a millionth of the output hides nothing. That
is sharper than a comparison in float64, and needs no float64 copy of the model. A fold that fails is dropped and its
region is served by an explicit multiply.

In float16 a quarter of a number may be too small to be exact. There sources are only enlarged, by 2 and 4, and what is
not the same to the last bit even so is judged again with the model widened to float32 for as long as that takes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from evenbits.graph.regions import Region
from evenbits.nn.layout import Layout

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_STORED = 2.0**-8  # relative error a folded gain may have after rounding to its parameter's type: bfloat16's own
_EXPONENTS = (-2, 1, 2, -1)
_ENLARGING = (-2, -1)


class Fold:
    """One region's fold: divides its sources by s and multiplies the further readers; taken back bit for bit."""

    def __init__(self, model: nn.Module, region: Region) -> None:
        self._model, self._region = model, region
        self._saved: list[tuple[nn.Parameter, torch.Tensor]] = []

    def row_factors(self, scale_S: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the rows of each producing layer are multiplied by: float64 [O]. scale_S: the region's s, [width]."""
        parts = [part for part in self._region.parts if part.source.rows]
        return {part.source.name: _factors_at(scale_S, part.index_C).reciprocal() for part in parts}

    def loses(self, scale_S: torch.Tensor) -> bool:
        """Whether a divided parameter cannot be stored: overflow in float16, cancellation in 1 + w."""
        for parameter, factor, offset in self._changes(scale_S, ()):
            factor, before = factor.to(parameter.device), parameter.detach().double() + offset
            wanted = before * factor
            stored = (wanted - offset).to(parameter.dtype).double() + offset
            # Measured as its readers see it, who multiply by s again. Without an offset nothing cancels: what is lost
            # is lost among numbers too small for the type, beside which the largest one counts. Of a matrix only
            # overflow counts: its small numbers are rounded like all others.
            error, size = (stored - wanted).abs() / factor, before.abs()
            limit = size if offset else size.amax()
            close = stored.isfinite() if parameter.ndim > 1 else error <= _STORED * limit
            if not bool(close.all()):
                return True
        return False

    def apply(self, scale_S: torch.Tensor, *, without: Collection[str] = ()) -> None:
        """Divides what the sources compute by s, in place; layers named in `without` are left as they are."""
        for parameter, factor, offset in self._changes(scale_S, without):
            self._saved.append((parameter, parameter.detach().clone()))
            factor = factor.to(parameter.device)
            parameter.data.copy_((parameter.data.double() + offset) * factor - offset)

    def undo(self) -> None:
        """Restores the parameters exactly as they were before the first `apply`."""
        for parameter, before in reversed(self._saved):
            parameter.data.copy_(before)
        self._saved.clear()

    def _changes(
        self, scale_S: torch.Tensor, without: Collection[str]
    ) -> list[tuple[nn.Parameter, torch.Tensor, float]]:
        """Parameters, float64 factors that broadcast to them, and offsets: (p + offset) is multiplied."""
        found: list[tuple[nn.Parameter, torch.Tensor, float]] = []
        for part in self._region.parts:
            source, factor = part.source, _factors_at(scale_S, part.index_C).reciprocal()
            if not source.rows:
                parameter = self._model.get_parameter(source.name)
                found.append((parameter, factor.view(parameter.shape), source.offset))
            elif source.name not in without:
                found += [(p, f, 0.0) for p, f in self._rows(source.name, factor)]
        for name, index_I in self._region.compensated.items():
            if name not in without:
                weight = self._model.get_submodule(name).get_parameter("weight")
                columns = self._region.layouts[name].mount_inputs(_factors_at(scale_S, index_I), weight.ndim)
                found.append((weight, columns, 0.0))
        for name, (index_I, dim) in self._region.matrices.items():
            factor_I = _factors_at(scale_S, index_I)
            found.append((self._model.get_parameter(name), factor_I.unsqueeze(1 - dim), 0.0))
        return found

    def _rows(self, name: str, factor_O: torch.Tensor) -> list[tuple[nn.Parameter, torch.Tensor]]:
        module = self._model.get_submodule(name)
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        rows = [(weight, self._region.layouts[name].mount_outputs(factor_O, weight.ndim))]
        return rows if bias is None else [*rows, (bias, factor_O)]


def _factors_at(scale_S: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
    """s of each channel in float64; 1 where the channel is not the region's."""
    scale = scale_S.detach().cpu().double()[index_C.clamp(min=0)]
    return torch.where(index_C >= 0, scale, 1.0)


def prove(
    model: nn.Module,
    runs: Sequence[Callable[[], Any]],
    regions: Sequence[Region],
    *,
    narrowest: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, str]:
    """Tries the folds on real forwards. Returns {region name: reason} for those that are not legal; parameters are as
    before.

    runs: forwards of `model`, each on one calibration batch; narrowest: the least precise type inside it (a model may
    be float64 and compute its norms in float32).
    """
    regions = [region for region in regions if region.parts]
    if not regions:
        return {}
    if narrowest != torch.float16:
        return _proved(model, runs, regions, _TOLERANCE.get(narrowest, 1e-5), _EXPONENTS, seed)
    if not _proved(model, runs, regions, None, _ENLARGING, seed):
        return {}
    try:
        with _widened(model):
            return _proved(model, runs, regions, _TOLERANCE[torch.float32], _EXPONENTS, seed)
    except RuntimeError:  # types that are written into its code do not fit
        reason = "cannot be proved: float16 is too coarse, and the model does not run in float32"
        return {region.name: reason for region in regions}


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """Inside the block the model's float16 tensors, and those it is called with, are float32."""

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float16 else value

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tree_map(wide, (args, kwargs))

    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype == torch.float16]
    before = [tensor.data for tensor in tensors]
    handle = model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        handle.remove()
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def _proved(
    model: nn.Module,
    runs: Sequence[Callable[[], Any]],
    regions: Sequence[Region],
    limit: float | None,
    exponents: tuple[int, ...],
    seed: int,
) -> dict[str, str]:
    """As `prove`. limit: relative, where the output need not be the same to the last bit; None: it always has to be."""
    references = [float_outputs(run()) for run in runs]
    exact = True
    for run, reference in zip(runs, references, strict=True):
        again = float_outputs(run())
        if not reference or not outputs_equal(reference, again):
            reason = "cannot be proved: the model's output is not repeatable"
            return {region.name: reason for region in regions}
        exact &= _same_bits(reference, again)

    def holds(tried: Sequence[Region]) -> bool:
        to_the_bit = exact and not any(part.source.offset for region in tried for part in region.parts)
        factors = _factors_of(tried, exponents, seed)
        return _holds(model, runs, references, tried, factors, None if to_the_bit else limit)

    # Norms written as 1 + w are tried apart, so that their rounding is nobody else's.
    rounded = [region for region in regions if any(part.source.offset for part in region.parts)]
    groups = [group for group in ([r for r in regions if r not in rounded], rounded) if group]
    broken = [group for group in groups if not holds(group)]
    wrong = [region for group in broken for region in group if not holds([region])]
    failed = {region.name: "the fold changed the output when tried" for region in wrong}
    rest = [region for region in regions if region.name not in failed]
    if rest and (broken or len(groups) > 1) and not holds(rest):
        failed |= {region.name: "folds changed the output when tried together" for region in rest}
    return failed


def _holds(
    model: nn.Module,
    runs: Sequence[Callable[[], Any]],
    references: Sequence[list[torch.Tensor]],
    regions: Sequence[Region],
    factors: Sequence[torch.Tensor],
    limit: float | None,
) -> bool:
    """Whether the output stays the same: within a relative limit, or (None) to the last bit."""
    with ExitStack() as stack:
        for region, scale_S in zip(regions, factors, strict=True):
            fold = Fold(model, region)
            stack.callback(fold.undo)
            fold.apply(scale_S)
            stack.enter_context(multiplied_inputs(model, region, scale_S))
        outputs = (float_outputs(run()) for run in runs)
        same = _same_bits if limit is None else lambda a, b: outputs_equal(a, b, limit)
        return all(same(reference, output) for reference, output in zip(references, outputs, strict=True))


def _same_bits(reference: list[torch.Tensor], output: list[torch.Tensor]) -> bool:
    return len(reference) == len(output) and all(torch.equal(a, b) for a, b in zip(reference, output, strict=True))


def _factors_of(regions: Sequence[Region], exponents: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    """Powers of two in random order. None is 1 and neighbours differ in count by at most one, so that even two or three
    channels show a fold that is wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(region.width, generator=generator) for region in regions]
    return [torch.exp2(torch.tensor(exponents, dtype=torch.float32)[order % len(exponents)]) for order in orders]


def multiplied_inputs(model: nn.Module, region: Region, scale_S: torch.Tensor) -> ExitStack:
    """While the returned context is open, the input of each of the region's layers is multiplied by its s."""
    stack = ExitStack()
    for name, index_I in region.index.items():
        hook = _multiply_by(scale_S[index_I], region.layouts[name])
        handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
        stack.callback(handle.remove)
    return stack


def _multiply_by(factors_I: torch.Tensor, layout: Layout) -> Callable[..., Any]:
    """A hook that multiplies the one tensor a layer is called with, given by position or by keyword."""

    def multiplied(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value * layout.on_activation(factors_I.to(value.device, value.dtype), value.ndim)

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


def outputs_equal(reference: list[torch.Tensor], output: list[torch.Tensor], tolerance: float = 0.0) -> bool:
    """Whether two outputs are the same but for rounding in their type, or a larger relative tolerance."""
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
        limit = max(tolerance, _TOLERANCE.get(before.dtype, 1e-5)) * float(before.abs().max())
        if not float((before - after).abs().max()) <= limit:
            return False
    return True
