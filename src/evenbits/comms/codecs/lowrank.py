"""Low rank: a matrix as the product of two thin ones (PowerSGD).

What. `lowrank4` views a tensor as a matrix M and sends P and Q of rank 4, from one step of power iteration:

    P = orthonormalised(M Q₀)        Q = Mᵀ P        x̂ = P Qᵀ

The matrix is the tensor's dimensions cut where rows + columns are fewest: [O, I·kh·kw] of a convolution's weight,
[N·T, C] of activations. Tensors whose two factors would be no smaller than themselves (vectors, small matrices) travel
as float32.

When it helps. On weight gradients of large layers, 10 to 100 times smaller, with error feedback and a start that is not
always the same. Activations are rarely of low rank.

The start. `encode_from` takes Q₀, and `right_factor` gives the Q of a payload: whoever keeps it between steps (a warm
start) lets the iteration converge over steps. `encode` draws Q₀ from `generator`, or takes a fixed pseudo-random one if
there is none. A fixed start must not be combined with error feedback: the error e = (1 − P Pᵀ) M is orthogonal to P, so
e Q₀ = 0 and (M + e) Q₀ = M Q₀ for ever. The same directions are sent again and the rest never arrives.

Zero. An element that is zero is not kept; a tensor of zeros is. The error is that of a projection: ‖x̂ − x‖ ≤ ‖x‖.

Left out. Averaging P and Q separately over workers, which saves a second compression in an all-reduce: that is the
reducer's business. Source: T. Vogels et al., "PowerSGD", NeurIPS 2019.

Layout: P [R, r] then Q [C, r], float32. R: rows, C: columns, r: rank.
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import prod

import torch

from evenbits.comms.codecs.base import Codec, Meta, as_float32, finite, restored
from evenbits.comms.codecs.bits import bytes_of, words_of
from evenbits.errors import EvenbitsError

_SPELLING = re.compile(r"lowrank([1-9][0-9]{0,3})")


class LowRank(Codec):
    """rank: columns of both factors."""

    keeps_zero = False

    def __init__(self, rank: int) -> None:
        self.rank, self.spec = rank, f"lowrank{rank}"

    def matrix_shape(self, meta: Meta) -> tuple[int, int]:
        """(R, C) of the matrix view."""
        cuts = [(prod(meta.shape[:i]), prod(meta.shape[i:])) for i in range(len(meta.shape) + 1)]
        return min(cuts, key=sum)

    def is_plain(self, meta: Meta) -> bool:
        """Whether the tensor travels as float32 because its factors would not be smaller."""
        rows, columns = self.matrix_shape(meta)
        return self.rank * (rows + columns) >= rows * columns

    def payload_bytes(self, meta: Meta) -> int:
        return 4 * (meta.numel if self.is_plain(meta) else self.rank * sum(self.matrix_shape(meta)))

    def encode(
        self, x: torch.Tensor, *, mask: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        self.no_mask(mask)
        meta = Meta.of(x)
        if generator is None or self.is_plain(meta):
            return self.encode_from(x, None)
        columns = self.matrix_shape(meta)[1]
        return self.encode_from(x, torch.randn(columns, self.rank, generator=generator, device=generator.device))

    def encode_from(self, x: torch.Tensor, start_Cr: torch.Tensor | None) -> torch.Tensor:
        """x → payload, the iteration starting from float32 [C, r] (None: the fixed start)."""
        meta = Meta.of(x)
        flat = as_float32(finite(x, self.spec), self.spec)
        if self.is_plain(meta):
            return bytes_of(flat)
        rows, columns = self.matrix_shape(meta)
        start = _start(columns, self.rank) if start_Cr is None else start_Cr
        if tuple(start.shape) != (columns, self.rank) or start.dtype != torch.float32:
            raise EvenbitsError(
                f"{self.spec!r} starts from float32 [{columns}, {self.rank}] for a tensor of shape {list(meta.shape)}; "
                f"given {start.dtype} {list(start.shape)}."
            )
        top = float(flat.abs().max()) or 1.0
        x_RC = flat.view(rows, columns) / top  # sums of squares of large and small magnitudes are no float32
        left = torch.linalg.qr(x_RC @ start.to(x.device)).Q
        return torch.cat([bytes_of(left), bytes_of((x_RC.T @ left) * top)])

    def decode(self, payload: torch.Tensor, meta: Meta, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.no_mask(mask)
        payload, largest = self.checked(payload, meta), torch.finfo(torch.float32).max
        if self.is_plain(meta):
            return restored(words_of(payload, torch.float32), meta, largest)
        left = words_of(payload, torch.float32)[: self.rank * self.matrix_shape(meta)[0]].view(-1, self.rank)
        return restored((left @ self.right_factor(payload, meta).T).view(-1), meta, largest)

    def right_factor(self, payload: torch.Tensor, meta: Meta) -> torch.Tensor:
        """Q of a payload, float32 [C, r]: where the next step's iteration should start."""
        if self.is_plain(meta):
            raise EvenbitsError(f"a tensor of shape {list(meta.shape)} travels as float32 in {self.spec!r}.")
        start = self.rank * self.matrix_shape(meta)[0]
        return words_of(self.checked(payload, meta), torch.float32)[start:].view(-1, self.rank)


@lru_cache(maxsize=64)
def _start(columns: int, rank: int) -> torch.Tensor:
    """The fixed start, float32 [columns, rank], on the CPU."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(columns, rank, generator=generator, device="cpu")


def lowrank(spec: str) -> Codec:
    """ "lowrank4" → codec. Raises EvenbitsError for anything else."""
    match = _SPELLING.fullmatch(spec)
    if match is None:
        raise EvenbitsError(f"{spec!r}: low-rank codecs are spelled lowrankR with R >= 1, such as 'lowrank4'.")
    return LowRank(int(match[1]))
