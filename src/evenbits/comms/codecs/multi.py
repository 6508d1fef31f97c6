"""Multi-partition quantization: the values are cut into p intervals, and each interval has its own b-bit grid.

What. `multi8x8` is 8 bits in 8 parts. Elements are sorted descending and cut into p chunks of equal count
(torch.chunk); each chunk gets the min/max grid of 2^b − 1 steps. An element is sent as its part and its place there:

    code = part << b | q          x̂ = table[code] = min_part + q · step_part

Real bits. The part of every element has to be sent, and as parts have equal counts no entropy coder can shorten it: 8
bits in 8 parts are 11 bits per element, 4 in 16 are 8, 8 in 64 are 14. A decoder is one look-up in a table of p · 2^b
numbers: this is a scalar quantizer with that many levels, and no better than the best codebook of as many (lloyd.py).

Which cut. Equal counts make dense regions fine and leave the tail to one huge interval; with long tails that costs more
than it gains (docs/codecs.md). Two cuts of the same format cost no sort and err less:

    multi8x8:cuberoot   parts of equal ∫ f^(1/3): cells as wide as f^(−1/3), the high-resolution optimum
    multi8x8:dp         least Σ P w² over a histogram of 512 bins, by dynamic programming

When it helps. Against one grid per tensor, at few bits, with heavy tails. Groups (grouped.py) do better almost always,
because magnitudes differ by place more than the distribution is uneven.

Zero. The sort's form is the original's: zero is on no grid unless it is the end of a chunk. The other two put it on the
grid of the part that holds it.

Left out. Entropy coding; sorting again on the receiving side, which the table makes needless.
Source: the "Haokang quantization" of the EPipe project, 2022; for the cut P. F. Panter and W. Dite, Proc. IRE 39, 1951.

Layout: p pairs (minimum, step), float32, then the codes packed at b + log2 p bits. n: elements, P: parts.
"""

from __future__ import annotations

import re

import torch

from evenbits.comms.codecs.base import Codec, Meta, as_float32, finite, restored
from evenbits.comms.codecs.bits import bytes_of, pack, packed_bytes, unpack, words_of
from evenbits.comms.codecs.histogram import cube_root, histogram, least_error, spans, workable
from evenbits.errors import EvenbitsError

_SPELLING = re.compile(r"multi([1-8])x(1|2|4|8|16|32|64|128|256)(?::(cuberoot|dp))?")
_HUGE = torch.finfo(torch.float32).max
_BINS = {"cuberoot": 2048, "dp": 512}


class Multi(Codec):
    """bits per part and parts; cut: "sort", "cuberoot" or "dp"."""

    def __init__(self, bits: int, parts: int, cut: str) -> None:
        self.bits, self.parts, self.cut = bits, parts, cut
        self.width = bits + parts.bit_length() - 1
        self.spec = f"multi{bits}x{parts}" + ("" if cut == "sort" else f":{cut}")
        self.keeps_zero = cut != "sort"

    def payload_bytes(self, meta: Meta) -> int:
        return 8 * self.parts + packed_bytes(meta.numel, self.width) if meta.numel else 0

    def encode(
        self, x: torch.Tensor, *, mask: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        self.no_mask(mask)
        meta = Meta.of(x)
        if meta.numel == 0:
            return torch.empty(0, dtype=torch.uint8, device=x.device)
        flat = as_float32(finite(x, self.spec), self.spec)
        lo_P, step_P, codes = self._sorted(flat) if self.cut == "sort" else self._cut(flat)
        grids = torch.stack([lo_P, step_P], dim=1).float()
        return torch.cat([bytes_of(grids), pack(codes, self.width)])

    def _sorted(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Minima, steps and codes of the original's equal-count chunks."""
        values, order = torch.sort(workable(flat), descending=True, stable=True)
        length = -(-len(flat) // self.parts)
        part = torch.arange(self.parts, device=flat.device)
        first, last = part * length, (part * length + length).clamp_(max=len(flat)) - 1
        used = first < len(flat)  # torch.chunk makes fewer chunks where there are too few elements
        lo_P, hi_P = (torch.where(used, values[i.clamp(max=len(flat) - 1)], 0.0) for i in (last, first))
        step_P = self._steps(lo_P, hi_P)
        part_n = torch.arange(len(flat), device=flat.device) // length
        codes = torch.empty(len(flat), dtype=torch.int32, device=flat.device)
        codes[order] = self._codes(values, lo_P, step_P, part_n.int())
        return lo_P, step_P, codes

    def _cut(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Minima, steps and codes of a cut of the histogram."""
        found = histogram(flat, _BINS[self.cut])
        part_B = (cube_root if self.cut == "cuberoot" else least_error)(found, self.parts)
        lo_P, hi_P = spans(part_B, found.least_B, found.most_B, self.parts)
        used = lo_P <= hi_P
        lo_P, hi_P = lo_P.where(used, 0.0), hi_P.where(used, 0.0)
        lo_P, step_P = self._with_zero(lo_P, hi_P)
        part_n = part_B.int().index_select(0, found.bins_n)
        return lo_P, step_P, self._codes(found.x_n, lo_P, step_P, part_n)

    def _steps(self, lo_P: torch.Tensor, hi_P: torch.Tensor) -> torch.Tensor:
        """Steps as they are sent: float32 values."""
        return ((hi_P.double() - lo_P.double()) / ((1 << self.bits) - 1)).clamp_(max=_HUGE).float().to(lo_P.dtype)

    def _with_zero(self, lo_P: torch.Tensor, hi_P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Minima and steps; the grid of the part with zero inside is moved, by at most half a step, until it holds
        zero."""
        lo, step = lo_P.double(), self._steps(lo_P, hi_P).double()
        inside = (lo < 0) & (hi_P >= 0) & (step > 0)
        below = torch.where(inside, (-lo / step).round(), 0.0)
        step = torch.minimum(step, 0.999999 * _HUGE / below.clamp(min=1)).float()
        # The table adds in float32, so −below · step has to be that product as float32 rounds it.
        start = torch.where(inside, -(below.float() * step), lo_P.float())
        return start.to(lo_P.dtype), step.to(lo_P.dtype)

    def _codes(self, x: torch.Tensor, lo_P: torch.Tensor, step_P: torch.Tensor, part_n: torch.Tensor) -> torch.Tensor:
        """int32 [n]: part << bits | nearest place on the part's grid."""
        divisor_P = torch.where(step_P > 0, step_P, torch.ones_like(step_P))
        places = (x - lo_P.index_select(0, part_n)).div_(divisor_P.index_select(0, part_n)).round_()
        return places.clamp_(0, (1 << self.bits) - 1).to(torch.int32).bitwise_or_(part_n << self.bits)

    def decode(self, payload: torch.Tensor, meta: Meta, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.no_mask(mask)
        payload = self.checked(payload, meta)
        if meta.numel == 0:
            return torch.empty(meta.shape, dtype=meta.dtype, device=payload.device)
        grids = words_of(payload[: 8 * self.parts], torch.float32).view(self.parts, 2)
        if not bool(grids.isfinite().all() & (grids[:, 1] >= 0).all()):
            raise EvenbitsError(f"these {payload.numel()} bytes are no {self.spec!r} payload: a grid is not finite.")
        table = self.table(grids)
        codes = unpack(payload[8 * self.parts :], self.width, meta.numel)
        return restored(table.index_select(0, codes.int()), meta, float(table.abs().max()))

    def table(self, grids_P2: torch.Tensor) -> torch.Tensor:
        """The numbers of all codes, float32 [P · 2^bits], from the parts' (minimum, step)."""
        place = torch.arange(1 << self.bits, device=grids_P2.device)
        product = grids_P2[:, 1:] * place
        return (product + grids_P2[:, :1]).clamp_(-_HUGE, _HUGE).view(-1)


def multi(spec: str) -> Codec:
    """ "multi8x8", "multi4x16:cuberoot", "multi6x4:dp" → codec. Raises EvenbitsError for anything else."""
    match = _SPELLING.fullmatch(spec)
    if match is None:
        raise EvenbitsError(
            f"{spec!r}: multi-partition codecs are spelled multiBxP with B = 1 … 8 bits and P = 1, 2, 4 … 256 parts, "
            "and perhaps :cuberoot or :dp. They write the bytes, so nothing may follow."
        )
    return Multi(int(match[1]), int(match[2]), match[3] or "sort")
