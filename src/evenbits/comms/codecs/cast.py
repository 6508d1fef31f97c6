"""Casts: the tensor in a shorter floating-point type, or as it is.

`raw` sends the bytes as they are and is bit-identical: the codec that shows that the wire itself changes nothing.
`fp16` and `bf16` halve a float32. Values beyond float16's range saturate at 65504 instead of becoming infinite; small
gradients underflow there, which bfloat16 does not do. Casting the usual way is the baseline of every table.

`fp8` is E4M3 (three bits of mantissa, 2^-9 … 448) after a power of two that brings the message's largest magnitude to
224 … 448. Without it everything below 1e-3 would become zero, and gradients at a stage boundary are 1e-5. Its error is
at most 1/16 of an element, and 2^-18 of the largest magnitude where elements are smaller than 2^-15 of it.

Layout of fp8: the exponent of the power of two (int16), then one byte per element.
Source: Micikevicius et al., "FP8 formats for deep learning", 2022. Left out: E5M2, whose two bits of mantissa only pay
where one message spans more than nine decades, and scales per group (`fp8:g128` is a number format).
"""

from __future__ import annotations

import torch

from evenbits.comms.codecs.base import Codec, Meta, as_float32, finite, restored
from evenbits.comms.codecs.bits import bytes_of, words_of
from evenbits.errors import EvenbitsError, unknown_name

_TYPES = {"raw": None, "fp16": torch.float16, "bf16": torch.bfloat16}
_TOP = 9  # 2⁹ is the first power of two beyond E4M3's 448
_EXPONENTS = (-120, 126)  # a factor that is a normal float32, as is its inverse


class Cast(Codec):
    """dtype: the type on the wire, or None for the tensor's own."""

    def __init__(self, spec: str, dtype: torch.dtype | None) -> None:
        self.spec, self.dtype = spec, dtype

    def payload_bytes(self, meta: Meta) -> int:
        return meta.numel * (self.dtype or meta.dtype).itemsize

    def encode(
        self, x: torch.Tensor, *, mask: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        self.no_mask(mask)
        Meta.of(x)
        if self.dtype is None:
            return bytes_of(x.detach())
        limit = torch.finfo(self.dtype).max
        return bytes_of(finite(x, self.spec).to(self.dtype).clamp(-limit, limit))

    def decode(self, payload: torch.Tensor, meta: Meta, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.no_mask(mask)
        values = words_of(self.checked(payload, meta), self.dtype or meta.dtype)
        return restored(values, meta, torch.finfo(values.dtype).max)


class Float8(Codec):
    """E4M3 with one power of two for the message."""

    spec = "fp8"

    def payload_bytes(self, meta: Meta) -> int:
        return 2 + meta.numel if meta.numel else 0

    def encode(
        self, x: torch.Tensor, *, mask: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        self.no_mask(mask)
        meta = Meta.of(x)
        if meta.numel == 0:
            return torch.empty(0, dtype=torch.uint8, device=x.device)
        flat = as_float32(finite(x, self.spec), self.spec)
        top = max(float(flat.amax()), -float(flat.amin()))
        exponent = max(_EXPONENTS[0], min(_EXPONENTS[1], _TOP - _exponent_of(top))) if top else 0
        # The power may leave 448 … 512, which saturates: half the power keeps the top exact to 1/16.
        exponent -= int(top * 2.0**exponent > 448)
        codes = (flat * 2.0**exponent).to(torch.float8_e4m3fn)
        head = torch.tensor([exponent], dtype=torch.int16, device=x.device)
        return torch.cat([bytes_of(head), codes.view(torch.uint8)])

    def decode(self, payload: torch.Tensor, meta: Meta, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.no_mask(mask)
        payload = self.checked(payload, meta)
        if meta.numel == 0:
            return torch.empty(meta.shape, dtype=meta.dtype, device=payload.device)
        exponent = int(words_of(payload[:2], torch.int16))
        if not _EXPONENTS[0] - 1 <= exponent <= _EXPONENTS[1]:
            raise EvenbitsError(f"these {payload.numel()} bytes are no 'fp8' payload: exponent {exponent}.")
        every = torch.arange(256, dtype=torch.uint8, device=payload.device).view(torch.float8_e4m3fn)
        # A table is read ten times faster than float8 is converted.
        values = (every.float() * 2.0**-exponent).index_select(0, payload[2:].int())
        return restored(values, meta, 448 * 2.0**-exponent)


def _exponent_of(top: float) -> int:
    """e with 2^(e−1) ≤ top < 2^e."""
    return int(torch.frexp(torch.tensor(top)).exponent)


def cast(spec: str) -> Codec:
    """ "raw", "fp16", "bf16" or "fp8" → codec. Raises EvenbitsError if anything follows the name."""
    if spec == "fp8":
        return Float8()
    if spec not in _TYPES:
        raise unknown_name("cast codec", spec, [*_TYPES, "fp8"])
    return Cast(spec, _TYPES[spec])
