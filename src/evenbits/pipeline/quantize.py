"""`quantize`: one call from a float model to integer layers, in place.

    prepare (prepare.py)
      unfuse    attention and experts that keep several layers in one parameter, taken apart  (unfuse.py)
      norms     BatchNorm folded into the layer before it                                     (norms.py)
      plan      which layers, and why not the others                                          (plan.py)
      watch     trace one forward, prove folds, collect channel ranges                        (graph/, observers/)
      probe     on request, which layers are faster quantized                                 (only_faster.py)
      balance   one s per region                                                              (balance.py)
      solve     weights to codes, activations to quantizers                                   (solve.py)
    swap        fold and replace                                                              (swap.py)

Only the first two steps and the swap touch the model, and all take themselves back if anything fails: on any error the
model is bit for bit what it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenbits.evaluation.memory import model_bytes, peak_bytes
from evenbits.kernels import dispatch, pair_fp8, weight_only
from evenbits.nn.base import QuantizedLayer
from evenbits.nn.linear import QLinear
from evenbits.pipeline.chains import chain_notes
from evenbits.pipeline.plan import LayerPlan
from evenbits.pipeline.prepare import Prepared, preparing
from evenbits.pipeline.result import LayerRow, Result
from evenbits.pipeline.solve import Solved
from evenbits.pipeline.swap import swap
from evenbits.schemes.scheme import Scheme


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
    given: dict[str, Any] = {"scheme": scheme, "method": method, "data": data, "progress": progress, "options": options}
    given |= {"probe": probe, "only_faster": only_faster}
    with (
        preparing(model, "quantize", keep=True, **given) as prepared,
        swap(model, prepared.modules, prepared.balanced.folds),
    ):
        if prepared.batches is not None:
            prepared.batches.check_quantized()
        found = _result(model, prepared, prepared.parts.settle(model, prepared.plans))
        return replace(found, seconds=time.perf_counter() - start, peak_bytes=peak_bytes())


def _result(model: nn.Module, prepared: Prepared, plans: list[LayerPlan]) -> Result:
    scheme, methods, balanced, solved = prepared.scheme, prepared.methods, prepared.balanced, prepared.solved
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
        search=prepared.cost,
        calibration_batches=0 if prepared.watched is None else prepared.watched.batches,
        probe=prepared.probe,
        notes=(*prepared.notes(model), *balanced.notes, *chain_notes(layers)),
    )


def _backend(layers: list[QuantizedLayer]) -> str:
    """Who computes the products: integers (or E4M3) where the formats allow, and how many layers that is."""
    device, integer = layers[0].weight.device.type, sum(layer.is_integer for layer in layers)
    fp8 = sum(isinstance(layer, QLinear) and layer.is_fp8 for layer in layers) if pair_fp8.is_served(device) else 0
    if fp8 and not integer:
        rest = "" if fp8 == len(layers) else f" in {fp8} of {len(layers)} layers, float products in the others"
        return f"FP8 product of packed weights by {pair_fp8.served_by(device)}{rest}"
    if not integer:
        streamed = sum(isinstance(layer, QLinear) and layer.is_streamed for layer in layers)
        if not streamed:
            return "float product of decoded weights"
        some = "" if streamed == len(layers) else f" in {streamed} of {len(layers)} layers, decoded in the others"
        return f"float product of packed weights by {weight_only.served_by(device)}{some}"
    chosen = dispatch.choice(device)
    rest = (
        ""
        if integer == len(layers)
        else f" in {integer} of {len(layers)} layers, {'FP8 or ' * bool(fp8)}float products in the others"
    )
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
        reason="; ".join(note for note in (solved.note, module.qweight().note) if note),
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
