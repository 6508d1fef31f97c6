"""What the pictures of a layer's input show, before and after smoothing: ranges, a histogram with the quantizer's grid,
and one sample as a surface.

Histograms are exact: the range is known from calibration, so one pass counts every number of every batch. The surface
is one sample's |x|, made smaller by taking the largest of neighbouring tokens and channels, so that no outlier is lost.
T: tokens (pixels of a convolution), C: channels, I: input channels, V: values of a quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from evenbits.numerics.affine import qparams
from evenbits.numerics.codebook import Codebook
from evenbits.numerics.elements import largest
from evenbits.numerics.format import Format
from evenbits.numerics.qdtypes import QDtype
from evenbits.observers.calibrate import watching
from evenbits.observers.channel_range import ChannelRange
from evenbits.observers.histogram import Histogram
from evenbits.pipeline.layer_ranges import RangeRow
from evenbits.pipeline.prepare import Prepared
from evenbits.pipeline.watch import without_cache

_BINS = 200
_TOKENS, _CHANNELS = 48, 96  # of a surface, at most


@dataclass(frozen=True)
class Side:
    """A layer's input before or after smoothing. lo, hi: per channel [C]; edges, counts: a histogram of all numbers;
    grid: the values the quantizer has (empty: it has no table); grid_note: what the grid stands for; entropy: bits that
    the codes carry (None without a grid); to_zero: share of the numbers that become 0; surface: [T, C] (empty: the
    layer did not run on the sample)."""

    lo: tuple[float, ...]
    hi: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    grid: tuple[float, ...]
    grid_note: str
    entropy: float | None
    to_zero: float | None
    surface: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LayerLook:
    """One layer. after is None where nothing was smoothed; tokens, channels: of the sample before it was made smaller;
    numbers: how many the histogram counted."""

    name: str
    kind: str
    input_format: str
    tokens: int
    channels: int
    numbers: int
    before: Side
    after: Side | None


class _Counting:
    """One side's histograms. values: equal bins over the range; cells: one bin per value of the quantizer."""

    def __init__(self, lo_I: torch.Tensor, hi_I: torch.Tensor, fmt: Format | None, scale: float | None) -> None:
        self.lo_I, self.hi_I = lo_I.cpu(), hi_I.cpu()
        lo, hi = float(lo_I.min()), float(hi_I.max())
        hi = hi if hi > lo else lo + max(abs(lo), 1.0) * 1e-3
        self.values = Histogram(torch.linspace(lo, hi, _BINS + 1, dtype=torch.float64))
        grid_V, self.note = _grid(lo, hi, fmt, scale)
        self.grid = grid_V.tolist()
        middles = (grid_V[1:] + grid_V[:-1]) / 2
        ends = torch.tensor([torch.finfo(torch.float64).min, torch.finfo(torch.float64).max], dtype=torch.float64)
        self.cells = Histogram(torch.cat([ends[:1], middles, ends[1:]])) if self.grid else None

    def update(self, x: torch.Tensor) -> None:
        self.values.update(x)
        if self.cells is not None:
            self.cells.update(x)

    def side(self, surface_TC: torch.Tensor) -> Side:
        cells, zero = self.cells, None
        if cells is not None and 0.0 in self.grid:
            zero = int(cells.counts[self.grid.index(0.0)]) / max(1, cells.total)
        return Side(
            lo=tuple(self.lo_I.tolist()),
            hi=tuple(self.hi_I.tolist()),
            edges=tuple(self.values.edges.tolist()),
            counts=tuple(self.values.counts.tolist()),
            grid=tuple(self.grid),
            grid_note=self.note,
            entropy=None if cells is None else cells.entropy,
            to_zero=zero,
            surface=tuple(tuple(row) for row in surface_TC.tolist()),
        )


def _grid(lo: float, hi: float, fmt: Format | None, scale: float | None) -> tuple[torch.Tensor, str]:
    """The quantizer's values, ascending float64, and what they are; no values where it has no one table."""
    none = torch.empty(0, dtype=torch.float64)
    if fmt is None:
        return none, "inputs stay float"
    if not isinstance(fmt.dtype, (QDtype, Codebook)):
        return none, f"{fmt}: pairs share their codes, no grid of single values"
    ends = torch.tensor([lo, hi])
    span, zero_point = qparams(ends[:1], ends[1:], fmt)
    note = f"{fmt}, one calibrated scale"
    if scale is None:
        note = f"{fmt}: scales are taken from each input; shown for the one with the largest range"
    step = float(span) if scale is None else scale
    if isinstance(fmt.dtype, Codebook):
        values = sorted({value for value in fmt.dtype.values if value == value and abs(value) <= largest(fmt.dtype)})
        return torch.tensor(values, dtype=torch.float64) * step, note
    low, high = fmt.code_range
    shift = 0 if zero_point is None else int(zero_point)
    return (torch.arange(low, high + 1, dtype=torch.float64) - shift) * step, note


def surface(x: torch.Tensor, channel_dim: int) -> torch.Tensor:
    """|x| of one sample as float32 [T, C]: tokens or pixels by channels, at most 48 × 96, each the largest."""
    x_TC = x.detach().movedim(channel_dim, -1).reshape(-1, x.shape[channel_dim]).abs().float().cpu()
    size = min(len(x_TC), _TOKENS), min(x_TC.shape[1], _CHANNELS)
    return F.adaptive_max_pool2d(x_TC.unsqueeze(0), size)[0]


def layer_looks(
    model: nn.Module,
    prepared: Prepared,
    ranges: Mapping[str, ChannelRange],
    rows: Sequence[RangeRow],
    runs: Iterable[Callable[[], Any]],
    sample: Callable[[], Any],
    *,
    total: int | None,
    progress: bool,
) -> tuple[LayerLook, ...]:
    """What the pictures of the layers in `rows` show. ranges: of the calibration; runs: forwards on every batch;
    sample: a forward on one sample."""
    dims = {plan.name: plan.channels.channel_dim for plan in prepared.chosen}
    sides = {row.name: _sides(row, prepared, ranges[row.name]) for row in rows}
    taken: dict[str, list[torch.Tensor]] = {}

    def seen(name: str, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.detach().float()
        return [x, prepared.balanced.seen(name, x)] if len(sides[name]) > 1 else [x]

    def count(name: str, x: torch.Tensor, _: torch.Tensor) -> None:
        for side, values in zip(sides[name], seen(name, x), strict=True):
            side.update(values)

    def take(name: str, x: torch.Tensor, _: torch.Tensor) -> None:
        if name not in taken:
            taken[name] = [surface(values, dims[name]) for values in seen(name, x)]
            sizes[name] = x.numel() // x.shape[dims[name]]

    sizes: dict[str, int] = {}
    bar = tqdm(runs, desc="counting", total=total, unit="batch", disable=not progress or None)
    with torch.no_grad(), without_cache(model):
        with watching(model, sides, count):
            for run in bar:
                run()
        with watching(model, sides, take):
            sample()
    return tuple(_look(row, sides[row.name], taken.get(row.name), sizes.get(row.name, 0)) for row in rows)


def _look(row: RangeRow, sides: list[_Counting], surfaces: list[torch.Tensor] | None, tokens: int) -> LayerLook:
    found = [torch.empty(0, 0)] * len(sides) if surfaces is None else surfaces
    before, *after = [side.side(surface_TC) for side, surface_TC in zip(sides, found, strict=True)]
    return LayerLook(
        name=row.name,
        kind=row.kind,
        input_format=row.input_format,
        tokens=tokens,
        channels=len(before.lo),
        numbers=sides[0].values.total,
        before=before,
        after=after[0] if after else None,
    )


def _sides(row: RangeRow, prepared: Prepared, ranges: ChannelRange) -> list[_Counting]:
    """The input before smoothing, and after it if that changes anything."""
    balanced, fmt = prepared.balanced, prepared.modules[row.name].input_format
    lo_I, hi_I = ranges.lo.cpu(), ranges.hi.cpu()
    before = _Counting(lo_I, hi_I, fmt, row.scale_before)
    scale_I, perm_I = balanced.scales.get(row.name), balanced.perms.get(row.name)
    if scale_I is not None:
        lo_I, hi_I = lo_I / scale_I.cpu(), hi_I / scale_I.cpu()
    if perm_I is not None:
        lo_I, hi_I = lo_I[perm_I.cpu()], hi_I[perm_I.cpu()]
    smoothed = scale_I is not None or perm_I is not None
    return [before, _Counting(lo_I, hi_I, fmt, row.scale_after)] if smoothed else [before]
