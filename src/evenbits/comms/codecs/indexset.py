"""An index set in a fixed number of bytes: which k of n elements, as a bitmap or as Rice-coded gaps.

    bitmap   n bits
    Rice     gaps d between kept elements, each as d >> r in unary and the low r bits of d as they are

The unary halves take Σ (d >> r) + k bits, and as the gaps add up to at most n − k, never more than k + (n − k) >> r. So
both sizes follow from n and k: the receiver can post its buffer, and the shorter one is chosen without looking at the
indices. Rice wins where less than about a third is kept; at 10 % it needs 0.51 bits per element of room (0.48 used,
the entropy is 0.47), at 1 % 0.09. With r near log2 n an index never needs more than r + 1 bits, so that a list of int32
would save one byte at best for any n below 2^31, and there is none.

The two halves of a Rice code are stored apart, so that packing is a few passes over whole tensors.
Source: R. F. Rice, JPL Publication 79-22, 1979; S. W. Golomb, IEEE Trans. Inf. Theory 12, 1966.

Layout: bitmap, lowest bit first; or low bits of the gaps packed at r bits, then the unary halves: for each gap
d >> r zeros and a one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evenbits.comms.codecs.bits import pack, packed_bytes, unpack
from evenbits.errors import EvenbitsError

_BITMAP = -1


@dataclass(frozen=True)
class IndexSet:
    """How a set of `kept` of `size` elements is written: `rice` low bits, or −1 for a bitmap."""

    size: int
    kept: int
    rice: int

    @staticmethod
    def of(size: int, kept: int) -> IndexSet:
        """The shortest way to write `kept` of `size`."""
        ways = [IndexSet(size, kept, rice) for rice in range(_BITMAP, max(1, size.bit_length()))]
        return min(ways, key=lambda way: way.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of room that every set of this size needs."""
        return packed_bytes(self.size, 1) if self.rice == _BITMAP else self._low_bytes + packed_bytes(self._unary, 1)

    @property
    def _low_bytes(self) -> int:
        return packed_bytes(self.kept, self.rice)

    @property
    def _unary(self) -> int:
        """The most bits that the unary halves can take."""
        return self.kept + ((self.size - self.kept) >> self.rice)

    def write(self, mask_n: torch.Tensor, index_k: torch.Tensor) -> tuple[torch.Tensor, int]:
        """bool [size] and where its `kept` ones are → (uint8 [nbytes], how many bits of them are used)."""
        if self.rice == _BITMAP:
            return pack(mask_n.view(torch.uint8), 1), self.size
        gap = torch.diff(index_k, prepend=index_k.new_full((1,), -1)) - 1
        ends = ((gap >> self.rice) + 1).cumsum(dim=0) - 1
        unary = torch.zeros(self._unary, dtype=torch.uint8, device=mask_n.device)
        unary[ends] = 1
        low = pack(gap & ((1 << self.rice) - 1), self.rice) if self.rice else unary[:0]
        used = self.kept * self.rice + (int(ends[-1]) + 1 if self.kept else 0)
        return torch.cat([low, pack(unary, 1)]), used

    def read(self, data: torch.Tensor) -> torch.Tensor:
        """uint8 [nbytes] → bool [size]. Raises EvenbitsError if they are not `kept` indices below `size`."""
        if self.rice == _BITMAP:
            mask = unpack(data, 1, self.size).view(torch.bool)
            if int(mask.sum()) != self.kept:
                raise self._foreign()
            return mask
        mask = torch.zeros(self.size, dtype=torch.bool, device=data.device)
        ends = unpack(data[self._low_bytes :], 1, self._unary).nonzero().squeeze(1)
        if len(ends) != self.kept:
            raise self._foreign()
        gap = (torch.diff(ends, prepend=ends.new_full((1,), -1)) - 1) << self.rice
        if self.rice:
            gap |= unpack(data[: self._low_bytes], self.rice, self.kept).long()
        index = (gap + 1).cumsum(dim=0) - 1
        if self.kept and int(index[-1]) >= self.size:
            raise self._foreign()
        mask[index] = True
        return mask

    def _foreign(self) -> EvenbitsError:
        return EvenbitsError(
            f"these bytes are no set of {self.kept} of {self.size} indices; they are foreign or damaged."
        )
