"""Lloyd-Max: the best codebook of 2^b numbers for one tensor, sent with it.

What. `lloyd4` finds 16 numbers by Lloyd's iteration on a histogram of the tensor (8192 bins, histogram.py), starting
from equal ∫ f^(1/3), until no number moves by more than a thousandth of its neighbours' distance or 100 rounds are
over. Elements are sent as places in the table, which travels in front.

    place(x) = nearest number of the table        number = mean of what is nearest to it

When it helps. It is the bound of every scalar quantizer of fixed length with one table per tensor: if multi-partition
codes or a uniform grid come close to it, nothing is left to gain in that family. It still loses to groups wherever
magnitudes differ by place (docs/codecs.md).

Zero. The number nearest to zero is set to zero. `lloyd4:free` leaves it where the iteration put it.

Accuracy. Means are those of bins (the middle of what lies in a bin), and elements go to the number nearest to their
bin's middle, which differs from the best by less than a bin's width.

Left out. Entropy-constrained tables (ECSQ), whose payload has no fixed size; the benchmark shows their bound.
Source: S. P. Lloyd, IEEE Trans. Inf. Theory 28, 1982 (1957); J. Max, IRE Trans. Inf. Theory 6, 1960.

Layout: 2^b numbers, float32, ascending, then codes packed at b bits. n: elements, B: bins, L: numbers.
"""

from __future__ import annotations

import re

import torch

from evenbits.comms.codecs.base import Codec, Meta, as_float32, finite, restored
from evenbits.comms.codecs.bits import bytes_of, pack, packed_bytes, unpack, words_of
from evenbits.comms.codecs.histogram import Histogram, cube_root, histogram
from evenbits.errors import EvenbitsError

_SPELLING = re.compile(r"lloyd([1-8])(:free)?")
_BINS, _ROUNDS, _STILL = 8192, 100, 1e-3
_HUGE = torch.finfo(torch.float32).max


class Lloyd(Codec):
    """A table of 2^bits numbers and the places of the elements in it."""

    def __init__(self, bits: int, free: bool) -> None:
        self.bits, self.keeps_zero = bits, not free
        self.spec = f"lloyd{bits}{':free' if free else ''}"

    def payload_bytes(self, meta: Meta) -> int:
        return (4 << self.bits) + packed_bytes(meta.numel, self.bits) if meta.numel else 0

    def encode(
        self, x: torch.Tensor, *, mask: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        self.no_mask(mask)
        meta = Meta.of(x)
        if meta.numel == 0:
            return torch.empty(0, dtype=torch.uint8, device=x.device)
        found = histogram(as_float32(finite(x, self.spec), self.spec), _BINS)
        table, place_B = table_of(found, 1 << self.bits, zero=self.keeps_zero)
        codes = place_B.to(torch.int32).index_select(0, found.bins_n)
        if self.keeps_zero and bool((table == 0).any()):
            codes[found.x_n == 0] = int(table.abs().argmin())
        return torch.cat([bytes_of(table.clamp(-_HUGE, _HUGE).float()), pack(codes, self.bits)])

    def decode(self, payload: torch.Tensor, meta: Meta, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.no_mask(mask)
        payload = self.checked(payload, meta)
        if meta.numel == 0:
            return torch.empty(meta.shape, dtype=meta.dtype, device=payload.device)
        table = words_of(payload[: 4 << self.bits], torch.float32)
        if not bool(table.isfinite().all() & (table.diff() >= 0).all()):
            raise EvenbitsError(f"these {payload.numel()} bytes are no {self.spec!r} payload: its table is not sorted.")
        codes = unpack(payload[4 << self.bits :], self.bits, meta.numel)
        return restored(table.index_select(0, codes.int()), meta, float(table.abs().max()))


def table_of(found: Histogram, levels: int, *, zero: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Histogram → the table, float64 [levels] ascending, and the place of every bin, int64 [B].

    zero: whether zero, if it is in the tensor's range, has to be a number of the table.
    """
    counts = found.counts_B.double()
    middle_B = torch.where(counts > 0, (found.least_B.double() + found.most_B.double()) / 2, 0.0)
    place_B = cube_root(found, levels)
    table = middle_B[counts > 0].amin().expand(levels)
    unit = float(middle_B.abs().max()) or 1.0
    for _ in range(_ROUNDS):
        share = counts.new_zeros(levels).index_add_(0, place_B, counts)
        total = counts.new_zeros(levels).index_add_(0, place_B, counts * (middle_B / unit))
        moved = torch.where(share > 0, total / share.clamp(min=1) * unit, -torch.inf)
        # A number that nothing is nearest to sits on its lower neighbour, where it does no harm.
        moved = moved.cummax(dim=0).values.clamp(min=float(middle_B[counts > 0].amin()))
        gaps = moved.diff().abs()
        still = (moved - table).abs().max() <= _STILL * gaps[gaps > 0].min() if bool((gaps > 0).any()) else True
        table = moved
        place_B = _nearest(middle_B, table)
        if bool(still):
            break
    if zero and bool((found.least_B.amin() <= 0) & (found.most_B.amax() >= 0)):
        table = table.clone()
        table[table.abs().argmin()] = 0
        table = table.sort().values
        place_B = _nearest(middle_B, table)
    return table, place_B


def _nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2)


def lloyd(spec: str) -> Codec:
    """ "lloyd4", "lloyd2:free" → codec. Raises EvenbitsError for anything else."""
    match = _SPELLING.fullmatch(spec)
    if match is None:
        raise EvenbitsError(f"{spec!r}: Lloyd-Max codecs are spelled lloydB or lloydB:free with B = 1 … 8 bits.")
    return Lloyd(int(match[1]), bool(match[2]))
