"""A telemetry log of coded traffic: the newest figures of every lane, as rows and as a picture.

Read are the lines of `Telemetry` (comms/telemetry.py), one lane and step each, and those of a training run's log, whose
lines hold the lanes of a step under "codecs".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evenbits.errors import EvenbitsError
from evenbits.reporting.curves import Figure, Panel

Lane = tuple[int, str]
COLUMNS = (
    "edge",
    "direction",
    "codec",
    "step",
    "bits / element",
    "SNR dB",
    "DC",
    "worst channel",
    "clipped %",
    "zeros %",
    "encode ms",
    "decode ms",
)


class Log:
    """A file that grows. lanes: all figures of each lane, in order of their steps."""

    def __init__(self, path: Path) -> None:
        self.path, self.lanes = path, dict[Lane, list[dict[str, Any]]]()
        self._place, self._rest = 0, b""

    def read(self) -> bool:
        """Takes in what was written since the last call → whether there was anything. A file that became shorter (a
        resumed run) is read again from its start.

        Raises EvenbitsError if it cannot be read, or holds something else.
        """
        try:
            if self.path.stat().st_size < self._place:
                self._place, self._rest, self.lanes = 0, b"", {}
            with self.path.open("rb") as file:
                file.seek(self._place)
                new = file.read()
        except OSError as error:
            raise EvenbitsError(f"the log {self.path} cannot be read: {error}") from error
        self._place += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            self._take(line)
        return bool(lines)

    def _take(self, line: bytes) -> None:
        try:
            made = json.loads(line)
            found = made["codecs"] if "codecs" in made else [made] if "edge" in made else []
            for figures in found:
                self.lanes.setdefault((int(figures["edge"]), str(figures["direction"])), []).append(figures)
        except (ValueError, KeyError, TypeError) as error:
            raise EvenbitsError(
                f"{self.path} is no log of coded traffic: Telemetry(path) writes one, and so does evenbits.training "
                f"(log-rank0.jsonl in --out). Found: {line[:80].decode(errors='replace')!r}"
            ) from error


def newest(log: Log) -> list[dict[str, Any]]:
    """The newest figures of every lane, as they were written."""
    return [figures[-1] for _, figures in sorted(log.lanes.items())]


def rows(log: Log) -> list[list[Any]]:
    """The same, under COLUMNS."""
    return [
        [
            *(f[name] for name in ("edge", "direction", "codec", "step", "bits_per_element")),
            "exact" if f["snr_db"] is None else f["snr_db"],
            f["dc_ratio"],
            f.get("channel_dc"),  # None in logs of earlier versions
            *(100 * f[name] for name in ("clipped", "zeros")),
            *(1e3 * f[name] for name in ("encode_seconds", "decode_seconds")),
        ]
        for f in newest(log)
    ]


def figure(log: Log) -> Figure:
    """SNR and both DC ratios over the steps, a panel per lane and figure. Raises EvenbitsError without any figures."""
    if not log.lanes:
        raise EvenbitsError(f"{log.path} holds no figures yet; Telemetry writes them at the end of measured steps.")
    panels = []
    for (edge, direction), figures in sorted(log.lanes.items()):
        name, steps = f"edge {edge}, {direction}", [float(f["step"]) for f in figures]
        panels.append(_panel(f"{name}: SNR, dB", steps, [f["snr_db"] for f in figures]))
        ratios = [(f["dc_ratio"], f.get("channel_dc")) for f in figures]
        panels.append(_panel(f"{name}: DC ratio of the tensor", steps, [whole for whole, _ in ratios], limit=1.0))
        if any(channel is not None for _, channel in ratios):
            worst = [channel for _, channel in ratios]
            panels.append(_panel(f"{name}: DC ratio of its worst channel", steps, worst, limit=10.0))
    codecs = sorted({f["codec"] for figures in log.lanes.values() for f in figures})
    return Figure("Coded traffic", (f"{log.path.name}: {', '.join(codecs)}",), "step", tuple(panels))


def _panel(label: str, steps: Sequence[float], values: Iterable[float | None], limit: float | None = None) -> Panel:
    shown = tuple(math.nan if value is None else float(value) for value in values)
    lines = () if limit is None else ((f"guard's limit {limit:g}", limit),)
    return Panel(label, tuple(steps), shown, None, None, lines=lines)
