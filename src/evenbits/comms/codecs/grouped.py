"""Integers in groups: the codec to start with. Each group of neighbours has its own scale.

What. Elements are rounded to b-bit integers relative to a scale per group, per row or per tensor, and packed at b bits.

    INT4:GRANULARITY                scale = absmax / qmax                  x̂ = scale · code
    INT4:GRANULARITY:affine         step = (max − min) / (2^b − 1)         x̂ = step · (code − zero point)
    INT4:GRANULARITY:offset         the same, min and max as they are      x̂ = step · (code − zero point)
    INT4:GRANULARITY:affine:free    the same, zero not on the grid         x̂ = min + step · code

for int1 … int16 and uint1 … uint16 (offset: up to 8 bits, since its zero points are int16). `tensor` is one group,
`row` one group per index of all but the last dimension, `gN` N neighbours of the flattened tensor: a feature map whose
last dimension is 7 would otherwise pay a scale for every seven elements. Symmetric uint formats are for tensors without
negative values. `int1` is the sign (sign.py).
`:stochastic` rounds up with the probability of the fraction, so that the error's mean is zero, from `generator`
(affine, offset: with 2^b − 2 steps, so that no end is clipped).

When it helps. Nearly always: 5 to 21 dB more than one scale per tensor at nearly the same bits, because magnitudes
differ from place to place (docs/codecs.md), and it costs a few passes. `offset` for activations, `affine` or symmetric
for gradients; where groups hold lone outliers, behind a rotation (hadamard.py).

Zero. With `affine` the range is widened to include zero, and zero is a code. With `offset` it is not widened, but all
grids are whole multiples of their step: a group that holds a zero (or both signs) has it as a code, and one that does
not (an activation's group far from zero) spends no codes on what it does not need. That costs 16 bits for a zero point
instead of b. A grid without zero moves all small gradients by the same amount, and a sum over N positions multiplies
that by N, while rounding noise grows by √N only. `free` is there to measure this; it is what min/max quantizers of the
literature do.

Metadata. A scale is rounded up to bfloat16 (per tensor: float32), so that nothing is clipped, and x is divided by the
scale as it is sent: |x̂ − x| ≤ step / 2 (stochastic: < step). float16 scales would flush the steps of small gradients to
zero. Below float32's smallest normal number 1.2e-38 the scale stays there.

Left out. Searched scales (`int4:g128:mse`): that is a number format (formats.py) and takes far longer.
Source: Alistarh et al., "QSGD", NeurIPS 2017 (buckets, stochastic rounding); numerics/affine.py for the rest.

Layout: scales, then minima (free) or zero points (offset: int16; affine: packed at b bits), then codes packed at b
bits; codes of symmetric signed types are two's complement. G: groups, g: elements of a group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from evenbits.comms.codecs.base import Codec, Meta, as_float32, finite, restored
from evenbits.comms.codecs.bits import bytes_of, pack, packed_bytes, unpack, words_of
from evenbits.errors import EvenbitsError
from evenbits.numerics.granularity import Granularity
from evenbits.numerics.qdtypes import QDtype

_SPELLING = re.compile(
    r"(u?)int([1-9]|1[0-6]):(tensor|row|channel|token|g[0-9]+)((?::(?:affine|offset|free|stochastic))*)"
)
_FURTHEST = 32000  # of a zero point that is an int16, in steps
_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Groups:
    """How a tensor is cut: `count` groups of `width` elements of the flattened tensor, the last one perhaps shorter."""

    count: int
    width: int

    @staticmethod
    def of(granularity: Granularity, meta: Meta) -> Groups:
        """The groups of a tensor; none if it is empty."""
        size = meta.numel
        if size == 0:
            return Groups(0, 1)
        width = {"tensor": size, "row": meta.shape[-1] if meta.shape else 1}.get(granularity.kind, granularity.size)
        width = min(width, size)
        return Groups(-(-size // width), width)

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """[n] → [G, g]; the last group is filled up with its last element, so that its range stays."""
        missing = self.count * self.width - flat.numel()
        return (torch.cat([flat, flat[-1:].expand(missing)]) if missing else flat).view(self.count, self.width)


def round_up(values: torch.Tensor) -> torch.Tensor:
    """Positive float32 → the nearest bfloat16 that is not smaller (at most its largest)."""
    words = values.contiguous().view(torch.int32)
    return ((words + 0xFFFF) >> 16).clamp_(max=0x7F7F).to(torch.int16).view(torch.bfloat16)


def round_down(values: torch.Tensor) -> torch.Tensor:
    """float32 of either sign → the nearest bfloat16 that is not larger (at least its lowest)."""
    limit = torch.finfo(torch.bfloat16).max
    near = values.clamp(-limit, limit).to(torch.bfloat16)
    below = torch.nextafter(near, torch.full_like(near, -limit))
    return torch.where(near.float() > values, below, near)


SYMMETRIC, AFFINE, OFFSET, FREE = "", "affine", "offset", "affine:free"


class Grouped(Codec):
    """Integer codes with a scale per group. grid: SYMMETRIC, AFFINE, OFFSET or FREE."""

    def __init__(self, dtype: QDtype, granularity: Granularity, *, grid: str, stochastic: bool) -> None:
        self.dtype, self.granularity, self.grid, self.stochastic = dtype, granularity, grid, stochastic
        options = [word for word, on in ((grid, grid), ("stochastic", stochastic)) if on]
        self.spec = ":".join([dtype.name, str(granularity), *options])
        self.keeps_zero = grid != FREE
        self._scale_type = torch.float32 if granularity.kind == "tensor" else torch.bfloat16
        # Symmetric signed codes are −qmax … qmax; all others 0 … levels.
        self._signed = dtype.signed and grid == SYMMETRIC
        self._levels = dtype.qmax if self._signed else (1 << dtype.bits) - 1

    def _parts(self, meta: Meta) -> tuple[Groups, list[int]]:
        """The groups and the bytes of scales, minima or zero points, and codes."""
        groups, bits = Groups.of(self.granularity, meta), self.dtype.bits
        scales = groups.count * self._scale_type.itemsize
        zeros = {AFFINE: packed_bytes(groups.count, bits), OFFSET: 2 * groups.count, FREE: scales}.get(self.grid, 0)
        return groups, [scales, zeros, packed_bytes(meta.numel, bits)]

    def payload_bytes(self, meta: Meta) -> int:
        return sum(self._parts(meta)[1])

    def encode(
        self, x: torch.Tensor, *, mask: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        self.no_mask(mask)
        meta = Meta.of(x)
        groups, _ = self._parts(meta)
        if meta.numel == 0:
            return torch.empty(0, dtype=torch.uint8, device=x.device)
        x_Gg = groups.view(as_float32(x, self.spec))
        lo_G, hi_G = x_Gg.amin(dim=1), x_Gg.amax(dim=1)
        lowest, highest = float(lo_G.min()), float(hi_G.max())  # a NaN anywhere shows in both
        if not (-_HUGE <= lowest and highest <= _HUGE):
            finite(x, self.spec)
        if max(-lowest, highest) > _HUGE / 4:
            x_Gg = x_Gg.double()  # max − min of two float32 is not a float32
        head, u_Gg, zero_G = self._scaled(x_Gg, lo_G, hi_G)
        codes = self._rounded(u_Gg, zero_G, generator).view(-1)[: meta.numel]
        return torch.cat([*head, pack(self._words(codes), self.dtype.bits)])

    def _words(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes as floating-point numbers → the low bits of their two's complement: uint8, or int32 beyond 8 bits."""
        bits = self.dtype.bits
        if not self._signed:
            return codes.to(torch.uint8 if bits <= 8 else torch.int32)
        words = codes.to(torch.int8).view(torch.uint8) if bits <= 8 else codes.to(torch.int32)
        return words if bits == 8 else words.bitwise_and_((1 << bits) - 1)

    def _scaled(
        self, x_Gg: torch.Tensor, lo_G: torch.Tensor, hi_G: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
        """The metadata's bytes, x in steps, and the zero points."""
        if self.grid == SYMMETRIC:
            if not self.dtype.signed and bool((lo_G < 0).any()):
                raise EvenbitsError(
                    f"{self.spec!r} cannot hold negative values (smallest: {float(lo_G.min()):g}); use "
                    f"{self.spec[1:]!r}, or {self.spec + ':affine'!r}."
                )
            scale = self._stored(torch.maximum(hi_G, -lo_G) / self._levels)
            return [bytes_of(scale)], x_Gg / scale.float().unsqueeze(1), None
        lo, hi = lo_G.double(), hi_G.double()
        if self.grid == FREE:
            least = lo_G if self._scale_type == torch.float32 else round_down(lo_G)
            step = self._stored(((hi - least.double()) / self._levels).float())
            u_Gg = (x_Gg - least.to(x_Gg.dtype).unsqueeze(1)) / step.float().unsqueeze(1)
            return [bytes_of(step), bytes_of(least)], u_Gg, None
        if self.grid == AFFINE:
            lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        # Rounded up or down at random, a range that sticks out of the grid at one end would be clipped there, on one
        # side only: with a level to spare both ends lie on the grid.
        spare = ((lo != 0) & (hi != 0)).double() if self.stochastic else torch.zeros_like(lo)
        least_step = torch.maximum(lo.abs(), hi.abs()) / (_FURTHEST if self.grid == OFFSET else self._levels)
        step = self._stored(torch.maximum((hi - lo) / (self._levels - spare), least_step).float())
        zero = -lo / step.double()
        zero = zero.ceil_() if self.stochastic else zero.round_()
        whole = zero.to(torch.int16 if self.grid == OFFSET else torch.uint8 if self.dtype.bits <= 8 else torch.int32)
        stored = bytes_of(whole) if self.grid == OFFSET else pack(whole, self.dtype.bits)
        return [bytes_of(step), stored], x_Gg / step.float().unsqueeze(1), zero.to(x_Gg.dtype)

    def _stored(self, scale: torch.Tensor) -> torch.Tensor:
        scale = scale.clamp(_TINY, _HUGE)
        return scale if self._scale_type == torch.float32 else round_up(scale)

    def _rounded(
        self, u_Gg: torch.Tensor, zero_G: torch.Tensor | None, generator: torch.Generator | None
    ) -> torch.Tensor:
        if self.stochastic:
            noise = torch.rand(u_Gg.shape, generator=generator, dtype=u_Gg.dtype, device=u_Gg.device)
            codes = u_Gg.add_(noise).floor_()
        else:
            codes = u_Gg.round_()
        if zero_G is not None:
            codes += zero_G.unsqueeze(1)
        return codes.clamp_(-self._levels if self._signed else 0, self._levels)

    def decode(self, payload: torch.Tensor, meta: Meta, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.no_mask(mask)
        payload = self.checked(payload, meta)
        groups, sizes = self._parts(meta)
        if meta.numel == 0:
            return torch.empty(meta.shape, dtype=meta.dtype, device=payload.device)
        scales, zeros, packed = payload.split(sizes)
        scale_G = words_of(scales, self._scale_type).float()
        lowest, highest = float(scale_G.min()), float(scale_G.max())
        if not 0 < lowest <= highest <= _HUGE:
            raise EvenbitsError(f"these {payload.numel()} bytes are no {self.spec!r} payload: a scale is not positive.")
        codes = unpack(packed, self.dtype.bits, meta.numel)
        offset_G = None
        if self._signed:
            codes = _signs_of(codes, self.dtype.bits)
        elif self.grid == FREE:
            offset_G = words_of(zeros, self._scale_type).float()
        elif self.grid == OFFSET:
            offset_G = words_of(zeros, torch.int16).float()
        elif self.grid == AFFINE:
            offset_G = unpack(zeros, self.dtype.bits, groups.count).float()
        most = 0.0 if offset_G is None else float(offset_G.abs().max())
        largest = highest * (1 << self.dtype.bits) + most * (1.0 if self.grid == FREE else highest)
        values = codes.double() if largest > _HUGE else codes.float()
        self._spread(values, scale_G, offset_G, groups)
        return restored(values, meta, largest)

    def _spread(
        self, values: torch.Tensor, scale_G: torch.Tensor, offset_G: torch.Tensor | None, groups: Groups
    ) -> None:
        """Codes → values in place, groups that are whole at once and then the shorter one."""
        whole = values.numel() // groups.width
        cut = whole * groups.width
        for part, rows in (
            (values[:cut].view(whole, -1), slice(0, whole)),
            (values[cut:].view(1, -1), slice(whole, None)),
        ):
            if not part.numel():
                continue
            scale = scale_G[rows].unsqueeze(1)
            if offset_G is None:
                part.mul_(scale)
            elif self.grid == FREE:
                part.mul_(scale).add_(offset_G[rows].unsqueeze(1))
            else:
                part.sub_(offset_G[rows].unsqueeze(1)).mul_(scale)


def _signs_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The low bits of two's complement as `unpack` gives them → the signed numbers."""
    if bits == 8:
        return codes.view(torch.int8)
    sign = 1 << (bits - 1)
    turned = codes ^ sign
    return (turned.view(torch.int8) if bits < 8 else turned) - sign


def grouped(spec: str) -> Codec:
    """ "int4:g128", "uint8:tensor:affine:free", … → codec. Spellings with a number format's own options (such as mse)
    or an axis are number formats. Raises EvenbitsError for anything else.
    """
    match = _SPELLING.fullmatch(spec)
    if match is None:
        from evenbits.comms.codecs.formats import formatted

        return formatted(spec)
    options = match[4].split(":")[1:]
    stochastic = "stochastic" in options
    words = [word for word in options if word != "stochastic"]
    if len(set(options)) < len(options) or words not in ([], ["affine"], ["offset"], ["affine", "free"]):
        raise EvenbitsError(
            f"{spec!r}: the grid of integers is :affine, :offset or :affine:free, or symmetric if none is named; each "
            "option is given once."
        )
    grid = ":".join(words)
    dtype, granularity = QDtype(int(match[2]), not match[1]), Granularity.parse(match[3])
    if dtype.bits > 8 and grid == OFFSET:
        raise EvenbitsError(f"{spec!r}: zero points of an :offset grid are int16, too few beyond 8 bits; use :affine.")
    if dtype.bits == 1 and stochastic and grid in (AFFINE, OFFSET):
        raise EvenbitsError(f"{spec!r}: two levels, one of them zero, cannot hold both signs without a mean error.")
    if dtype == QDtype(1, True) and grid == SYMMETRIC:
        from evenbits.comms.codecs.sign import Sign

        if stochastic:
            raise EvenbitsError(f"{spec!r}: a sign has no fraction to round stochastically.")
        return Sign(spec=f"int1:{granularity}", granularity=granularity)
    return Grouped(dtype, granularity, grid=grid, stochastic=stochastic)
