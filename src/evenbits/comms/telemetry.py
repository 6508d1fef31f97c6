"""What a codec did to every tensor that left: measured by the sender, which has both the tensor and its decoded form.

Training does not fail at the mean error. A quantizer whose grid has no zero shifts all small gradients the same way: a
coherent error e, which the backward sum over N positions grows as N where noise grows as √N. Hence the DC ratio

    |mean(e)| · √N / rms(g)  =  |Σe| / √Σg²         below 1 harmless; see docs/collapse.md

and the same per channel, of which the largest is kept: errors that channels share, each with its own sign, cancel in
the ratio of the whole tensor. A channel that is almost silent would make that figure large whatever its error does to
training, so one with less than a hundredth of the mean channel's energy is measured against that hundredth.

Beside them the usual figures: relative L1 and L2, signal-to-noise ratio, cosine. Shares of zeros (x = 0), of
underflowed (x ≠ 0 became 0) and of clipped elements (|x| beyond the largest decoded magnitude) say what kind of error
it is. Bytes are those handed to the link, trailer included. All figures pool the microbatches of one step.

Measuring costs one decode and a few passes over the tensor per message; `every=10` measures every tenth step.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from evenbits.comms.codecs.base import Codec, Meta
from evenbits.comms.wire import TRAILER, Lane
from evenbits.errors import EvenbitsError

_SILENT = 0.01  # of the mean channel's energy
_CLIPPED = 1.01  # Scales are rounded to bfloat16: a decoded maximum may lie half a per cent below the true one.


@dataclass(frozen=True)
class Figures:
    """One lane in one step. snr_db is None where the decoded tensor is exact, and where the tensor is all zero;
    channel_dc is the DC ratio of the worst channel (`by_channel`).
    """

    step: int
    edge: int
    direction: str
    codec: str
    messages: int
    elements: int
    relative_l1: float
    relative_l2: float
    snr_db: float | None
    cosine: float | None
    dc_ratio: float
    channel_dc: float
    zeros: float
    clipped: float
    underflowed: float
    raw_bytes: int
    bytes: int
    bits_per_element: float
    encode_seconds: float
    decode_seconds: float


@dataclass
class Sums:
    """Running sums over the messages of one lane and step; every figure follows from them."""

    messages: int = 0
    n: int = 0
    x_abs: float = 0.0
    e_abs: float = 0.0
    xx: float = 0.0
    ee: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    e: float = 0.0
    zeros: float = 0.0
    clipped: float = 0.0
    underflowed: float = 0.0
    raw_bytes: int = 0
    bytes: int = 0
    bits: float = 0.0
    encode: float = 0.0
    decode: float = 0.0
    channels: list[torch.Tensor] = field(default_factory=list)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """The error of y against x, same shape; sums in double precision."""
        self._add_channels(x.detach(), y)
        x, y = x.detach().flatten().float(), y.flatten().float()
        e = y - x
        total = [x.abs().sum(dtype=torch.double), e.abs().sum(dtype=torch.double)]
        total += [a.mul(b).sum(dtype=torch.double) for a, b in ((x, x), (e, e), (y, y), (x, y))]
        total += [e.sum(dtype=torch.double), (x == 0).sum(dtype=torch.double)]
        top = y.abs().amax() if y.numel() else y.sum()
        total += [(x.abs() > _CLIPPED * top).logical_and_(y != 0).sum(dtype=torch.double)]
        total += [((x != 0) & (y == 0)).sum(dtype=torch.double)]
        names = ("x_abs", "e_abs", "xx", "ee", "yy", "xy", "e", "zeros", "clipped", "underflowed")
        for name, value in zip(names, torch.stack(total).tolist(), strict=True):
            setattr(self, name, getattr(self, name) + value)
        self.n += x.numel()
        self.messages += 1

    def _add_channels(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Error and energy per channel, double [2, C], kept on the tensor's device."""
        x_CM, y_CM = by_channel(x.float()), by_channel(y.float())
        both = torch.stack([(y_CM - x_CM).sum(1, dtype=torch.double), x_CM.square().sum(1, dtype=torch.double)])
        for i, found in enumerate(self.channels):
            if found.shape == both.shape:  # Tensors of several widths on one lane keep their own channels.
                self.channels[i] = found + both
                return
        self.channels.append(both)

    def _channel_dc(self) -> float:
        ratios = [0.0]
        for e_C, xx_C in self.channels:
            if e_C.numel():
                ratios.append(float((e_C.abs() / xx_C.clamp(min=_SILENT * float(xx_C.mean()) + 1e-300).sqrt()).max()))
        return max(ratios)

    def figures(self, step: int, edge: int, direction: str, codec: str) -> Figures:
        """The sums as figures."""
        n, tiny = max(1, self.n), 1e-300
        return Figures(
            step=step,
            edge=edge,
            direction=direction,
            codec=codec,
            messages=self.messages,
            elements=self.n,
            relative_l1=self.e_abs / max(self.x_abs, tiny),
            relative_l2=math.sqrt(self.ee / max(self.xx, tiny)),
            snr_db=10 * math.log10(self.xx / self.ee) if self.ee > 0 and self.xx > 0 else None,
            cosine=self.xy / math.sqrt(self.xx * self.yy) if self.xx * self.yy > 0 else None,
            dc_ratio=abs(self.e) / math.sqrt(max(self.xx, tiny)),
            channel_dc=self._channel_dc(),
            zeros=self.zeros / n,
            clipped=self.clipped / n,
            underflowed=self.underflowed / n,
            raw_bytes=self.raw_bytes,
            bytes=self.bytes,
            bits_per_element=self.bits / n,
            encode_seconds=self.encode,
            decode_seconds=self.decode,
        )


def by_channel(x: torch.Tensor) -> torch.Tensor:
    """[C, M]: a tensor by its channels: dimension 1 of four and more (pictures), the last of two and three (tokens);
    one channel otherwise.
    """
    if x.dim() < 2:
        return x.reshape(1, -1)
    return x.movedim(1 if x.dim() > 3 else -1, 0).flatten(1)


def error_figures(x: torch.Tensor, codec: Codec) -> Figures:
    """What a codec does to one tensor, outside of any pipeline: the same figures, with edge and step 0."""
    telemetry = Telemetry()
    telemetry.encode(Direct(codec), x, step=0)
    telemetry.close_step()
    return telemetry.history[-1]


@dataclass(frozen=True)
class Direct:
    """The part of a Lane that measuring needs, for what is not an edge of a pipeline."""

    codec: Codec
    edge: int = 0
    direction: str = "forward"


@dataclass
class Telemetry:
    """The figures of one rank.

    path: JSON lines, appended; every line is written whole and flushed. None keeps figures in memory only.
    every: measure steps 0, every, 2 · every, …
    keep: how many figures `history` holds.
    """

    path: Path | str | None = None
    every: int = 1
    keep: int = 10_000
    history: list[Figures] = field(default_factory=list)
    _open: dict[tuple[int, int, str, str], Sums] = field(default_factory=dict)
    _last: dict[tuple[int, str], Figures] = field(default_factory=dict)
    _file: TextIO | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise EvenbitsError(f"telemetry measures every n-th step, n at least 1; given {self.every}.")

    def wants(self, step: int) -> bool:
        """Whether this step is measured."""
        return step % self.every == 0

    def encode(
        self,
        lane: Lane | Direct,
        x: torch.Tensor,
        *,
        step: int,
        mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """lane.codec.encode, measured: uint8 payload. Raises what the codec raises."""
        codec, meta = lane.codec, Meta.of(x)
        sums = self._open.setdefault((step, lane.edge, lane.direction, codec.spec), Sums())
        started = _now(x)
        payload = codec.encode(x, mask=mask, generator=generator)
        encoded = _now(x)
        decoded = codec.decode(payload, meta, mask=mask)
        sums.encode, sums.decode = sums.encode + encoded - started, sums.decode + _now(x) - encoded
        sums.add(x if mask is None else x.detach() * mask, decoded)
        sums.raw_bytes += meta.raw_bytes
        sums.bytes += payload.numel() + TRAILER
        # A payload on a mask has no index set, and its length is its content.
        bits = 8 * payload.numel() if mask is not None else codec.true_bits(payload, meta) * meta.numel
        sums.bits += bits + 8 * TRAILER
        return payload

    def close_step(self) -> None:
        """The step is over: its sums become figures, and lines."""
        for (step, edge, direction, codec), sums in sorted(self._open.items()):
            if not sums.messages:  # None of them could be coded.
                continue
            figures = sums.figures(step, edge, direction, codec)
            self._last[edge, direction] = figures
            self.history.append(figures)
            self._write(asdict(figures))
        self._open.clear()
        del self.history[: -self.keep]

    def last(self, edge: int, direction: str) -> Figures | None:
        """The newest figures of a lane, or None."""
        return self._last.get((edge, direction))

    def state(self) -> dict[str, Any]:
        """The newest figures of every lane, of which a guard has yet to judge those of the last step."""
        self.close_step()
        return {f"{edge}.{direction}": asdict(figures) for (edge, direction), figures in self._last.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        for name, figures in state.items():
            edge, _, direction = name.partition(".")
            self._last[int(edge), direction] = Figures(**figures)

    def note(self, **line: Any) -> None:
        """An extra line, such as a guard's decision."""
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        if self._file is None:
            self._file = Path(self.path).open("a", encoding="utf-8")
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Write what is open and close the file."""
        self.close_step()
        if self._file is not None:
            self._file.close()
            self._file = None

    def brief(self) -> str:
        """The worst of the newest figures in a few words and two spaces, or nothing without any."""
        if not self._last:
            return ""
        figures = list(self._last.values())
        ratios = [f.snr_db for f in figures if f.snr_db is not None]
        snr = f"SNR {min(ratios):.1f} dB" if ratios else "exact"
        dc, channel = max(f.dc_ratio for f in figures), max(f.channel_dc for f in figures)
        return f"{snr}, DC {dc:.2f} (a channel {channel:.2f})  "

    def summary(self) -> str:
        """One line per lane with its newest figures."""
        head = f"{'edge':>4} {'direction':9} {'codec':22} {'step':>6} {'bits/elt':>8} {'SNR dB':>7} {'DC':>7} "
        rows = [head + f"{'ch. DC':>7} {'cosine':>9} {'enc ms':>7} {'dec ms':>7}"]
        for (edge, direction), f in sorted(self._last.items()):
            snr = "exact" if f.snr_db is None else f"{f.snr_db:.1f}"
            cosine = "" if f.cosine is None else f"{f.cosine:.6f}"
            rows.append(
                f"{edge:>4} {direction:9} {f.codec:22} {f.step:>6} {f.bits_per_element:>8.2f} {snr:>7} "
                f"{f.dc_ratio:>7.3f} {f.channel_dc:>7.2f} {cosine:>9} {1e3 * f.encode_seconds:>7.2f} "
                f"{1e3 * f.decode_seconds:>7.2f}"
            )
        return "\n".join(rows)


def _now(x: torch.Tensor) -> float:
    """Seconds, after the device has finished what it was given."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
