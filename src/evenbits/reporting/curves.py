"""Curves with bands over one axis, panel below panel: what is drawn, whoever draws it, and the drawing as plain SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LEFT, _RIGHT, _TOP, _GAP, _BOTTOM, _LINE = 960, 84, 200, 96, 44, 92, 17
_HEIGHTS = (300, 170)  # of the first panel, of the others
_STYLE = """<style>
svg { font: 13px system-ui, "DejaVu Sans", sans-serif; color: #1b1f24 } .sheet { fill: #fff }
text { fill: currentColor } .title { font-weight: 600; font-size: 16px } .small { font-size: 12px; fill-opacity: .8 }
.grid { stroke: currentColor; stroke-opacity: .13 } .axis { stroke: currentColor; stroke-opacity: .5 }
.curve { fill: none; stroke: #2563a8; stroke-width: 2 } .dot { fill: #2563a8 }
.band { fill: #2563a8; fill-opacity: .16 }
.ring { fill: none; stroke: #2563a8; stroke-width: 2 } .line { stroke-width: 1.6 }
.line0 { stroke: #4b5563; stroke-dasharray: 8 4 } .line1 { stroke: #c2410c; stroke-dasharray: 3 3 }
.line2 { stroke: #15803d; stroke-dasharray: 10 3 2 3 } .text0 { fill: #4b5563 } .text1 { fill: #c2410c }
.text2 { fill: #15803d } .mark { paint-order: stroke; stroke: #fff; stroke-width: 4px }
@media (prefers-color-scheme: dark) {
 svg { color: #e6e8eb } .sheet { fill: #16191d } .curve, .ring { stroke: #6ea8e6 } .dot, .band { fill: #6ea8e6 }
 .line0 { stroke: #9ca3af } .line1 { stroke: #fb923c } .line2 { stroke: #4ade80 }
 .mark { stroke: #16191d } .text0 { fill: #9ca3af } .text1 { fill: #fb923c } .text2 { fill: #4ade80 }
}
</style>"""


@dataclass(frozen=True)
class Panel:
    """One curve. y: finite or NaN (not drawn); low, high: its band, or None; lines: horizontal ones, (label, value);
    marks: points of the curve with words, (x, y, words, whether above)."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    lines: tuple[tuple[str, float], ...] = ()
    marks: tuple[tuple[float, float, str, bool], ...] = ()
    logarithmic: bool = False

    @property
    def span(self) -> tuple[float, float]:
        """The values the axis has to hold, with a little room."""
        parts = [*self.y, *(self.low or ()), *(self.high or ()), *(value for _, value in self.lines)]
        values = [value for value in parts if math.isfinite(value) and (value > 0 or not self.logarithmic)]
        low, high = min(values, default=0.0), max(values, default=1.0)
        if self.logarithmic:
            room = (high / low) ** 0.1 if high > low else 1.1
            return low / room, high * room
        room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
        return low - room, high + room


@dataclass(frozen=True)
class Figure:
    """Panels that share their axis of x. subtitle, caption: lines above and below."""

    title: str
    subtitle: tuple[str, ...]
    x_label: str
    panels: tuple[Panel, ...]
    caption: tuple[str, ...] = ()


def ticks(low: float, high: float, *, logarithmic: bool = False, count: int = 6) -> list[float]:
    """Round numbers inside [low, high]: multiples of 1, 2, 2.5 or 5 times a power of ten; 1, 2, 5 of each decade."""
    if logarithmic:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [v for k in decades for m in (1, 2, 5) if low <= (v := m * 10.0**k) <= high]
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def spread_out(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Positions near those wanted, at least `apart` from each other and inside [low, high] where they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        floor = low if rank == 0 else placed[order[rank - 1]] + apart
        placed[index] = max(wanted[index], floor)
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - apart
    return placed


def svg(figure: Figure) -> str:
    """The figure as an SVG document."""
    heights = [_HEIGHTS[0] if index == 0 else _HEIGHTS[1] for index in range(len(figure.panels))]
    lines = max(0, len(figure.caption) - 1) + max(0, len(figure.subtitle) - 1)
    total = _TOP + sum(heights) + _GAP * (len(heights) - 1) + _BOTTOM + _LINE * lines
    size = f'viewBox="0 0 {_WIDTH} {total}" width="{_WIDTH}" height="{total}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{escape(figure.title)}</title>",
        _STYLE,
        f'<rect class="sheet" width="{_WIDTH}" height="{total}"/>',
        f'<text class="title" x="{_LEFT}" y="28">{escape(figure.title)}</text>',
        *(f'<text x="{_LEFT}" y="{48 + _LINE * i}">{escape(s)}</text>' for i, s in enumerate(figure.subtitle)),
    ]
    top = _TOP + _LINE * max(0.0, len(figure.subtitle) - 1)
    xs = [x for panel in figure.panels for x in panel.x]
    across = min(xs, default=0.0), max(xs, default=1.0)
    for index, (panel, height) in enumerate(zip(figure.panels, heights, strict=True)):
        parts += _panel(panel, top, height, across, numbered=index == len(heights) - 1)
        top += height + _GAP
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    floor = top - _GAP
    parts.append(f'<text x="{middle:.1f}" y="{floor + 42:.1f}" text-anchor="middle">{escape(figure.x_label)}</text>')
    for index, words in enumerate(figure.caption):
        y = floor + 70 + _LINE * index
        parts.append(f'<text class="small" x="{_LEFT}" y="{y:.1f}">{escape(words)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Place:
    """From values to pixels."""

    def __init__(self, panel: Panel, top: float, height: float, across: tuple[float, float]) -> None:
        self.top, self.floor, self.span = top, top + height, panel.span
        room = 0.03 * (across[1] - across[0]) or 0.05
        self._across = across[0] - room, across[1] + room
        self._log = panel.logarithmic

    def x(self, value: float) -> float:
        low, high = self._across
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.span
        if self._log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return self.floor - (value - low) / (high - low) * (self.floor - self.top)


def _panel(panel: Panel, top: float, height: float, across: tuple[float, float], *, numbered: bool) -> list[str]:
    at, right = _Place(panel, top, height, across), _WIDTH - _RIGHT
    parts = [f'<text x="{_LEFT}" y="{top - 10:.1f}">{escape(panel.label)}</text>']
    for value in ticks(*panel.span, logarithmic=panel.logarithmic):
        y = at.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4.5:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in ticks(*across, count=10):
        x = at.x(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{at.top:.1f}" y2="{at.floor:.1f}"/>')
        if numbered:
            parts.append(f'<text x="{x:.1f}" y="{at.floor + 20:.1f}" text-anchor="middle">{_number(value)}</text>')
    for x1, y1, x2, y2 in ((_LEFT, at.floor, right, at.floor), (_LEFT, at.top, _LEFT, at.floor)):
        parts.append(f'<line class="axis" x1="{x1}" x2="{x2}" y1="{y1:.1f}" y2="{y2:.1f}"/>')
    return [*parts, *_lines(panel, at), *_curve(panel, at), *_marks(panel, at)]


def _lines(panel: Panel, at: _Place) -> list[str]:
    right, parts = _WIDTH - _RIGHT, []
    places = spread_out([at.y(value) for _, value in panel.lines], _LINE, at.top, at.floor)
    for index, ((words, value), place) in enumerate(zip(panel.lines, places, strict=True)):
        y, kind = at.y(value), index % 3
        parts.append(f'<line class="line line{kind}" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<line class="line line{kind}" x1="{right}" x2="{right + 14}" y1="{y:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text class="text{kind}" x="{right + 18}" y="{place + 4.5:.1f}">{escape(words)}</text>')
    return parts


def _curve(panel: Panel, at: _Place) -> list[str]:
    parts = []
    points = [(x, y) for x, y in zip(panel.x, panel.y, strict=True) if math.isfinite(y)]
    if panel.low is not None and panel.high is not None:
        band = [b for b in zip(panel.x, panel.low, panel.high, strict=True) if all(map(math.isfinite, b))]
        edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        parts.append(f'<polygon class="band" points="{_points(edge, at)}"/>')
        if len(band) == 1:  # a band of one point has no area
            parts.append(f'<polyline class="curve" points="{_points(edge, at)}"/>')
    parts.append(f'<polyline class="curve" points="{_points(points, at)}"/>')
    for x, y in points:
        words = f"{_number(x)}: {_number(y)}"
        parts.append(f'<circle class="dot" cx="{at.x(x):.1f}" cy="{at.y(y):.1f}" r="3"><title>{words}</title></circle>')
    return parts


def _points(points: Sequence[tuple[float, float]], at: _Place) -> str:
    return " ".join(f"{at.x(x):.1f},{at.y(y):.1f}" for x, y in points)


def _marks(panel: Panel, at: _Place) -> list[str]:
    parts, right = [], _WIDTH - _RIGHT
    for value_x, value_y, words, above in panel.marks:
        x, y = at.x(value_x), at.y(value_y)
        anchor = "start" if x < _LEFT + 90 else "end" if x > right - 90 else "middle"
        parts.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="6.5"/>')
        place = y - 13 if above else y + 24
        parts.append(f'<text class="mark" x="{x:.1f}" y="{place:.1f}" text-anchor="{anchor}">{escape(words)}</text>')
    return parts


def _number(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")
