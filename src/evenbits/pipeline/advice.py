"""What `advise` returns: for every layer what was measured and what was chosen, and the whole as a scheme."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from evenbits.errors import EvenbitsError, unknown_name
from evenbits.evaluation.result import finite
from evenbits.numerics.format import Format
from evenbits.schemes.scheme import LayerFormats, Scheme

ZONES = ("within one σ", "one to three σ", "beyond three σ")


@dataclass(frozen=True)
class Measured:
    """One candidate on one layer.

    format:  how a scheme spells it; "" if it does not fit the budget, and `reason` says why. encoded: what became of it
             (a choice resolved). bits: true bits per weight.
    integer: "product" if the layer would be computed in integers, "values" if int8 could hold its values, else "".
    output_sqnr_db: of the layer's output over all calibration data, inputs quantized as deployed; None if not measured.
    weight_sqnr_db: of the weight. zones: squared error of the weights of each of ZONES, every column weighed by the
             mean square of its input, as shares of the layer's Σ h w².
    """

    candidate: str
    format: str
    encoded: str
    bits: float
    integer: str = ""
    output_sqnr_db: float | None = None
    weight_sqnr_db: float | None = None
    zones: tuple[float, float, float] | None = None
    reason: str = ""

    @property
    def sqnr_db(self) -> float:
        """What decides: the output's figure, or the weight's where the layer did not run. Raises EvenbitsError."""
        found = self.weight_sqnr_db if self.output_sqnr_db is None else self.output_sqnr_db
        if found is None:
            raise EvenbitsError(f"the candidate {self.candidate} was not measured: {self.reason or 'no data'}.")
        return found


@dataclass(frozen=True)
class Facts:
    """What was measured of a layer beside the candidates. σ: root mean square of a weight's row.

    peak: the largest |w| in σ. beyond: percent of weights beyond four σ. pairs: percent of pairs that hold an outlier
    as the best candidate of pairs encodes them; None without such. inputs_sqnr_db: of the output if only the inputs are
    rounded; None if they stay float.
    """

    peak: float
    beyond: float
    pairs: float | None = None
    inputs_sqnr_db: float | None = None


@dataclass(frozen=True)
class LayerAdvice:
    """One layer. chosen: None if it stays float (`reason` says why). runner_up: the best of another element type;
    lead_db: how far it is behind (negative where the chosen one was preferred within the margin)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    chosen: Measured | None = None
    runner_up: Measured | None = None
    lead_db: float | None = None
    candidates: tuple[Measured, ...] = ()
    facts: Facts | None = None
    why: str = ""
    reason: str = ""

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return prod(self.shape)


@dataclass(frozen=True)
class Total:
    """One way to quantize the whole model: `name` is a candidate, or "advised". Errors are means over the layers that
    ran: of the relative squared output error, and of its decibels; None if it does not fit every layer."""

    name: str
    layers: int
    bits: float | None
    mean_error: float | None
    mean_sqnr_db: float | None


@dataclass(frozen=True)
class Advice:
    """The advice for a model. margin_db: what counted as equal. `quantize` with `scheme()` and method `method` makes
    the layers as they were measured."""

    bits: float
    activations: str | None
    dynamic: bool
    margin_db: float
    ignore: tuple[str, ...]
    candidates: tuple[str, ...]
    layers: tuple[LayerAdvice, ...]
    totals: tuple[Total, ...]
    calibration_batches: int
    seconds: float
    method: str = "by_format"

    @property
    def advised(self) -> tuple[LayerAdvice, ...]:
        """The layers that get a format."""
        return tuple(layer for layer in self.layers if layer.chosen is not None)

    def scheme(self, candidate: str | None = None) -> Scheme:
        """The advised mix as a scheme; or one candidate everywhere, each layer with the granularity that fits it.

        Layers for which nothing fits the budget are in `ignore`. Raises EvenbitsError for a candidate that was not
        measured or does not fit an advised layer.
        """
        if candidate is not None and candidate not in self.candidates:
            raise unknown_name("candidate", candidate, self.candidates)
        formats = {layer.name: _format_of(layer, candidate) for layer in self.advised}
        usual = Counter(formats.values()).most_common(1)[0][0]
        names = [layer.name for layer in self.layers]
        unfit = [layer.name for layer in self.layers if layer.chosen is None and layer.candidates]
        activations = None if self.activations is None else Format.parse(self.activations)
        own = {fmt: LayerFormats(Format.parse(fmt), activations, self.dynamic) for fmt in formats.values()}
        return Scheme(
            weights=own[usual].weights,
            input_activations=activations,
            dynamic=self.dynamic,
            ignore=(*self.ignore, *(_only(name, names) for name in unfit)),
            overrides=tuple((_only(name, names), own[fmt]) for name, fmt in formats.items() if fmt != usual),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON, the scheme included; infinite figures are null."""
        plain: dict[str, Any] = finite({**asdict(self), "scheme": self.scheme().to_json()})
        return plain


def _format_of(layer: LayerAdvice, candidate: str | None) -> str:
    wanted = layer.chosen if candidate is None else next(m for m in layer.candidates if m.candidate == candidate)
    if wanted is None or not wanted.format:
        raise EvenbitsError(f"{candidate} does not fit layer {layer.name}: it {wanted.reason if wanted else ''}.")
    return wanted.format


def _only(name: str, names: list[str]) -> str:
    """A pattern that matches the layer `name` and no other, not even one whose last part it is."""
    taken = any(other != name and other.rpartition(".")[2] == name for other in names)
    return f"[{name[0]}]{name[1:]}" if taken else name
