"""`quantize`: one call from a float model to integer layers, in place.

    unfuse      attention and experts that keep several layers in one parameter, taken apart  (unfuse.py)
    plan        which layers, and why not the others                      (plan.py)
    watch       trace one forward, prove folds, collect channel ranges    (graph/, observers/)
    probe       on request, which layers are faster quantized (only_faster.py)
    balance     one s per region                                          (balance.py)
    solve       weights to codes, activations to quantizers               (solve.py)
    swap        fold and replace                                          (swap.py)

Only the first and the last step touch the model, and both take themselves back if anything fails: on any error the
model is bit for bit what it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenbits.errors import EvenbitsError
from evenbits.evaluation.memory import model_bytes, peak_bytes
from evenbits.evaluation.running import evaluation_mode
from evenbits.kernels import dispatch
from evenbits.nn.base import QuantizedLayer, check_formats
from evenbits.numerics.search import SearchCost, counting_cost
from evenbits.pipeline.balance import balance
from evenbits.pipeline.balanced import Balanced
from evenbits.pipeline.batches import Batches
from evenbits.pipeline.methods import Methods, default_method
from evenbits.pipeline.norms import folded_norms
from evenbits.pipeline.only_faster import probed
from evenbits.pipeline.plan import LayerPlan, plan_layers
from evenbits.pipeline.result import LayerRow, Result
from evenbits.pipeline.solve import Solved, solve
from evenbits.pipeline.swap import swap
from evenbits.pipeline.unfuse import unfused
from evenbits.pipeline.watch import Watched, watch
from evenbits.schemes.scheme import Scheme, resolve


def quantize(
    model: nn.Module,
    *,
    scheme: str | Path | Mapping[str, Any] | Scheme = "W8A8",
    method: str | None = None,
    data: Iterable[Any] | None = None,
    progress: bool = False,
    probe: bool = False,
    only_faster: bool = False,
    **options: Any,
) -> Result:
    """Quantizes `model` in place and returns what was done, layer by layer.

    scheme:  a preset ("W8A8", "W8A8_STATIC", …), a file, a mapping or a Scheme.
    method:  a name of `ALGORITHMS`, or several joined by "+" (a balance method and a weight method). By default what
             suits the scheme: olive for pairs, ant for a choice of types, smoothquant for int8 activations, else rtn;
             by_format (layer by layer, nothing smoothed) if layers have pairs or a choice beside other formats.
    data:    calibration batches: any iterable of tensors, tuples of arguments or mappings of keyword arguments.
             Balance methods and static activations need it; with it, each layer's output error is measured too.
    probe:   times each layer's shape on this machine before anything is converted, and says in the notes which layers
             would be slower quantized. only_faster: keeps those in float. What is quantized then depends on the machine
             and on its load. Both need `data`, whose first batch says how many rows each layer works on.
    options: passed to the methods, such as alpha=0.5.

    Raises EvenbitsError, with the model unchanged, if a name is unknown, a parameter or an activation is not finite,
    the data is empty or does not fit the model, no layer can be quantized, or smoothing was asked for and no region was
    smoothed.
    """
    start = time.perf_counter()
    scheme = resolve(scheme)
    for formats in scheme.formats:
        check_formats(formats.weights, formats.input_activations)
    method = default_method(scheme) if method is None else method
    methods = Methods.parse(method, options)
    refuse_quantized(model, "quantize")
    static = any(formats.static for formats in scheme.formats)
    if data is None and (static or methods.balance is not None):
        what = "static activations need" if static else f"method {method!r} needs"
        raise EvenbitsError(f"{what} calibration data; pass data=[batch, …].")
    batches = None if data is None else Batches(model, data, progress=progress)
    prepared = ExitStack()
    with prepared, evaluation_mode(model):
        parts = prepared.enter_context(unfused(model, scheme, batches))
        norms = prepared.enter_context(folded_norms(model, scheme, batches))
        plans = parts.explained(plan_layers(model, scheme))
        plans, watched = watch(model, plans, batches, scheme, methods)
        plans, speeds = probed(model, plans, batches, scheme, wanted=probe, keep=only_faster)
        chosen = [plan for plan in plans if not plan.reason]
        if not chosen:
            raise EvenbitsError(_nothing_to_do(plans))
        balanced = (
            balance(model, chosen, watched, scheme, methods, progress=progress) if watched is not None else Balanced()
        )
        with counting_cost() as cost:
            solved = solve(model, chosen, scheme, methods, balanced, watched, progress=progress)
        with swap(model, {name: layer.module for name, layer in solved.items()}, balanced.folds):
            if batches is not None:
                batches.check_quantized()
            plans = parts.settle(model, plans)
            found = _result(model, scheme, methods, plans, balanced, solved, watched, cost)
            found = replace(found, notes=(*speeds, *parts.notes(model), *norms, *found.notes))
            return replace(found, seconds=time.perf_counter() - start, peak_bytes=peak_bytes())


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


def _result(
    model: nn.Module,
    scheme: Scheme,
    methods: Methods,
    plans: list[LayerPlan],
    balanced: Balanced,
    solved: Mapping[str, Solved],
    watched: Watched | None,
    cost: SearchCost,
) -> Result:
    rows = tuple(_row(plan, solved.get(plan.name), model) for plan in plans)
    layers = [layer.module for layer in solved.values()]
    return Result(
        scheme=scheme.to_json(),
        method=methods.name,
        options=methods.options,
        layers=rows,
        regions=balanced.rows,
        weight_bytes=sum(layer.weight_bytes for layer in layers),
        float_weight_bytes=sum(layer.float_weight_bytes for layer in layers),
        model_bytes=model_bytes(model),
        seconds=0.0,
        peak_bytes=0,
        backend=_backend(layers),
        search=cost,
        calibration_batches=0 if watched is None else watched.batches,
        notes=balanced.notes,
    )


def _backend(layers: list[QuantizedLayer]) -> str:
    """Who computes the products: integers where the formats allow, and how many layers that is."""
    integer = sum(layer.is_integer for layer in layers)
    if not integer:
        return "float product of decoded weights"
    chosen = dispatch.choice(layers[0].weight.device.type)
    rest = "" if integer == len(layers) else f" in {integer} of {len(layers)} layers, float products in the others"
    return f"{chosen.backend}{rest} ({chosen.reason})"


def _row(plan: LayerPlan, solved: Solved | None, model: nn.Module) -> LayerRow:
    if solved is None:
        dtype = _float_weight(model, plan.name).dtype
        bits = 8.0 * dtype.itemsize
        return LayerRow(plan.name, plan.kind, _dtype_name(dtype), "float", "float", plan.reason, plan.shape, bits, 0)
    module = solved.module
    return LayerRow(
        name=plan.name,
        kind=plan.kind,
        format=str(module.weight_format),
        input_format=_input_format(module),
        status="quantized",
        reason=solved.note,
        shape=plan.shape,
        bits_per_weight=module.bits_per_weight,
        weight_bytes=module.weight_bytes,
        sqnr_db=solved.weight_error.sqnr_db,
        output_sqnr_db=None if solved.output_error is None else solved.output_error.sqnr_db,
        pairs=solved.pairs,
    )


def _float_weight(model: nn.Module, name: str) -> torch.Tensor:
    names = dict(model.named_parameters(remove_duplicate=False))
    return names[name] if name in names else names[f"{name}.weight" if name else "weight"]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _input_format(module: QuantizedLayer) -> str:
    if module.input_format is None:
        return "float"
    return f"{module.input_format} {'static' if module.input_scale is not None else 'dynamic'}"
