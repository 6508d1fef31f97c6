"""The sign: one bit per element and one magnitude per group.

What. x̂ = ± mean |x| of the group: the two-level code of least squared error that has one magnitude.

When it helps. As the coarsest of gradient codecs, together with error feedback (comms/feedback.py); without it training
usually stalls, because everything small is blown up to the mean. `sign` is `int1:tensor`; `sign:g128` and `int1:g128`
are the same code.

Zero. One bit has no zero. Elements that are zero are sent as + and − by turns, so that they move no sum: all as + would
be the coherent error that grouped.py warns of. A group of zeros stays zero.

Left out. 1-bit Adam's momentum, which is an optimizer's business.
Source: F. Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; S. P. Karimireddy et al., "Error
feedback fixes SignSGD", ICML 2019.

Layout: mean magnitudes (bfloat16, rounded to nearest; per tensor float32), then one bit per element, 1 for minus.
"""

from __future__ import annotations

import torch

from evenbits.comms.codecs.base import Codec, Meta, as_float32, finite, restored
from evenbits.comms.codecs.bits import bytes_of, pack, packed_bytes, unpack, words_of
from evenbits.comms.codecs.grouped import Groups
from evenbits.errors import EvenbitsError
from evenbits.numerics.granularity import Granularity


class Sign(Codec):
    """Signs with a mean magnitude per group."""

    keeps_zero = False

    def __init__(self, spec: str, granularity: Granularity) -> None:
        self.spec, self.granularity = spec, granularity
        self._scale_type = torch.float32 if granularity.kind == "tensor" else torch.bfloat16

    def payload_bytes(self, meta: Meta) -> int:
        groups = Groups.of(self.granularity, meta)
        return groups.count * self._scale_type.itemsize + packed_bytes(meta.numel, 1)

    def encode(
        self, x: torch.Tensor, *, mask: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        self.no_mask(mask)
        meta = Meta.of(x)
        if meta.numel == 0:
            return torch.empty(0, dtype=torch.uint8, device=x.device)
        flat, groups = as_float32(finite(x, self.spec), self.spec), Groups.of(self.granularity, meta)
        sizes = torch.full((groups.count,), float(groups.width), device=flat.device)
        sizes[-1] = meta.numel - (groups.count - 1) * groups.width
        padded = torch.nn.functional.pad(flat.abs(), (0, groups.count * groups.width - meta.numel))
        # Divided before adding up: a sum of large magnitudes is not a float32.
        scale = (padded.view(groups.count, -1) / sizes.unsqueeze(1)).sum(dim=1)
        scale = scale.clamp(max=torch.finfo(self._scale_type).max).to(self._scale_type)
        minus = flat < 0
        odd = minus[1::2]
        odd |= flat[1::2] == 0
        return torch.cat([bytes_of(scale), pack(minus.view(torch.uint8), 1)])

    def decode(self, payload: torch.Tensor, meta: Meta, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.no_mask(mask)
        payload = self.checked(payload, meta)
        groups = Groups.of(self.granularity, meta)
        if meta.numel == 0:
            return torch.empty(meta.shape, dtype=meta.dtype, device=payload.device)
        scales, packed = payload.split([groups.count * self._scale_type.itemsize, packed_bytes(meta.numel, 1)])
        scale_G = words_of(scales, self._scale_type).float()
        highest = float(scale_G.max())
        if not 0 <= float(scale_G.min()) <= highest <= torch.finfo(torch.float32).max:
            raise EvenbitsError(f"these {payload.numel()} bytes are no {self.spec!r} payload: a magnitude is negative.")
        signs = unpack(packed, 1, groups.count * groups.width) if meta.numel == groups.count * groups.width else None
        if signs is None:
            signs = torch.nn.functional.pad(
                unpack(packed, 1, meta.numel), (0, groups.count * groups.width - meta.numel)
            )
        values = signs.float().mul_(-2).add_(1).view(groups.count, -1).mul_(scale_G.unsqueeze(1))
        return restored(values.view(-1)[: meta.numel], meta, highest)


def sign(spec: str) -> Codec:
    """ "sign", "sign:row", "sign:g128" → codec. Raises EvenbitsError for anything else."""
    name, _, grain = spec.partition(":")
    if name != "sign" or (grain and Granularity.parse(grain).kind == "axis"):
        raise EvenbitsError(f"{spec!r}: the sign codec is spelled sign, sign:tensor, sign:row or sign:gN.")
    granularity = Granularity.parse(grain or "tensor")
    return Sign("sign" if granularity.kind == "tensor" else f"sign:{granularity}", granularity)
