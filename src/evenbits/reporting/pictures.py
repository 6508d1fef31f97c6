"""Pictures of a diagnosis, by matplotlib, without a display: each function returns a Figure.

before: orange, after: blue, wherever the two stand side by side. Words are never read as formulas, whatever a layer is
called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil, isfinite
from typing import Any

from evenbits.errors import MissingExtraError
from evenbits.pipeline.layer_errors import LayerErrors
from evenbits.pipeline.layer_looks import LayerLook, Side

BEFORE, AFTER, MUTED = "#c2410c", "#2563a8", "#6b7280"
_NAMES = 70  # layer names that fit under an axis
_COMB = 40  # values of a quantizer that are drawn as lines of full height; more become a comb


def require_matplotlib() -> None:
    """Raises MissingExtraError if the pictures cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "drawing the pictures") from error


@contextmanager
def drawing() -> Iterator[None]:
    """The style of all pictures: words stay words in the SVG, and the same figures give the same bytes."""
    import matplotlib

    style = {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "evenbits",
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        yield


def figure(width: float, height: float) -> Any:
    """An empty Figure on the Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height))
    FigureCanvasAgg(made)
    return made


def plain_log(axis: Any, *, percent: bool = False) -> None:
    """Labels 1, 2 and 5 of every decade of a logarithmic axis, as numbers: formulas are switched off."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(lambda value, _: f"{100 * value:g} %" if percent else f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def shown(name: str, longest: int = 44) -> str:
    """A layer's name as it is drawn: printable, and shortened in the middle."""
    name = "".join(letter if letter.isprintable() else "�" for letter in name)
    return name if len(name) <= longest else f"{name[: longest // 2 - 1]}…{name[-(longest // 2) :]}"


def errors_picture(errors: LayerErrors, title: str) -> Any:
    """Isolated and cumulative L1 loss and SQNR of every layer, in the order of the forward."""
    rows = errors.rows
    made = figure(max(7.0, min(22.0, 0.21 * len(rows) + 2.5)), 6.4)
    top, bottom = made.subplots(2, 1, sharex=True)
    made.suptitle(shown(title, 110), x=0.01, ha="left", fontsize=10, fontweight="bold")
    _curves(top, [r.isolated_l1 for r in rows], [r.cumulative_l1 for r in rows], errors.output_l1)
    _curves(bottom, [r.isolated_sqnr_db for r in rows], [r.cumulative_sqnr_db for r in rows], errors.output_sqnr_db)
    top.set_yscale("log")
    plain_log(top.yaxis)
    top.set_ylabel("relative L1 loss")
    top.set_title("Σ |error| / Σ |float output|: lower is better")
    bottom.set_ylabel("SQNR, dB")
    bottom.set_title("signal over quantization noise: higher is better")
    every = ceil(len(rows) / _NAMES) if rows else 1
    places = list(range(0, len(rows), every))
    bottom.set_xticks(places, [shown(rows[place].name) for place in places], rotation=90, fontsize=7)
    bottom.set_xlim(-0.7, len(rows) - 0.3)
    bottom.set_xlabel("layers in the order of the forward")
    top.legend(loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=3)
    low, high = top.get_ylim()
    top.set_ylim(low, high * (high / low) ** 0.18)  # room for the legend
    return made


def _curves(axes: Any, isolated: Sequence[float | None], cumulative: Sequence[float | None], output: Any) -> None:
    places = range(len(isolated))
    axes.plot(
        places, [_gap(v) for v in cumulative], "-s", color=BEFORE, markersize=3, linewidth=1.2, label="cumulative"
    )
    axes.plot(places, [_gap(v) for v in isolated], "o", color=AFTER, markersize=4, label="isolated")
    if output is not None and isfinite(output):
        axes.axhline(output, color=MUTED, linestyle="--", linewidth=1, label="model output")


def _gap(value: float | None) -> float:
    return float("nan") if value is None or not isfinite(value) or value == 0 else value


def _sides(look: LayerLook) -> list[tuple[str, str, Side]]:
    if look.after is None:
        return [("input (nothing is smoothed)", AFTER, look.before)]
    return [("before smoothing", BEFORE, look.before), ("after smoothing", AFTER, look.after)]


def _headed(look: LayerLook, width: float, height: float, what: str) -> Any:
    made = figure(width if look.after is not None else width * 0.6, height)
    made.suptitle(f"{shown(look.name)}: {what}", x=0.01, ha="left", fontsize=10, fontweight="bold")
    return made


def ranges_picture(look: LayerLook) -> Any:
    """Smallest and largest value of every input channel over the calibration data."""
    made, sides = _headed(look, 10.5, 3.6, "range of every input channel"), _sides(look)
    for axes, (heading, colour, side) in zip(made.subplots(1, len(sides), squeeze=False)[0], sides, strict=True):
        # Doubled at the end, so that the last channel is as wide as the others.
        edges = [index - 0.5 for index in range(len(side.lo) + 1)]
        lo, hi = [*side.lo, side.lo[-1]], [*side.hi, side.hi[-1]]
        axes.fill_between(edges, lo, hi, step="post", color=colour, linewidth=0.4, label="smallest … largest")
        step = step_of(side.grid)
        if step is not None:
            axes.axhspan(-step / 2, step / 2, color="black", alpha=0.22, linewidth=0, label="rounds to zero")
        absmax = sorted(max(abs(a), abs(b)) for a, b in zip(side.lo, side.hi, strict=True))
        middle = absmax[(len(absmax) - 1) // 2]
        uneven = f"{absmax[-1] / middle:.3g} × the median channel's" if middle > 0 else "the median channel is zero"
        axes.set_title(f"{heading}: max |x| {absmax[-1]:.3g}, {uneven}")
        axes.set_xlim(-0.5, len(side.lo) - 0.5)
        axes.set_xlabel("input channel")
        axes.margins(y=0.12)
        axes.legend(loc="upper right", fontsize=7, ncols=2)
    return made


def step_of(grid: Sequence[float]) -> float | None:
    """The distance between the two values of a quantizer around zero; None without a grid."""
    if len(grid) < 2:
        return None
    nearest = min(range(len(grid)), key=lambda index: abs(grid[index]))
    neighbour = nearest + 1 if nearest + 1 < len(grid) else nearest - 1
    return abs(grid[neighbour] - grid[nearest])


def surface_picture(look: LayerLook) -> Any:
    """|x| of one sample over tokens (pixels of a convolution) and channels."""
    made, sides = _headed(look, 10.5, 4.0, "|input| of one sample"), _sides(look)
    rows = "pixel" if look.kind.startswith("Conv") and look.kind != "Conv1D" else "token"
    for index, (heading, _, side) in enumerate(sides):
        if not side.surface:
            axes = made.add_subplot(1, len(sides), index + 1)
            axes.set_axis_off()
            axes.text(0.5, 0.5, "the layer did not run on the first sample", ha="center")
            continue
        axes = made.add_subplot(1, len(sides), index + 1, projection="3d")
        _surface(axes, side.surface, look.tokens, look.channels)
        axes.set_title(f"{heading}: largest {max(max(row) for row in side.surface):.3g}")
        axes.set_xlabel("channel")
        axes.set_ylabel(rows)
        axes.set_zlabel("|x|")
    return made


def _surface(axes: Any, surface: Sequence[Sequence[float]], tokens: int, channels: int) -> None:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    z = np.asarray(surface)
    if min(z.shape) == 1:  # a surface needs two lines; the second is the same one again
        z = z.repeat(2 if z.shape[0] == 1 else 1, axis=0).repeat(2 if z.shape[1] == 1 else 1, axis=1)
    x, y = np.meshgrid(np.linspace(0, channels - 1, z.shape[1]), np.linspace(0, tokens - 1, z.shape[0]))
    corners = z.copy()  # a tile has the colour of its highest corner, so that a lone peak shows
    corners[:-1, :-1] = np.maximum.reduce([z[:-1, :-1], z[1:, :-1], z[:-1, 1:], z[1:, 1:]])
    colours = colormaps["viridis"](Normalize(0, max(float(z.max()), 1e-30))(corners))
    # Drawn as an image inside the SVG: thousands of tiles would make megabytes.
    axes.plot_surface(x, y, z, facecolors=colours, rcount=z.shape[0], ccount=z.shape[1], shade=False, rasterized=True)
    axes.view_init(elev=32, azim=-58)
    axes.set_zlim(0, float(z.max()) or 1.0)
    axes.set_box_aspect((1.6, 1.1, 0.9), zoom=1.0)


def histogram_picture(look: LayerLook) -> Any:
    """How many numbers have which value, and the values that the quantizer has for them."""
    made, sides = _headed(look, 10.5, 3.8, f"{look.numbers:,} values and the quantizer's grid"), _sides(look)
    for axes, (heading, colour, side) in zip(made.subplots(1, len(sides), squeeze=False)[0], sides, strict=True):
        axes.stairs(side.counts, side.edges, fill=True, color=colour, alpha=0.85)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_ylim(0.5, 4 * max(1, *side.counts))
        _comb(axes, side)
        axes.set_title(f"{heading}{_carried(side)}")
        axes.set_xlabel(f"value of the input\n{side.grid_note}")
        axes.set_ylabel("count")
    return made


def _comb(axes: Any, side: Side) -> None:
    """The quantizer's values: lines if they are few, else a comb at the foot of the picture."""
    if not side.grid:
        return
    low, high = min(side.grid[0], side.edges[0]), max(side.grid[-1], side.edges[-1])
    margin = 0.02 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    few = len(side.grid) <= _COMB
    foot = axes.get_xaxis_transform()
    axes.vlines(
        side.grid, 0, 1 if few else 0.06, transform=foot, color="black", linewidth=0.7 if few else 0.4,
        alpha=0.45 if few else 0.9, label=f"{len(side.grid)} values of the quantizer",
    )  # fmt: skip
    axes.legend(loc="upper right", fontsize=7)


def _carried(side: Side) -> str:
    if side.entropy is None:
        return ""
    zero = "" if side.to_zero is None else f", {100 * side.to_zero:.3g} % become 0"
    return f": {side.entropy:.2f} bits per code{zero}"
