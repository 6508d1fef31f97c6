"""What a codec is: a tensor in, a fixed number of bytes out, and back.

    payload = codec.encode(x)             uint8 [codec.payload_bytes(meta)], contiguous, on x's device
    y = codec.decode(payload, meta)       y has meta's shape and type; meta = Meta.of(x)

A receiver posts its buffer before anything was sent, so a payload's size follows from shape, type and the codec's
parameters alone. A codec whose content is shorter than its buffer says so in a header inside the payload, and
`true_bits` counts what it really needed.

Metadata (scales, minima) is bfloat16, or scaled by a power of two first: at a stage boundary gradients have steps of
1e-8, which float16 flushes to zero (docs/codecs.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import torch

from evenbits.errors import EvenbitsError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Meta:
    """What both ends know of a tensor: its shape and floating-point type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: torch.Tensor) -> Meta:
        """The meta of a tensor. Raises EvenbitsError if it is not floating-point."""
        if x.dtype not in FLOATS:
            raise EvenbitsError(
                f"codecs carry {', '.join(str(d).removeprefix('torch.') for d in FLOATS)}; given {x.dtype}."
            )
        return Meta(tuple(x.shape), x.dtype)

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)

    @property
    def raw_bytes(self) -> int:
        """Bytes of the tensor uncoded."""
        return self.numel * self.dtype.itemsize


class Codec(ABC):
    """A way to put a tensor into bytes. Codecs keep no state: two calls with the same input give the same bytes
    (stochastic ones: with the same generator).

    spec: the codec's spelling; `get(codec.spec)` is the same codec, and both ends of a link compare it.
    keeps_mask: whether the payload holds an index set (`mask_of`) that the message the other way can be coded on
        without sending it again.
    keeps_zero: whether an element that is zero decodes to exactly zero. If not, everything near zero may be moved by
        one and the same amount, which adds up over a backward pass (docs/collapse.md).
    """

    spec: str
    keeps_mask: bool = False
    keeps_zero: bool = True

    @abstractmethod
    def payload_bytes(self, meta: Meta) -> int:
        """Bytes of every payload of a tensor of this meta."""

    @abstractmethod
    def encode(
        self,
        x: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """x → uint8 [payload_bytes]. mask: bool, x's shape; only these elements are coded and no index set is sent
        (codecs with `keeps_mask`). Raises EvenbitsError if x holds NaN or infinite values.
        """

    @abstractmethod
    def decode(self, payload: torch.Tensor, meta: Meta, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        """A payload → tensor of `meta`. Raises EvenbitsError if the payload is not one of this codec and meta."""

    def payload_bytes_on(self, meta: Meta, kept: int) -> int:
        """Bytes of a payload coded on a mask of `kept` elements (codecs with `keeps_mask`)."""
        raise EvenbitsError(f"codec {self.spec!r} does not code on a mask (keeps_mask).")

    def mask_of(self, payload: torch.Tensor, meta: Meta) -> torch.Tensor | None:
        """The elements the payload holds, bool of meta's shape, or None if it holds all."""
        return None

    def true_bits(self, payload: torch.Tensor, meta: Meta) -> float:
        """Bits per element that the payload needed: codes, scales, indices and headers counted."""
        return 8 * self.payload_bytes(meta) / max(1, meta.numel)

    def no_mask(self, mask: torch.Tensor | None) -> None:
        """Raises EvenbitsError if there is a mask: for codecs that do not code on one, lest it be ignored."""
        if mask is not None:
            raise EvenbitsError(
                f"codec {self.spec!r} does not code on a mask; 'top0.1+{self.spec}' and its like do (keeps_mask)."
            )

    def checked(self, payload: torch.Tensor, meta: Meta, expected: int | None = None) -> torch.Tensor:
        """The payload, or EvenbitsError if it is not a uint8 vector of the right length."""
        expected = self.payload_bytes(meta) if expected is None else expected
        if payload.dtype != torch.uint8 or payload.ndim != 1 or payload.numel() != expected:
            raise EvenbitsError(
                f"a {self.spec!r} payload of a {meta.dtype} tensor of shape {list(meta.shape)} has {expected} bytes "
                f"(uint8); given {payload.dtype} of shape {list(payload.shape)}. Both ends must use one codec."
            )
        return payload


def as_float32(x: torch.Tensor, spec: str) -> torch.Tensor:
    """x detached, flat and in float32. Raises EvenbitsError if a float64 value lies beyond float32."""
    flat = x.detach().reshape(-1)
    if flat.dtype == torch.float64 and flat.numel() and float(flat.abs().max()) > torch.finfo(torch.float32).max:
        finite(x, spec)
        raise EvenbitsError(f"codec {spec!r} works in float32, which cannot hold {float(flat.abs().max()):g}.")
    return flat.float()


def restored(values: torch.Tensor, meta: Meta, largest: float = float("inf")) -> torch.Tensor:
    """Decoded values [n] → tensor of `meta`, saturated if values up to `largest` lie beyond its type.

    largest: what no magnitude exceeds, to spare the pass where nothing can saturate.
    """
    limit = min(torch.finfo(meta.dtype).max, torch.finfo(values.dtype).max)
    made = values.to(meta.dtype)
    return (made.clamp_(-limit, limit) if largest > limit else made).view(meta.shape)


def finite(x: torch.Tensor, spec: str) -> torch.Tensor:
    """x detached, or EvenbitsError if it holds NaN or infinite values: no code can carry them."""
    x = x.detach()
    if x.numel() and not bool(torch.isfinite(torch.stack([x.amin(), x.amax()])).all()):  # a NaN shows in both
        raise EvenbitsError(
            f"codec {spec!r} was given NaN or infinite values in a tensor of shape {list(x.shape)}; training has "
            "diverged, or its loss scale is too large."
        )
    return x
