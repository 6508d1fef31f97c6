"""Which layers gain time on this machine, asked before anything is converted.

The first calibration batch says on what each layer works: a quantized layer wins or loses by its shape and by how many
rows it is given at a time. Each different shape is timed once (kernels/probe.py) against a layer of the formats it
would get, with random weights. The answer depends on the machine and on its load, so it changes what is quantized only
where that was asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.errors import EvenbitsError
from evenbits.evaluation.latency import is_causal
from evenbits.kernels.probe import Shape, Speed, probe
from evenbits.nn.conv import QConv
from evenbits.nn.layout import layout_of
from evenbits.nn.replace import quantized_class
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor
from evenbits.observers.calibrate import watching
from evenbits.pipeline.batches import Batches
from evenbits.pipeline.plan import LayerPlan
from evenbits.pipeline.result import ProbeRow
from evenbits.schemes.scheme import LayerFormats, Scheme

_ROWS = 8  # of random weights that are really encoded; the rest repeats them: searching scales takes long


@dataclass(frozen=True)
class Case:
    """A layer as it would be deployed: the float shape, its formats and, for convolutions, its geometry."""

    shape: Shape
    formats: LayerFormats
    geometry: str = ""


@dataclass(frozen=True)
class Forecast:
    """speeds: of each layer that was measured; unmeasured: why the others were not; cases: what was measured; tokens:
    speeds with a single row, for models that write token by token."""

    speeds: Mapping[str, Speed]
    unmeasured: Mapping[str, str]
    cases: Mapping[str, Case]
    tokens: Mapping[str, Speed]

    @property
    def losers(self) -> dict[str, str]:
        """Layers that would be slower quantized (name → by how much)."""
        return {name: told(speed) for name, speed in self.speeds.items() if not speed.wins}

    @property
    def rows(self) -> tuple[ProbeRow, ...]:
        """What was measured, a row for all layers of a shape."""
        alike: dict[tuple[str, Shape, Speed], list[str]] = {}
        for name, speed in self.speeds.items():
            alike.setdefault(("first batch", self.cases[name].shape, speed), []).append(name)
        for name, speed in self.tokens.items():
            alike.setdefault(("one token", _one_row(self.cases[name]).shape, speed), []).append(name)
        return tuple(
            ProbeRow(
                work,
                tuple(names),
                str(shape),
                speed.float_seconds,
                speed.deployed_seconds,
                speed.ratio,
                speed.low,
                speed.high,
            )
            for (work, shape, speed), names in alike.items()
        )

    def notes(self, *, kept: bool) -> tuple[str, ...]:
        """Sentences for the result. kept: losers stay float."""
        if not self.speeds:
            return (f"probe: no layer could be measured ({_first(self.unmeasured)}).",)
        one = next(iter(self.speeds.values()))
        ratios = sorted(speed.ratio for speed in self.speeds.values())
        head = (
            f"probe: {len(ratios) - len(self.losers)} of {len(ratios)} layers are faster quantized on this machine now "
            f"({ratios[0]:.2f}x … {ratios[-1]:.2f}x of float; {one.threads} thread{'s' * (one.threads > 1)}, "
            f"{one.clock} time)."
        )
        missing = self._token_note()
        if self.unmeasured:
            missing += (f"probe: {len(self.unmeasured)} not measured: {_first(self.unmeasured)}.",)
        if not self.losers:
            return (head, *missing)
        by_ratio: dict[str, list[str]] = {}  # layers of one shape were measured once
        for name in self.losers:
            by_ratio.setdefault(f"{self.speeds[name].ratio:.2f}x", []).append(name)
        listed = "; ".join(f"{ratio}: {', '.join(names)}" for ratio, names in sorted(by_ratio.items()))
        end = "They stay float (only_faster)." if kept else "To keep them in float: only_faster."
        return (
            head,
            f"warning: slower quantized than float on this machine, as a share of float's speed: {listed}. {end}",
            *missing,
        )

    def _token_note(self) -> tuple[str, ...]:
        if not self.tokens:
            return ()
        ratios = sorted(speed.ratio for speed in self.tokens.values())
        slower = [name for name, speed in self.tokens.items() if not speed.wins]
        losers = f"; slower: {', '.join(slower)}" if slower else ""
        text = (
            f"probe: one token at a time, {len(ratios) - len(slower)} of {len(ratios)} layers are faster quantized "
            f"({ratios[0]:.2f}x … {ratios[-1]:.2f}x of float{losers})."
        )
        return (text,)


def told(speed: Speed) -> str:
    """A loser's line in the plan."""
    sure = "" if speed.certain else ", within the noise"
    return (
        f"slower quantized on this machine: {speed.ratio:.2f}x of float ({speed.float_seconds * 1e6:.0f} → "
        f"{speed.deployed_seconds * 1e6:.0f} µs, quartiles {speed.low:.2f}…{speed.high:.2f}{sure})"
    )


def probed(
    model: nn.Module,
    plans: list[LayerPlan],
    batches: Batches | None,
    scheme: Scheme,
    *,
    wanted: bool,
    keep: bool,
    progress: bool = False,
) -> tuple[list[LayerPlan], tuple[str, ...], tuple[ProbeRow, ...]]:
    """The plans, notes and rows of `only_faster`, if it was asked for; without `keep` the plans stay as they are.
    progress: say at once, on standard error, what was found: conversion only begins now."""
    if not wanted and not keep:
        return plans, (), ()
    fewer, forecast = only_faster(model, plans, batches, scheme)
    notes, rows = forecast.notes(kept=keep), forecast.rows
    for line in (*(_line(row) for row in rows), *notes) if progress else ():
        tqdm.write(line, file=sys.stderr)
    return fewer if keep else plans, notes, rows


def _line(row: ProbeRow) -> str:
    more = f" and {len(row.layers) - 1} more" if len(row.layers) > 1 else ""
    return (
        f"probe, {row.work}: {row.layers[0]}{more}: {row.shape}: {row.float_seconds * 1e6:.0f} µs in float, "
        f"{row.quantized_seconds * 1e6:.0f} µs quantized, {row.ratio:.2f}x ({row.low:.2f} … {row.high:.2f})"
    )


def only_faster(
    model: nn.Module, plans: list[LayerPlan], batches: Batches | None, scheme: Scheme, *, seconds: float = 20.0
) -> tuple[list[LayerPlan], Forecast]:
    """Plans in which layers that would lose time have that reason to stay float, and what was measured.

    seconds: what measuring may take, about. Raises EvenbitsError without calibration data, whose first batch says how
    many rows each layer works on.
    """
    if batches is None:
        raise EvenbitsError(
            "probing layers needs calibration data: its first batch says how many rows each layer works on; pass "
            "data=[batch, …]."
        )
    cases, unmeasured = _cases(model, plans, batches, scheme)
    tokens = {name: _one_row(case) for name, case in cases.items() if is_causal(model) and case.shape.kind == "Linear"}
    owners = {case: name for name, case in reversed([*cases.items(), *tokens.items()])}
    share = seconds / max(1, len(owners))
    speeds: dict[Case, Speed] = {}
    with torch.random.fork_rng(devices=[]):  # random weights here change nothing later
        for case, name in owners.items():
            layer = deployed(model.get_submodule(name), case)
            (speeds[case],) = probe([case.shape], lambda _, to=layer: to, seconds=share).values()  # type: ignore[misc]
    found, singly = ({name: speeds[case] for name, case in which.items()} for which in (cases, tokens))
    forecast = Forecast(found, unmeasured, cases, singly)
    losers = forecast.losers
    return [replace(plan, reason=plan.reason or losers.get(plan.name, "")) for plan in plans], forecast


def _cases(
    model: nn.Module, plans: list[LayerPlan], batches: Batches, scheme: Scheme
) -> tuple[dict[str, Case], dict[str, str]]:
    """What each layer that is to be quantized did first on the first batch."""
    names = [plan.name for plan in plans if not plan.reason]
    found: dict[str, Case] = {}
    unmeasured = dict.fromkeys(names, "it did not run on the first calibration batch")

    def see(name: str, x: torch.Tensor, _: torch.Tensor) -> None:
        if name in found or not x.numel():
            return
        module = model.get_submodule(name)
        shape = _shape(module, x)
        if shape is None:
            unmeasured[name] = f"there is no float reading for a {type(module).__name__} of this padding or kind"
            return
        geometry = str(QConv.geometry_of(module)) if shape.kind != "Linear" else ""
        found[name] = Case(shape, scheme.of(name), geometry)
        unmeasured.pop(name, None)

    with watching(model, names, see):
        batches.runs()[0]()
    return found, unmeasured


def _one_row(case: Case) -> Case:
    """The same layer on a single row: one token of one sequence."""
    return replace(case, shape=replace(case.shape, input=(1, case.shape.input[-1])))


def _shape(module: nn.Module, x: torch.Tensor) -> Shape | None:
    """The float operation of a layer on x, or None if it is none that `float_operation` knows."""
    layout = layout_of(module)
    if layout is None or "Transpose" in layout.kind:
        return None
    common: dict[str, Any] = {
        "bias": getattr(module, "bias", None) is not None,
        "dtype": x.dtype,
        "device": x.device.type,
    }
    if not layout.spatial:
        return Shape(
            "Linear", (layout.out_channels, layout.in_channels), (x.numel() // x.shape[-1], x.shape[-1]), **common
        )
    if not isinstance(module.padding, tuple) or module.padding_mode != "zeros" or x.ndim != layout.spatial + 2:
        return None
    where: dict[str, Any] = {name: tuple(getattr(module, name)) for name in ("stride", "padding", "dilation")}
    weight = tuple(module.get_parameter("weight").shape)
    return Shape(layout.kind, weight, tuple(x.shape), **common, **where, groups=layout.groups)


def deployed(module: nn.Module, case: Case) -> Callable[[torch.Tensor], Any]:
    """A quantized layer of a case's shape and formats with random weights."""
    shape, formats = case.shape, case.formats
    quantized = _random(shape.weight, formats.weights)
    bias = torch.zeros(shape.weight[0], dtype=shape.dtype) if shape.bias else None
    activation = None
    if formats.input_activations is not None:
        fmt = formats.input_activations
        scale = torch.tensor([0.03]) if formats.static else None
        zero = torch.zeros(1, dtype=torch.int32) if formats.static and not fmt.rule.symmetric else None
        activation = ActivationQuantizer(fmt, scale, zero)
    kwargs = {"geometry": QConv.geometry_of(module)} if shape.kind != "Linear" else {}
    layer = quantized_class(shape.kind)(quantized, shape.weight, bias, activation, None, **kwargs)
    return layer.to(shape.device)


def _random(shape: tuple[int, ...], fmt: Format) -> QTensor:
    """A random weight's matrix [O, K] in a format: a few rows, over and over."""
    rows, columns = shape[0], int(torch.Size(shape[1:]).numel())
    few = encode(torch.randn(min(rows, _ROWS), columns) / columns**0.5, fmt)
    times = -(-rows // len(few.packed))

    def over(x: torch.Tensor | None) -> torch.Tensor | None:
        return x if x is None or x.ndim < 2 else x.repeat(times, 1)[:rows].contiguous()

    packed, scale = over(few.packed), over(few.scale)
    assert packed is not None and scale is not None  # repeated, not lost
    return replace(
        few, packed=packed, scale=scale, zero_point=over(few.zero_point), kinds=over(few.kinds), shape=(rows, columns)
    )


def _first(reasons: Mapping[str, str]) -> str:
    listed = [f"{name}: {why}" for name, why in list(reasons.items())[:3]]
    return "; ".join(listed) or "there is none to quantize"
