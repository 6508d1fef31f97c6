"""A run as a picture: memory, processor and GPU over time, one panel each on one time axis."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10
from pathlib import Path

from evenbits.evaluation.monitor import Timeline
from evenbits.reporting.tables import size

_WIDTH, _LEFT, _RIGHT, _TOP, _PANEL, _GAP, _FOOT = 960, 76, 24, 58, 150, 46, 44
_TICKS = 4
_STYLE = """<style>
svg { font: 13px system-ui, sans-serif; background: #fff; color: #1b1f24 }
text { fill: currentColor }
.title { font-weight: 600; font-size: 15px }
.axis { stroke: currentColor; stroke-opacity: .18 }
.quiet { fill-opacity: .65 }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round } .area { fill-opacity: .16 }
.c0 { stroke: #2563a8; fill: #2563a8 } .c1 { stroke: #c2410c; fill: #c2410c } .c2 { stroke: #2f7d4f; fill: #2f7d4f }
.c3 { stroke: #7c4dbd; fill: #7c4dbd } .line { fill: none } .area { stroke: none }
@media (prefers-color-scheme: dark) {
 svg { background: #16191d; color: #e6e8eb }
 .c0 { stroke: #6ea8e6; fill: #6ea8e6 } .c1 { stroke: #fb923c; fill: #fb923c } .c2 { stroke: #6fcf97; fill: #6fcf97 }
 .c3 { stroke: #b794f6; fill: #b794f6 } .line { fill: none } .area { stroke: none }
}
</style>"""

Panel = tuple[str, list[tuple[float, float]], bool]  # heading, (seconds, value), whether values are bytes


def panels(timeline: Timeline) -> list[Panel]:
    """What there is to show: GPU panels only where a GPU was seen."""
    rows = timeline.samples
    found: list[Panel] = [
        ("resident memory", [(s.seconds, float(s.resident)) for s in rows], True),
        ("CPU, % of one core", [(s.seconds, s.cpu) for s in rows], False),
        ("GPU memory, whole device", [(s.seconds, float(s.gpu_bytes)) for s in rows if s.gpu_bytes is not None], True),
        ("GPU, % busy", [(s.seconds, s.gpu) for s in rows if s.gpu is not None], False),
    ]
    return [panel for index, panel in enumerate(found) if panel[1] or index < 2]


def timeline_svg(timeline: Timeline) -> str:
    """The picture as an SVG document."""
    shown = panels(timeline)
    height = _TOP + len(shown) * (_PANEL + _GAP) + _FOOT - _GAP
    end = max((sample.seconds for sample in timeline.samples), default=0.0) or 1.0
    ended = f"exit code {timeline.ended}" if isinstance(timeline.ended, int) else timeline.ended
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>{escape(timeline.command)}</title>",
        _STYLE,
        f'<text class="title" x="{_LEFT}" y="24">{escape(_short(timeline.command, 80))}</text>',
        f'<text class="quiet" x="{_WIDTH - _RIGHT}" y="24" text-anchor="end">{escape(str(ended))}</text>',
    ]
    for index, panel in enumerate(shown):
        parts += _panel(panel, index, _TOP + index * (_PANEL + _GAP), end)
    foot = height - _FOOT + 18
    step = nice_step(end, 8)
    for tick in range(floor(end / step + 1e-9) + 1):
        x = _x(tick * step, end)
        parts.append(
            f'<text class="quiet" x="{x:.1f}" y="{foot}" text-anchor="middle">{_clock(tick * step, step)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, index: int, top: int, end: float) -> list[str]:
    heading, points, is_bytes = panel
    highest = max((value for _, value in points), default=0.0)
    step = nice_step(highest or 1.0, _TICKS)
    limit = step * max(1, ceil(highest / step - 1e-9))
    bottom = top + _PANEL

    def y_of(value: float) -> float:
        return bottom - value / limit * _PANEL

    written = size(int(highest)) if is_bytes else f"{highest:.0f} %"
    mean = sum(value for _, value in points) / max(1, len(points))
    told = f"peak {written}" if is_bytes else f"peak {written}, mean {mean:.0f} %"
    parts = [
        f'<text x="{_LEFT}" y="{top - 10}">{escape(heading)}</text>',
        f'<text x="{_WIDTH - _RIGHT}" y="{top - 10}" text-anchor="end">{told}</text>',
    ]
    for tick in range(round(limit / step) + 1):
        y, label = y_of(tick * step), size(int(tick * step)) if is_bytes else f"{tick * step:g} %"
        label = "0" if tick == 0 else label.replace(".00", "")
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="quiet" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    if not points:
        return parts
    path = " ".join(f"{_x(seconds, end):.1f},{y_of(value):.1f}" for seconds, value in points)
    first, last = _x(points[0][0], end), _x(points[-1][0], end)
    parts.append(f'<polygon class="area c{index}" points="{first:.1f},{bottom} {path} {last:.1f},{bottom}"/>')
    parts.append(f'<polyline class="line c{index}" points="{path}"/>')
    seconds, value = max(points, key=lambda point: point[1])
    parts.append(f'<circle class="c{index}" cx="{_x(seconds, end):.1f}" cy="{y_of(value):.1f}" r="3.5"/>')
    return parts


def write_png(timeline: Timeline, path: Path) -> bool:
    """The same picture by matplotlib; False if it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    figure_class = importlib.import_module("matplotlib.figure").Figure  # no global state, no display
    shown = panels(timeline)
    figure = figure_class(figsize=(9.6, 1.2 + 2 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for index, (axis, (heading, points, is_bytes)) in enumerate(zip(axes, shown, strict=True)):
        unit = 1e6 if is_bytes else 1.0
        xs, ys = [x for x, _ in points], [y / unit for _, y in points]
        axis.plot(xs, ys, color=f"C{index}", linewidth=1.5)
        axis.fill_between(xs, ys, alpha=0.16, color=f"C{index}")
        axis.set_title(heading + (", MB" if is_bytes else ""), loc="left", fontsize=10)
        highest = size(int(max(ys, default=0.0) * unit)) if is_bytes else f"{max(ys, default=0.0):.0f} %"
        axis.set_title(f"peak {highest}", loc="right", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.margins(x=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    axes[-1].set_xlabel("seconds")
    figure.suptitle(_short(timeline.command, 80), fontsize=11, x=0.01, ha="left", weight="semibold")
    figure.savefig(path, dpi=120)
    return True


def nice_step(highest: float, ticks: int) -> float:
    """A round step (1, 2, 2.5 or 5 times a power of ten) that reaches `highest` in about so many."""
    raw = highest / ticks
    power: float = 10.0 ** floor(log10(raw))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= raw * (1 - 1e-9))


def _x(seconds: float, end: float) -> float:
    return _LEFT + seconds / end * (_WIDTH - _LEFT - _RIGHT)


def _clock(seconds: float, step: float) -> str:
    return f"{seconds:g} s" if step < 60 else f"{seconds / 60:g} min" if step < 3600 else f"{seconds / 3600:g} h"


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def summary(timeline: Timeline, files: Sequence[Path]) -> str:
    """One line for the terminal."""
    found, peak = timeline.to_json(), timeline.peak
    if peak is None:
        return "Nothing was measured: the process ended before the first sample."
    gpu = found["peak_gpu_bytes"]
    return (
        f"{found['seconds']:.1f} s, peak memory {size(peak.resident)} at {peak.seconds:.1f} s, CPU "
        f"{found['mean_cpu_percent']:.0f} % of one core on average, GPU "
        f"{timeline.gpu if gpu is None else size(gpu) + ' at most'}. Written: {', '.join(map(str, files))}."
    )
