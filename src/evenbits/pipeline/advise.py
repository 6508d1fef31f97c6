"""`advise`: which format each layer should have, by the error it makes at the layer's output, at equal true bits.

No 4-bit format is best everywhere: pairs reach outliers and lose on weights without any, where NF4's crowded centre or
a plain integer grid is better (docs/formats.md). So each layer is asked.

    prepare  fused modules taken apart, norms folded, as `quantize` does it           (unfuse.py, norms.py)
    fit      the granularity of every candidate that comes nearest to the budget      (candidates.py)
    watch    channel statistics of every layer's input over all batches               (watch.py)
    encode   every layer in every candidate, by the method of the format              (measure.py)
    measure  all batches once more: the float layer's own input and output against each candidate on the same input,
             rounded as it will be when deployed; running sums only
    choose   least error, ties to the format that engines like best                   (verdict.py)

Memory: beside the model, the packed codes of all candidates (about half a byte per weight and candidate), and one
decoded weight at a time. Activations are never kept; the batches themselves are, if `data` can be walked only once.

The model is left as it was, bit for bit. Layers are judged one by one, each on inputs of the float model: how their
errors add up in the network is not measured here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from math import isfinite, prod
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from evenbits.errors import EvenbitsError
from evenbits.evaluation.running import evaluation_mode
from evenbits.nn.base import check_formats
from evenbits.numerics.format import Format
from evenbits.pipeline.activations import activation_quantizers
from evenbits.pipeline.advice import Advice, LayerAdvice, Measured, Total
from evenbits.pipeline.balanced import Balanced
from evenbits.pipeline.batches import Batches
from evenbits.pipeline.candidates import candidates_for, fit
from evenbits.pipeline.measure import Probe, encode_layer, measure
from evenbits.pipeline.methods import Methods
from evenbits.pipeline.norms import folded_norms
from evenbits.pipeline.plan import LayerPlan, plan_layers
from evenbits.pipeline.prepare import refuse_quantized
from evenbits.pipeline.solve import single_stats
from evenbits.pipeline.unfuse import unfused
from evenbits.pipeline.verdict import choose, gap_db, why
from evenbits.pipeline.watch import Watched, watch
from evenbits.schemes.scheme import Scheme


def advise(
    model: nn.Module,
    *,
    bits: float = 4.25,
    activations: str | Format | None = None,
    dynamic: bool = True,
    data: Iterable[Any] | None = None,
    candidates: Iterable[str] | None = None,
    ignore: Iterable[str] = ("lm_head",),
    margin_db: float = 0.1,
    progress: bool = False,
) -> Advice:
    """Measures every layer of a float model in several formats and advises one for each. The model stays as it is.

    bits:       true bits per weight that no layer may pass (by more than 0.01, see candidates.py).
    activations, dynamic, ignore: as in a scheme; inputs are rounded by them while outputs are measured.
    data:       calibration batches, as for `quantize`. They run twice; an iterator's are kept in a list.
    candidates: formats, or families with open granularity ("nf4:g*:mse"). By default those of candidates.py: int4,
                flint4, NF4 and pairs.
    margin_db:  what counts as equal (verdict.py).

    Raises EvenbitsError if there is no data, a name is unknown, a figure makes no sense, an input or output is not
    finite, no layer can be quantized, or nothing fits the budget anywhere.
    """
    start = time.perf_counter()
    refuse_quantized(model, "advise")
    _check_figure("bits", bits, positive=True)
    _check_figure("margin_db", margin_db, positive=False)
    if data is None:
        raise EvenbitsError("advise measures what layers make of real inputs; pass calibration data: data=[batch, …].")
    activation = None if activations is None else Format.parse(activations)
    names = candidates_for(candidates, activation)
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    scheme = Scheme(Format.parse("int4:row"), activation, dynamic, ignored)  # the weights' format decides nothing here
    check_formats(scheme.weights, activation)
    data = list(data) if isinstance(data, Iterator) else data
    batches = Batches(model, data, progress=progress)
    with (
        unfused(model, scheme, batches, keep=False) as parts,
        evaluation_mode(model),
        folded_norms(model, scheme, batches, keep=False),
    ):
        plans = parts.explained(plan_layers(model, scheme))
        plans, watched = watch(model, plans, batches, scheme, Methods.parse("by_format", {}))
        assert watched is not None
        probes = _probes(model, plans, watched, scheme, names, bits, progress)
        measure(model, probes, Batches(model, data, progress=progress))
    layers = tuple(_layer(plan, probes.get(plan.name), margin_db) for plan in plans)
    _check_any(layers, bits)
    return Advice(
        bits=float(bits),
        activations=None if activation is None else str(activation),
        dynamic=dynamic,
        margin_db=float(margin_db),
        ignore=ignored,
        candidates=names,
        layers=layers,
        totals=_totals([layer for layer in layers if layer.chosen is not None], names),
        calibration_batches=batches.count,
        seconds=time.perf_counter() - start,
    )


def _probes(
    model: nn.Module,
    plans: list[LayerPlan],
    watched: Watched,
    scheme: Scheme,
    names: tuple[str, ...],
    bits: float,
    progress: bool,
) -> dict[str, Probe]:
    chosen = [plan for plan in plans if not plan.reason]
    activations = activation_quantizers(model, chosen, scheme, Balanced(), watched)
    probes = {}
    for plan in tqdm(chosen, desc="encoding", unit="layer", disable=not progress or None):
        fits = [fit(name, (plan.shape[0], prod(plan.shape[1:])), bits) for name in names]
        stats = single_stats(plan, watched)
        probes[plan.name] = encode_layer(model.get_submodule(plan.name), plan, fits, stats, activations[plan.name])
    return probes


def _layer(plan: LayerPlan, probe: Probe | None, margin_db: float) -> LayerAdvice:
    if probe is None:
        return LayerAdvice(plan.name, plan.kind, plan.shape, reason=plan.reason)
    measured = probe.measured()
    if not any(m.format for m in measured):
        least = min(m.bits for m in measured)
        reason = f"nothing fits the budget: the least that a candidate takes is {least:.2f} bits"
        return LayerAdvice(plan.name, plan.kind, plan.shape, candidates=measured, facts=probe.facts(), reason=reason)
    chosen, runner_up = choose(measured, margin_db)
    return LayerAdvice(
        name=plan.name,
        kind=plan.kind,
        shape=plan.shape,
        chosen=chosen,
        runner_up=runner_up,
        lead_db=None if runner_up is None else gap_db(chosen.sqnr_db, runner_up.sqnr_db),
        candidates=measured,
        facts=probe.facts(),
        why=why(chosen, runner_up, measured, probe.facts()),
    )


def _totals(layers: list[LayerAdvice], names: tuple[str, ...]) -> tuple[Total, ...]:
    """The mix first, then every candidate everywhere, over the layers that get a format."""
    ways = {"advised": [layer.chosen for layer in layers]}
    ways |= {n: [next(m for m in layer.candidates if m.candidate == n) for layer in layers] for n in names}
    return tuple(_total(name, layers, ways[name]) for name in ways)


def _total(name: str, layers: list[LayerAdvice], way: list[Measured | None]) -> Total:
    pairs = [(layer, m) for layer, m in zip(layers, way, strict=True) if m is not None and m.format]
    if len(pairs) < len(layers):
        return Total(name, len(pairs), None, None, None)
    weights = sum(layer.weights for layer, _ in pairs)
    ran = [m.output_sqnr_db for _, m in pairs if m.output_sqnr_db is not None]
    return Total(
        name=name,
        layers=len(pairs),
        bits=sum(m.bits * layer.weights for layer, m in pairs) / weights,
        mean_error=sum(10 ** (-figure / 10) for figure in ran) / len(ran) if ran else None,
        mean_sqnr_db=sum(ran) / len(ran) if ran else None,
    )


def _check_figure(name: str, value: Any, *, positive: bool) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    if not number or value < 0 or (positive and value == 0):
        raise EvenbitsError(f"{name} must be a number {'above 0' if positive else 'of 0 or more'}; given {value!r}.")


def _check_any(layers: tuple[LayerAdvice, ...], bits: float) -> None:
    if any(layer.chosen is not None for layer in layers):
        return
    listed = "; ".join(f"{layer.name or 'the model'}: {layer.reason}" for layer in layers[:5])
    listed = f"{listed}{'; …' if len(layers) > 5 else '.'}" if layers else "It has no linear layer or convolution."
    raise EvenbitsError(f"no layer would get a format at {bits:g} true bits. {listed}")
