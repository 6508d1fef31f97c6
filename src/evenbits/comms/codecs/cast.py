"""Casts: the tensor in a shorter floating-point type, or as it is.

`raw` sends the bytes as they are and is bit-identical: the codec that shows that the wire itself changes nothing.
`fp16` and `bf16` halve a float32. Values beyond float16's range saturate at 65504 instead of becoming infinite; small
gradients underflow there, which bfloat16 does not do. Casting the usual way is the baseline of every table.
"""

from __future__ import annotations

import torch

from evenbits.comms.codecs.base import Codec, Meta, finite
from evenbits.errors import unknown_name

_TYPES = {"raw": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Cast(Codec):
    """dtype: the type on the wire, or None for the tensor's own."""

    def __init__(self, spec: str, dtype: torch.dtype | None) -> None:
        self.spec, self.dtype = spec, dtype

    def payload_bytes(self, meta: Meta) -> int:
        return meta.numel * (self.dtype or meta.dtype).itemsize

    def encode(
        self, x: torch.Tensor, *, mask: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        Meta.of(x)
        if self.dtype is None:
            return x.detach().contiguous().view(-1).view(torch.uint8)
        limit = torch.finfo(self.dtype).max
        return finite(x, self.spec).clamp(-limit, limit).to(self.dtype).contiguous().view(-1).view(torch.uint8)

    def decode(self, payload: torch.Tensor, meta: Meta, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        values = self.checked(payload, meta).view(self.dtype or meta.dtype)
        return values.to(meta.dtype).view(meta.shape)


def cast(spec: str) -> Codec:
    """ "raw", "fp16" or "bf16" → codec. Raises EvenbitsError if anything follows the name."""
    if spec not in _TYPES:
        raise unknown_name("cast codec", spec, _TYPES)
    return Cast(spec, _TYPES[spec])
