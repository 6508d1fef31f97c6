"""What `quantize` returns: a value that the command line prints, a report draws and `--json` writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from evenbits.evaluation.result import finite
from evenbits.numerics.pair_statistics import PairStatistics
from evenbits.numerics.search import SearchCost


@dataclass(frozen=True)
class LayerRow:
    """One layer. status: "quantized" or "float"; reason: why it is float, or what to know about it; pairs: what became
    of outlier-victim pairs, for formats that have them."""

    name: str
    kind: str
    format: str
    input_format: str
    status: str
    reason: str
    shape: tuple[int, ...]
    bits_per_weight: float
    weight_bytes: int
    sqnr_db: float | None = None
    output_sqnr_db: float | None = None
    pairs: PairStatistics | None = None


@dataclass(frozen=True)
class RegionRow:
    """One region. status: "folded", "multiplied", "indexed" (re-paired at run time) or "skipped", with the reason.
    curve: pairs (α, loss) that a search tried, sorted."""

    name: str
    layers: tuple[str, ...]
    status: str
    reason: str
    alpha: float | None
    curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class ProbeRow:
    """Layers of one shape, timed before conversion. work: "first batch" or "one token"; seconds: of one call; ratio:
    float / quantized, above 1 the quantized one is faster; low, high: quartiles of the rounds' own ratios."""

    work: str
    layers: tuple[str, ...]
    shape: str
    float_seconds: float
    quantized_seconds: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """A quantization run. Bytes: `weight_bytes` are codes, scales, zero points, row sums of the quantized layers, and
    what of a smoothing or an order of channels could not be folded; `float_weight_bytes` four bytes for each of their
    elements, `model_bytes` the whole model now. search: what looking for scales took; probe: speeds that were measured
    before conversion, if asked for."""

    scheme: dict[str, Any]
    method: str
    options: dict[str, Any]
    layers: tuple[LayerRow, ...]
    regions: tuple[RegionRow, ...]
    weight_bytes: int
    float_weight_bytes: int
    model_bytes: int
    seconds: float
    peak_bytes: int
    backend: str
    search: SearchCost
    calibration_batches: int
    notes: tuple[str, ...] = field(default=())
    probe: tuple[ProbeRow, ...] = field(default=())

    @property
    def quantized(self) -> tuple[LayerRow, ...]:
        """The rows of quantized layers."""
        return tuple(row for row in self.layers if row.status == "quantized")

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; infinite and absent figures are null."""
        plain: dict[str, Any] = finite(asdict(self))
        return plain
