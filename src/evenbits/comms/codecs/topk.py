"""The largest elements only: an index set, and the kept values through any other codec.

What. `top0.1+int8:g128` keeps k = ⌈0.1 n⌉ elements of largest magnitude; everything else decodes to zero.

    payload = which (bitmap or Rice-coded gaps, indexset.py) + values in order of index (the codec after the "+")

When it helps. On gradients with few large elements, with error feedback (comms/feedback.py). A tenth of the elements
costs half a bit per element for the indices alone, so against two- or three-bit groups it must be tried, not assumed.
Sent as int64, as torch.topk gives them, half the elements would cost 32 bits each: more than the tensor.

The way back. Whoever received a payload knows its index set (`mask_of`), so the gradient of that activation can be
coded on the same set without sending it: `encode(grad, mask=mask)`. Elements of the mask that happen to be zero are
sent as zeros, since both ends count them.

Ties at the threshold go to the lower index, so that k is exact and equal input gives equal bytes. The threshold is
found without sorting: a sample of every 64th element brackets it, and only what lies in the bracket is searched.

Left out. Random-k; DGC's momentum correction, which is an optimizer's business.
Source: A. F. Aji and K. Heafield, EMNLP 2017; Y. Lin et al., "Deep gradient compression", ICLR 2018.

Layout: "TOPK", then int32 k and int32 used index bits, then the index set, then the inner payload. On a mask: the inner
payload alone. n: elements, k: kept ones.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

import torch

from evenbits.comms.codecs.base import Codec, Meta, as_float32, finite
from evenbits.comms.codecs.bits import bytes_of, words_of
from evenbits.comms.codecs.indexset import IndexSet
from evenbits.comms.codecs.registry import get
from evenbits.errors import EvenbitsError

_SPELLING = re.compile(r"top(0?\.[0-9]{1,9}|1(?:\.0*)?|0)\+(.+)")
_MAGIC = int.from_bytes(b"TOPK", "little")
_HEAD = 12
_EVERY, _SMALL = 64, 1 << 14


class TopK(Codec):
    """ratio: the share that is kept; inner: the codec of the kept values."""

    keeps_mask = True

    def __init__(self, ratio: str, inner: Codec) -> None:
        self.ratio, self.inner = Fraction(ratio), inner
        self.spec = f"top{Decimal(ratio).normalize():f}+{inner.spec}"
        self.keeps_zero = inner.keeps_zero

    def kept(self, meta: Meta) -> int:
        """k, the number of elements that a payload holds. Raises EvenbitsError from 2^31 elements on."""
        if meta.numel >= 1 << 31:
            raise EvenbitsError(f"{self.spec!r} carries fewer than 2^31 elements; given shape {list(meta.shape)}.")
        return -(-self.ratio.numerator * meta.numel // self.ratio.denominator)

    def payload_bytes(self, meta: Meta) -> int:
        if meta.numel == 0:
            return 0
        kept = self.kept(meta)
        return _HEAD + IndexSet.of(meta.numel, kept).nbytes + self.payload_bytes_on(meta, kept)

    def payload_bytes_on(self, meta: Meta, kept: int) -> int:
        return self.inner.payload_bytes(Meta((kept,), meta.dtype))

    def encode(
        self, x: torch.Tensor, *, mask: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        meta = Meta.of(x)
        if mask is not None:
            self._check_mask(mask, meta)
            return self.inner.encode(x.detach()[mask], generator=generator)
        if meta.numel == 0:
            return torch.empty(0, dtype=torch.uint8, device=x.device)
        flat, kept = finite(x, self.spec).reshape(-1), self.kept(meta)
        mask_n = largest(as_float32(x, self.spec).abs(), kept)
        index_k = mask_n.nonzero().squeeze(1)  # looked for once: it takes longer than all that is done with it
        indices, used = IndexSet.of(meta.numel, kept).write(mask_n, index_k)
        head = torch.tensor([_MAGIC, kept, used], dtype=torch.int32, device=x.device)
        return torch.cat(
            [bytes_of(head), indices, self.inner.encode(flat.index_select(0, index_k), generator=generator)]
        )

    def decode(self, payload: torch.Tensor, meta: Meta, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is not None:
            self._check_mask(mask, meta)
            kept, values = int(mask.sum()), self.checked(payload, meta, self.payload_bytes_on(meta, int(mask.sum())))
        else:
            mask = self.mask_of(payload, meta)
            kept = self.kept(meta)
            values = payload[self.payload_bytes(meta) - self.payload_bytes_on(meta, kept) :]
        made = torch.zeros(meta.shape, dtype=meta.dtype, device=payload.device)
        return made.masked_scatter_(mask, self.inner.decode(values, Meta((kept,), meta.dtype)))

    def mask_of(self, payload: torch.Tensor, meta: Meta) -> torch.Tensor:
        """The kept elements, bool of meta's shape. Raises EvenbitsError if the payload is not one of this codec."""
        self._head(payload, meta)
        if meta.numel == 0:
            return torch.zeros(meta.shape, dtype=torch.bool, device=payload.device)
        indices = IndexSet.of(meta.numel, self.kept(meta))
        return indices.read(payload[_HEAD : _HEAD + indices.nbytes]).view(meta.shape)

    def true_bits(self, payload: torch.Tensor, meta: Meta) -> float:
        if meta.numel == 0:
            return 0.0
        used, kept = self._head(payload, meta), self.kept(meta)
        values, within = payload[len(payload) - self.payload_bytes_on(meta, kept) :], Meta((kept,), meta.dtype)
        return (8 * _HEAD + used + self.inner.true_bits(values, within) * kept) / meta.numel

    def _head(self, payload: torch.Tensor, meta: Meta) -> int:
        """The used bits of the index set, after a look at the header."""
        self.checked(payload, meta)
        if meta.numel == 0:
            return 0
        magic, kept, used = words_of(payload[:_HEAD], torch.int32).tolist()
        room = 8 * IndexSet.of(meta.numel, self.kept(meta)).nbytes
        if magic != _MAGIC or kept != self.kept(meta) or not 0 <= used <= room:
            raise EvenbitsError(
                f"these {payload.numel()} bytes are no {self.spec!r} payload of shape {list(meta.shape)}: the header "
                "does not say so. Both ends must use one codec."
            )
        return int(used)

    def _check_mask(self, mask: torch.Tensor, meta: Meta) -> None:
        if mask.dtype != torch.bool or tuple(mask.shape) != meta.shape:
            raise EvenbitsError(
                f"codec {self.spec!r} codes a tensor of shape {list(meta.shape)} on a bool mask of that shape; given "
                f"{mask.dtype} of shape {list(mask.shape)}."
            )


def largest(size_n: torch.Tensor, kept: int) -> torch.Tensor:
    """Magnitudes [n] → bool [n] with exactly `kept` ones at the largest; ties go to the lower index."""
    if kept >= len(size_n):
        return torch.ones_like(size_n, dtype=torch.bool)
    edge = _kth(size_n, kept)
    mask = size_n > edge
    missing = kept - int(torch.count_nonzero(mask))
    mask[(size_n == edge).nonzero().squeeze(1)[:missing]] = True
    return mask


def _kth(size_n: torch.Tensor, kept: int) -> torch.Tensor:
    """The kept-th largest of [n], exactly."""
    count = len(size_n)
    if count > _SMALL:
        sample = size_n[::_EVERY].sort(descending=True).values
        # Eight standard deviations of the sample's rank around the expected one; a miss is found by counting.
        place = kept * len(sample) / count
        margin = 8 * (place * (1 - kept / count)) ** 0.5 + 2
        top, bottom = int(place - margin), int(place + margin)
        high = sample[top] if top >= 0 else sample.new_tensor(torch.inf)
        low = sample[bottom] if bottom < len(sample) else sample.new_tensor(-1.0)
        above = int(torch.count_nonzero(size_n > high))
        between = size_n[(size_n <= high) & (size_n >= low)]
        if above < kept <= above + len(between):
            return between.kthvalue(len(between) - (kept - above) + 1).values
    return size_n.kthvalue(count - kept + 1).values


def top(spec: str) -> Codec:
    """ "top0.1+int8:g128" → codec. Raises EvenbitsError for a share outside (0, 1] and unknown inner codecs."""
    match = _SPELLING.fullmatch(spec)
    if match is None or not Fraction(match[1]):
        raise EvenbitsError(
            f"{spec!r}: top-k codecs are spelled topR+CODEC with 0 < R <= 1, such as 'top0.1+int8:g128'."
        )
    inner = get(match[2])
    if inner.keeps_mask:
        raise EvenbitsError(f"{spec!r}: one index set is enough; the values' codec must not be a top-k itself.")
    return TopK(match[1], inner)
