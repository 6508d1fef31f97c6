"""Pictures as plain SVG text: no plotting library, one file, opens in any browser, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP, _BOTTOM = 960, 340, 64, 56, 36, 48
_STYLE = """<style>
svg { font: 13px system-ui, sans-serif; background: #fff; color: #1b1f24 }
text { fill: currentColor } .bar { fill: #2563a8 } .step { stroke: #c2410c; stroke-width: 1.5; stroke-dasharray: 5 3 }
.axis { stroke: currentColor; stroke-opacity: .25 } .note { fill: #c2410c } .title { font-weight: 600 }
@media (prefers-color-scheme: dark) {
 svg { background: #16191d; color: #e6e8eb } .bar { fill: #6ea8e6 } .step { stroke: #fb923c } .note { fill: #fb923c }
}
</style>"""


def channel_ranges(panels: Sequence[tuple[str, Sequence[float]]], *, title: str, levels: int = 127) -> str:
    """Bar charts of max |x| per channel, side by side on one logarithmic axis, as an SVG document.

    panels: (heading, one positive figure per channel). The dashed line in each panel is one step of a symmetric
    quantizer that spans the panel's largest channel (max / `levels`): what lies below it is rounded to zero or one
    step.
    """
    figures = [value for _, values in panels for value in values if value > 0]
    steps = [max(values) / levels for _, values in panels]
    low = math.floor(math.log10(min([*figures, *(step for step in steps if step > 0)], default=0.1)))
    high = math.ceil(math.log10(max(figures, default=1.0)))
    high = max(high, low + 1)
    inner = (_WIDTH - _LEFT - 16 - _GAP * (len(panels) - 1)) / max(1, len(panels))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        _STYLE,
        f'<text class="title" x="{_LEFT}" y="22">{escape(title)}</text>',
    ]
    for decade in range(low, high + 1):
        y = _y(10.0**decade, low, high)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**decade:g}</text>')
    for index, ((heading, values), step) in enumerate(zip(panels, steps, strict=True)):
        parts += _panel(_LEFT + index * (inner + _GAP), inner, heading, values, step, low, high)
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _panel(
    left: float, width: float, heading: str, values: Sequence[float], step: float, low: int, high: int
) -> list[str]:
    bar = width / max(1, len(values))
    floor = _HEIGHT - _BOTTOM
    parts = [f'<text x="{left:.1f}" y="{_TOP - 10}">{escape(heading)}</text>']
    for channel, value in enumerate(values):
        if value <= 0:
            continue
        top = _y(value, low, high)
        parts.append(
            f'<rect class="bar" x="{left + channel * bar:.2f}" y="{top:.1f}" width="{max(bar - 0.6, 0.6):.2f}" '
            f'height="{max(floor - top, 0.5):.1f}"><title>channel {channel}: {value:.4g}</title></rect>'
        )
    if step > 0:
        y = _y(step, low, high)
        below = sum(value < step for value in values)
        parts.append(f'<line class="step" x1="{left:.1f}" x2="{left + width:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="note" x="{left:.1f}" y="{_HEIGHT - 28}">one int8 step = {step:.3g}: '
            f"{below} of {len(values)} channels never reach it</text>"
        )
    parts.append(f'<text x="{left + width:.1f}" y="{_HEIGHT - 10}" text-anchor="end">channel →</text>')
    return parts


def _y(value: float, low: int, high: int) -> float:
    share = (math.log10(max(value, 10.0**low)) - low) / (high - low)
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)
