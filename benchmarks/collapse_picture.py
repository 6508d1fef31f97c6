"""The curves of collapse.py: loss over steps for each width, the mean of the seeds with the range between them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from evenbits.reporting.pictures import drawing, figure

_WINDOW = 20  # steps that are averaged
_COLOURS = {"none": "#4b5563", "minmax": "#c2410c", "zero": "#2563a8", "multi": "#15803d", "grouped": "#7c3aed"}


def smoothed(curve: list[float]) -> np.ndarray:
    """The mean of the last _WINDOW steps, from step _WINDOW on."""
    return np.convolve(curve, np.full(_WINDOW, 1 / _WINDOW), mode="valid")


def curves(runs: list[dict[str, Any]]) -> dict[int, dict[str, np.ndarray]]:
    """Bits → quantizer → [seed, step]; runs in one direction, other sets of parts and interventions are left out."""
    found: dict[int, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["method"] in _COLOURS and run.get("direction", "both") == "both" and run["loss"] is not None:
            found[run["bits"]][run["method"]].append(smoothed(run["curve"]))
    return {bits: {name: np.stack(kept) for name, kept in methods.items()} for bits, methods in found.items()}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """A panel for each width, from the most bits to the fewest; the unquantized runs stand in every one."""
    found = curves(runs)
    plain = found.pop(32)["none"]
    widths = sorted(found, reverse=True)
    with drawing():
        sheet = figure(10, 2.6 * ((len(widths) + 1) // 2))
        panels = sheet.subplots((len(widths) + 1) // 2, 2, sharex=True, sharey=True).flatten()
        for axes, bits in zip(panels, widths, strict=False):
            for name, kept in {"none": plain, **found[bits]}.items():
                steps = np.arange(_WINDOW, _WINDOW + kept.shape[1])
                axes.plot(steps, kept.mean(0), color=_COLOURS[name], label=name, linewidth=1.4)
                axes.fill_between(steps, kept.min(0), kept.max(0), color=_COLOURS[name], alpha=0.12, linewidth=0)
            axes.set_title(f"{bits} bits", fontsize=10)
        for axes in panels[len(widths) :]:
            axes.set_visible(False)
        panels[0].legend(fontsize=8)
        size = runs[0]["size"]
        sheet.supxlabel(f"step (mean of the last {_WINDOW}; {size} px; band: range over seeds)", fontsize=9)
        sheet.supylabel("training loss", fontsize=9)
        sheet.savefig(path)
