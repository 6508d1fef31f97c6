"""Measuring candidates: every layer in every format, against the float layer on the same inputs.

For each layer the packed codes of all its candidates are held. A batch runs once; at every layer its input is rounded
once, as it will be when deployed, and each candidate answers it, decoded for the moment. What stays are sums:

    relative error of a candidate = Σ ‖ŷ − y‖² / Σ ‖y‖²      over all batches, y of the float layer

O: out, I: in (columns of the matrix view).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from evenbits.algorithms.base import ActivationQuantizer, LayerStats
from evenbits.errors import EvenbitsError
from evenbits.nn.base import QuantizedLayer
from evenbits.numerics.elements import fits_int8
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.metrics import RunningError
from evenbits.numerics.pair_statistics import PairStatistics
from evenbits.observers.calibrate import watching
from evenbits.pipeline.advice import Facts, Measured
from evenbits.pipeline.batches import Batches
from evenbits.pipeline.candidates import Fit
from evenbits.pipeline.plan import LayerPlan, weight_OI
from evenbits.pipeline.solve import single_layer

_FAR = 4.0  # σ beyond which a weight counts as far out
_INPUTS = ""  # the key of the float weight on rounded inputs


@dataclass(frozen=True)
class _Encoded:
    """A layer in one format, as deployed and as a float product of inputs that are rounded already (sharing its codes),
    and how its weight was kept."""

    deployed: QuantizedLayer
    product: QuantizedLayer
    error: RunningError
    pairs: PairStatistics | None
    zones: tuple[float, float, float]


@dataclass
class Probe:
    """One layer under test: its candidates as encoded (by spelling of the format) and the running sums."""

    plan: LayerPlan
    fits: Sequence[Fit]
    activation: ActivationQuantizer | None
    encoded: dict[str, _Encoded]
    peak: float
    beyond: float
    signal: float = 0.0
    noise: dict[str, float] = field(default_factory=dict)

    def see(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds one call of the float layer: its input x and output y."""
        if not x.numel():
            return
        self.signal += _power(y)
        rounded = x if self.activation is None else self._rounded(x, self.activation)
        if self.activation is not None:
            self._add(_INPUTS, module.forward(rounded), y)
        for name, encoded in self.encoded.items():
            self._add(name, encoded.product(rounded), y)

    def _rounded(self, x: torch.Tensor, by: ActivationQuantizer) -> torch.Tensor:
        spatial = self.plan.channels.spatial
        rows = x.flatten(-1 - spatial) if spatial else x  # each image one row, as the layer has it
        scale, zero_point = (None if t is None else t.to(x.device) for t in (by.scale, by.zero_point))
        return fake_quantize(rows, by.format, scale=scale, zero_point=zero_point).view(x.shape)

    def _add(self, name: str, answer: torch.Tensor, y: torch.Tensor) -> None:
        self.noise[name] = self.noise.get(name, 0.0) + _power(answer.float() - y.float())

    def measured(self) -> tuple[Measured, ...]:
        """A line for each candidate. Raises EvenbitsError if an output was not finite."""
        for name, noise in self.noise.items():
            if not math.isfinite(noise + self.signal):
                what = f"in {name}" if name else "on rounded inputs"
                raise EvenbitsError(f"layer {self.plan.name}: the output {what} holds NaN or infinite values.")
        return tuple(self._line(fitted) for fitted in self.fits)

    def facts(self) -> Facts:
        """What is worth telling of the layer beside its candidates."""
        paired = [e for e in self.encoded.values() if e.pairs is not None]
        best = max(paired, key=lambda e: e.error.sqnr_db, default=None)
        pairs = None if best is None or best.pairs is None else best.pairs.on + best.pairs.oo
        return Facts(self.peak, self.beyond, pairs, self._sqnr_db(_INPUTS))

    def _line(self, fitted: Fit) -> Measured:
        if fitted.format is None:
            return Measured(fitted.candidate, "", "", fitted.bits, reason=fitted.reason)
        name = str(fitted.format)
        found = self.encoded[name]
        return Measured(
            candidate=fitted.candidate,
            format=name,
            encoded=str(found.deployed.weight_format),
            bits=found.deployed.qweight().bits_per_element,
            integer=_integer(found.deployed),
            output_sqnr_db=self._sqnr_db(name),
            weight_sqnr_db=found.error.sqnr_db,
            zones=found.zones,
        )

    def _sqnr_db(self, name: str) -> float | None:
        if name not in self.noise:
            return None
        if not self.noise[name]:
            return math.inf
        return 10 * math.log10(self.signal / self.noise[name]) if self.signal else -math.inf


def encode_layer(
    module: nn.Module, plan: LayerPlan, fits: Sequence[Fit], stats: LayerStats, activation: ActivationQuantizer | None
) -> Probe:
    """Encodes a layer's weight in every format that fits, each by the method that suits it.

    Raises EvenbitsError, naming the layer, for a weight that a format cannot hold.
    """
    weight = weight_OI(module).float()
    sigma = weight.square().mean(dim=1, keepdim=True).sqrt()
    away = (weight / torch.where(sigma > 0, sigma, 1.0)).abs()
    encoded: dict[str, _Encoded] = {}
    for fmt in dict.fromkeys(fitted.format for fitted in fits if fitted.format is not None):
        try:
            layer, error, pairs = single_layer(module, plan, fmt, stats, activation)
        except EvenbitsError as failure:
            raise EvenbitsError(f"layer {plan.name}: {failure}") from failure
        product = copy.copy(layer)  # shares the buffers
        product.input_format = None
        encoded[str(fmt)] = _Encoded(layer, product, error, pairs, _zones(weight, layer, away, stats.second_moment_I))
    beyond = 100 * float((away > _FAR).double().mean())
    return Probe(plan, fits, activation, encoded, float(away.max()), beyond)


def measure(model: nn.Module, probes: Mapping[str, Probe], batches: Batches) -> None:
    """Runs every batch once and adds what each layer sees to its probe."""

    def see(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        probes[name].see(model.get_submodule(name), x, y)

    with watching(model, probes, see):
        batches.run_all()


def _zones(
    weight: torch.Tensor, layer: QuantizedLayer, away: torch.Tensor, moment_I: torch.Tensor | None
) -> tuple[float, float, float]:
    """Σ h e² of the weights within one σ, up to three, and beyond, as shares of Σ h w²."""
    cost = (weight - layer.qweight().dequantize(torch.float32)).square_()
    signal = weight.square()
    if moment_I is not None:
        cost, signal = cost * moment_I, signal * moment_I
    total = float(signal.sum(dtype=torch.float64)) or 1.0
    near = float(cost[away <= 1].sum(dtype=torch.float64))
    far = float(cost[away > 3].sum(dtype=torch.float64))
    middle = float(cost[(away > 1) & (away <= 3)].sum(dtype=torch.float64))
    return near / total, middle / total, far / total


def _integer(layer: QuantizedLayer) -> str:
    if layer.is_integer:
        return "product"
    return "values" if fits_int8(layer.weight_format.dtype) and layer.weight_format.rule.symmetric else ""


def _power(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x.detach().float(), dtype=torch.float64)) ** 2
