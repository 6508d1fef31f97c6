"""Number formats on the wire, unchanged: what weights are stored in, activations and gradients can travel in.

What. `ovp4:g32`, `flint4:row`, `nf4:g64`, `fp8:g128`, `mxfp4`, `nvfp4`, `int4:g128:mse`, …: the tensor goes through
`evenbits.encode`, and the parts of the QTensor (packed codes, scales, zero points, pair kinds) are laid end to end.

When it helps. Tables and pairs keep more of a heavy tail than integers at four bits. They are also far slower to write
than grouped integers (a search over scales, docs/codecs.md), so they pay off on slow links only.

Fixed size. Types that are a choice (`ant4`, `ovp4`) are resolved when a tensor is encoded; the first byte says to
what, and the buffer has room for the largest of them. Groups and blocks run over the flattened tensor, as in
grouped.py; `row` and `axisN` over its own dimensions. Scales are stored as the format stores them: float16 and E4M3
ones relative to a factor per tensor, so that small gradients do not underflow.

Layout: 1 byte (which type), 4 bytes (the factor, float32; 0 for none), then packed, scales, zero points, kinds.
Source: numerics/encode.py and the files it names.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from evenbits.comms.codecs.base import Codec, Meta, finite
from evenbits.comms.codecs.bits import bytes_of, words_of
from evenbits.errors import EvenbitsError
from evenbits.numerics.elements import PairType, TypeChoice
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor

_HEAD = 5


class Formatted(Codec):
    """A QTensor's parts, end to end."""

    def __init__(self, fmt: Format) -> None:
        self.format, self.spec = fmt, str(fmt)
        self.keeps_zero = fmt.rule.zero_exact

    def payload_bytes(self, meta: Meta) -> int:
        if meta.numel == 0:
            return 0
        return _HEAD + max(sum(part.nbytes for part in _parts(q)) for q in _layouts(self.format, self._shape(meta)))

    def _shape(self, meta: Meta) -> tuple[int, ...]:
        """The shape that is encoded: the tensor's own if the format asks for its dimensions, else flat."""
        return meta.shape if self.format.granularity.kind in ("row", "axis") else (meta.numel,)

    def encode(
        self, x: torch.Tensor, *, mask: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        self.no_mask(mask)
        meta = Meta.of(x)
        if meta.numel == 0:
            return torch.empty(0, dtype=torch.uint8, device=x.device)
        shape = self._shape(meta)
        made = encode(finite(x, self.spec).reshape(shape), self.format)
        layouts = _layouts(self.format, shape)
        which = next(i for i, layout in enumerate(layouts) if layout.format == made.format)
        factor = torch.zeros(1, device=x.device) if made.global_scale is None else made.global_scale
        payload = torch.zeros(self.payload_bytes(meta), dtype=torch.uint8, device=x.device)
        payload[0] = which
        payload[1:_HEAD] = bytes_of(factor)
        start = _HEAD
        for part in _parts(made):
            payload[start : start + part.nbytes] = bytes_of(part)
            start += part.nbytes
        return payload

    def decode(self, payload: torch.Tensor, meta: Meta, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.no_mask(mask)
        payload = self.checked(payload, meta)
        if meta.numel == 0:
            return torch.empty(meta.shape, dtype=meta.dtype, device=payload.device)
        layout, _ = self._layout_of(payload, meta)
        factor = words_of(payload[1:_HEAD], torch.float32)
        read, start = [], _HEAD
        for part in _parts(layout):
            read.append(words_of(payload[start : start + part.nbytes], part.dtype).view(part.shape))
            start += part.nbytes
        zero = read[2] if layout.zero_point is not None else None
        made = QTensor(
            packed=read[0],
            scale=read[1],
            zero_point=zero,
            format=layout.format,
            shape=layout.shape,
            dtype=meta.dtype,
            global_scale=factor if float(factor) else None,
            kinds=read[-1] if layout.kinds is not None else None,
        )
        scales = made.scales()
        if not bool((scales.isfinite() & (scales > 0)).all()):
            raise EvenbitsError(f"these {payload.numel()} bytes are no {self.spec!r} payload: a scale is not positive.")
        return made.dequantize().view(meta.shape)

    def true_bits(self, payload: torch.Tensor, meta: Meta) -> float:
        payload = self.checked(payload, meta)
        if meta.numel == 0:
            return 0.0
        return 8 * (_HEAD + sum(part.nbytes for part in _parts(self._layout_of(payload, meta)[0]))) / meta.numel

    def _layout_of(self, payload: torch.Tensor, meta: Meta) -> tuple[QTensor, int]:
        layouts, which = _layouts(self.format, self._shape(meta)), int(payload[0])
        if which >= len(layouts):
            raise EvenbitsError(f"these {payload.numel()} bytes are no {self.spec!r} payload: type {which} is unknown.")
        return layouts[which], which


def _parts(q: QTensor) -> list[torch.Tensor]:
    return [part for part in (q.packed, q.scale, q.zero_point, q.kinds) if part is not None]


@lru_cache(maxsize=256)
def _layouts(fmt: Format, shape: tuple[int, ...]) -> tuple[QTensor, ...]:
    """Empty tensors of every type the format may resolve to."""
    fmt, element = fmt.fitted(shape), fmt.dtype
    members = [fmt]
    if isinstance(element, TypeChoice):
        members = [replace(fmt, dtype=member) for member in element.choices]
    elif isinstance(element, PairType) and element.is_choice:
        members = [replace(fmt, dtype=element.with_kind(kind)) for kind in element.choices]
    with torch.device("meta"):
        return tuple(QTensor.empty(member, shape, global_scale=False) for member in members)


def formatted(spec: str) -> Codec:
    """The spelling of a number format → codec. Raises EvenbitsError if it is none."""
    if "+" in spec:
        raise EvenbitsError(f"{spec!r}: {spec.partition('+')[0]!r} writes the bytes, so nothing may follow it.")
    return Formatted(Format.parse(spec))
