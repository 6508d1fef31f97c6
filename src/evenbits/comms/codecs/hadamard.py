"""Hadamard: rotate each block of neighbours before it is coded, and back afterwards.

What. `hadamard+int4:g128` multiplies every block of m elements (m a power of two) by the orthonormal Walsh-Hadamard
matrix, H = H₂ ⊗ … ⊗ H₂ / √m, and gives the result to the codec after the "+". H is its own inverse.

    y = H x        x̂ = H ŷ        ‖x̂ − x‖ = ‖ŷ − y‖

Each y is a sum of all x with signs, so an outlier is spread over its block and y is nearly Gaussian whatever x was.

When it helps. Where a group has single large elements: with Student-t tails and int4 in groups of 128 it gains 5 dB.
Where elements of a group lie close together or hold many exact zeros (ReLU), it loses, because it destroys what the
codec could have used (docs/codecs.md): a spread is what the rotation makes, wanted or not.

Zero. An element that is zero comes back as the block's rounding noise, unless the whole block is zero. The noise has no
common sign, which is what matters for sums.

m is the group size of the codec after the "+" if that is a power of two from 2 to 1024, else 128; `hadamard64+…` says
it. The last block is filled up with zeros, and they are sent. m is small, so the product with the matrix is faster than
the butterfly's seven passes over memory. Left out: random signs before the rotation, which only matter for input made
to defeat it.

Source: Suresh et al., "Distributed mean estimation with limited communication", ICML 2017.
"""

from __future__ import annotations

import re
from functools import cache

import torch

from evenbits.comms.codecs.base import Codec, Meta, as_float32, finite, restored
from evenbits.comms.codecs.grouped import Grouped
from evenbits.comms.codecs.registry import get
from evenbits.errors import EvenbitsError

_SPELLING = re.compile(r"hadamard([0-9]{1,4})?\+(.+)")
_SIZES = tuple(1 << i for i in range(1, 11))
_LIMIT = 1e36  # a sum of 1024 of these, over √1024, is a float32


class Hadamard(Codec):
    """size: elements of a block; inner: the codec of the rotated elements."""

    keeps_zero = False

    def __init__(self, size: int, inner: Codec, spec: str) -> None:
        self.size, self.inner, self.spec = size, inner, spec

    def _rotated(self, meta: Meta) -> Meta:
        return Meta((-(-meta.numel // self.size), self.size), torch.float32)

    def payload_bytes(self, meta: Meta) -> int:
        return self.inner.payload_bytes(self._rotated(meta))

    def encode(
        self, x: torch.Tensor, *, mask: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        self.no_mask(mask)
        meta = Meta.of(x)
        flat = as_float32(finite(x, self.spec), self.spec)
        if meta.numel and max(float(flat.amax()), -float(flat.amin())) > _LIMIT:
            raise EvenbitsError(f"{self.spec!r}: sums of elements beyond {_LIMIT:g} are no float32; scale x down.")
        blocks = torch.nn.functional.pad(flat, (0, -meta.numel % self.size)).view(-1, self.size)
        return self.inner.encode(blocks @ matrix(self.size, x.device), generator=generator)

    def decode(self, payload: torch.Tensor, meta: Meta, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.no_mask(mask)
        blocks = self.inner.decode(self.checked(payload, meta), self._rotated(meta))
        rotated: torch.Tensor = blocks @ matrix(self.size, payload.device)
        return restored(rotated.view(-1)[: meta.numel], meta, torch.finfo(torch.float32).max)

    def true_bits(self, payload: torch.Tensor, meta: Meta) -> float:
        rotated = self._rotated(meta)
        return self.inner.true_bits(payload, rotated) * rotated.numel / max(1, meta.numel)


@cache
def matrix(size: int, device: torch.device) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard matrix, float32 [size, size]; size a power of two."""
    made = torch.ones(1, 1, device="cpu")
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], dim=1), torch.cat([made, -made], dim=1)])
    return made.div_(size**0.5).to(device)


def hadamard(spec: str) -> Codec:
    """ "hadamard+int4:g128", "hadamard64+fp8" → codec. Raises EvenbitsError for other blocks than powers of two."""
    match = _SPELLING.fullmatch(spec)
    if match is None or (match[1] and int(match[1]) not in _SIZES):
        raise EvenbitsError(
            f"{spec!r}: rotations are spelled hadamard+CODEC or hadamardN+CODEC, N a power of two from 2 to 1024."
        )
    inner = get(match[2])
    grouped = isinstance(inner, Grouped) and inner.granularity.kind == "group"
    natural = inner.granularity.size if isinstance(inner, Grouped) and grouped else 128
    natural = natural if natural in _SIZES else 128
    size = int(match[1]) if match[1] else natural
    return Hadamard(size, inner, f"hadamard{'' if size == natural else size}+{inner.spec}")
