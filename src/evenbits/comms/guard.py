"""Watches the figures of outgoing lanes; warns, or climbs the codec ladder, before a codec harms training.

Signs, measured by the sender (comms/telemetry.py): a DC ratio above its limit, of the tensor or of its worst channel,
and a signal-to-noise ratio that falls. The ratio of the tensor misses an error that only one channel shares, or
that channels share with opposite signs; channels carry fewer elements and differ in size, hence a higher limit
(docs/collapse.md: harmless grids reach 2 to 5, harmful ones hundreds). The last sign is slow: as the loss falls,
boundary gradients grow heavier tails, and a quantizer that was safe in the first epoch need not stay so.

How both ends change codec at the same step: the sender decides at the start of step t from the figures of earlier
steps, writes the rung of step t + 1 into the trailer of every frame of step t, and both use it from step t + 1 on. The
receiver decides nothing. Ladders are part of the handshake, so both ends count the same rungs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evenbits.comms.telemetry import Figures
from evenbits.comms.wire import Lane
from evenbits.errors import EvenbitsError


class GuardWarning(UserWarning):
    """A codec does to a tensor what has been seen to stop training."""


@dataclass
class _Watch:
    """One lane: the SNR of its measured steps since the last change of rung, and what was already said."""

    snr: list[float] = field(default_factory=list)
    seen: int = -1
    said: set[str] = field(default_factory=set)


@dataclass
class Guard:
    """act: "warn", or "raise" to climb the ladder too.
    dc_limit, channel_limit: DC ratio that is too much, of the tensor and of its worst channel.
    drop_db: fall of the SNR that is too much: mean of the last `window` measurements against the first `window` on
    this rung.
    patience: measured steps with a DC ratio above its limit, one after the other, before the guard acts.
    """

    act: str = "warn"
    dc_limit: float = 1.0
    channel_limit: float = 10.0
    drop_db: float = 3.0
    window: int = 8
    patience: int = 2
    _watches: dict[tuple[int, str], _Watch] = field(default_factory=dict)
    _high: dict[tuple[int, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.act not in ("warn", "raise"):
            raise EvenbitsError(f"a guard's act is 'warn' or 'raise'; given {self.act!r}.")
        if self.window < 1 or self.patience < 1 or min(self.dc_limit, self.channel_limit, self.drop_db) <= 0:
            raise EvenbitsError(f"window and patience are at least 1, limits and drop_db above 0; given {self}.")

    def rung(self, lane: Lane, figures: Figures | None) -> int:
        """The rung `lane` shall use in the step after this one; called once per step by the sender."""
        watch = self._watches.setdefault((lane.edge, lane.direction), _Watch())
        if figures is None or figures.step <= watch.seen:
            return lane.following
        watch.seen = figures.step
        if figures.codec != lane.codec.spec:  # Measured before the last change: nothing about this rung.
            return lane.following
        reason = self._reason(lane, watch, figures)
        if not reason or lane.following != lane.level:
            return lane.following
        climbs = self.act == "raise" and lane.level + 1 < len(lane.codecs)
        self._say(lane, watch, reason, climbs)
        if climbs:
            watch.snr.clear()
            watch.said.clear()
            self._high.pop((lane.edge, lane.direction), None)
            return lane.level + 1
        return lane.following

    def _reason(self, lane: Lane, watch: _Watch, figures: Figures) -> str:
        key = (lane.edge, lane.direction)
        whole, channel = figures.dc_ratio > self.dc_limit, figures.channel_dc > self.channel_limit
        self._high[key] = self._high.get(key, 0) + 1 if whole or channel else 0
        if figures.snr_db is not None:
            watch.snr.append(figures.snr_db)
            del watch.snr[self.window : -self.window]  # The first window is the reference, the last one is now.
        if self._high[key] >= self.patience:
            return "its DC ratio is above the limit" if whole else "the DC ratio of a channel is above the limit"
        if len(watch.snr) == 2 * self.window:
            first, now = sum(watch.snr[: self.window]), sum(watch.snr[-self.window :])
            if first - now > self.drop_db * self.window:
                return "its signal-to-noise ratio falls"
        return ""

    def _say(self, lane: Lane, watch: _Watch, reason: str, climbs: bool) -> None:
        if reason in watch.said:
            return
        watch.said.add(reason)
        if climbs:
            then = f"it uses {lane.codecs[lane.level + 1].spec!r} from the next step on"
        elif self.act == "raise":
            then = "it is on its last rung; give the ladder another one"
        else:
            then = "use more bits or smaller groups there, or Guard(act='raise') with a ladder of codecs"
        warnings.warn(
            f"codec {lane.codec.spec!r} harms the {lane.direction} tensors of edge {lane.edge}: {reason}; {then}.",
            GuardWarning,
            stacklevel=2,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: measurements so far, so that a resumed run decides at the same step."""
        return {
            f"{edge}.{direction}": {"snr": list(w.snr), "seen": w.seen, "high": self._high.get((edge, direction), 0)}
            for (edge, direction), w in self._watches.items()
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        for name, kept in state.items():
            edge, _, direction = name.partition(".")
            key = (int(edge), direction)
            self._watches[key] = _Watch(snr=list(kept["snr"]), seen=int(kept["seen"]))
            self._high[key] = int(kept["high"])
