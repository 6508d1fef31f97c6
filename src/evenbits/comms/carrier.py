"""For pipeline engines without hooks: the module itself sends and receives packed bytes, dressed as float32.

    stage 0:  Carrier(module, sends=Edge.of("int4:g128/int8:g128"), shape_out=(batch, 128))
    stage 1:  Carrier(module, receives=Edge.of("int4:g128/int8:g128"), shape_in=(batch, 128))

What. Engines move a stage's output forward and a gradient of the same shape back. So the output becomes the payload,
viewed as a float32 vector by an autograd function, and the gradient of that vector carries the backward payload the
same way. No method of the engine is touched, so any engine that moves float32 tensors untouched should do; tested with
torch's own.

    forward payload → float32 view [F]          F = ⌈max(forward bytes, backward bytes) / 4⌉, zero padded
    gradient of the view [F] = backward payload → decoded at the sender's autograd function

When. Only where `CodecStage` cannot be used; it is the better one in each of these points:
- forward and backward messages are padded to the longer of the two;
- the floats are bit patterns, some of them NaN: anomaly detection, gradient scaling or clipping between the stages, and
  TORCH_DISTRIBUTED_DEBUG=DETAIL see garbage or destroy it, and an engine that casts activations does too;
- an engine that learns shapes by running the module on uninitialised tensors feeds garbage to the codec, which may
  refuse it: give the engine its shapes (`input_args` and `output_args` of PipelineStage, of `carried` elements);
- stages on one rank exchange payloads too; there is no handshake, no telemetry, and no index set shared by both ways;
- the payload has no trailer: a codec that differs at both ends is found only where the sizes differ.
One float tensor per edge; integers need an edge of their own kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from evenbits.comms.codecs import Codec, get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.wire import Edge
from evenbits.errors import EvenbitsError


def carried(edge: Edge, meta: Meta) -> int:
    """Float32 elements of the vector that stands for a tensor of `meta` on this edge."""
    forward, backward = _codecs(edge)
    return -(-max(forward.payload_bytes(meta), backward.payload_bytes(meta)) // 4)


def _codecs(edge: Edge) -> tuple[Codec, Codec]:
    if len(edge.forward) > 1 or len(edge.backward) > 1:
        raise EvenbitsError(f"a carrier cannot change codecs while it runs; give one per direction, not {edge}.")
    return get(edge.forward[0]), get(edge.backward[0])


def _dressed(payload: torch.Tensor, floats: int) -> torch.Tensor:
    """uint8 [n] → float32 [floats], the same bytes and zeros."""
    vector = torch.zeros(4 * floats, dtype=torch.uint8, device=payload.device)
    vector[: payload.numel()] = payload
    return vector.view(torch.float32)


def _undressed(vector: torch.Tensor, nbytes: int) -> torch.Tensor:
    """float32 [floats] → uint8 [nbytes]."""
    if vector.dtype != torch.float32 or vector.ndim != 1 or 4 * vector.numel() < nbytes:
        raise EvenbitsError(
            f"a carried tensor is a float32 vector of at least {-(-nbytes // 4)} elements; given {vector.dtype} of "
            f"shape {list(vector.shape)}. Both stages need the same edge and shape, and the engine must not cast."
        )
    return vector.contiguous().view(torch.uint8)[:nbytes]


class _Pack(torch.autograd.Function):
    """Tensor → vector; the gradient of the vector is a backward payload, which is decoded."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, edge: Edge) -> torch.Tensor:
        ctx.edge, ctx.meta = edge, Meta.of(x)
        return _dressed(_codecs(edge)[0].encode(x), carried(edge, ctx.meta))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        codec = _codecs(ctx.edge)[1]
        return codec.decode(_undressed(grads[0], codec.payload_bytes(ctx.meta)), ctx.meta), None


class _Unpack(torch.autograd.Function):
    """Vector → tensor; the gradient of the tensor is coded and becomes the gradient of the vector."""

    @staticmethod
    def forward(ctx: Any, vector: torch.Tensor, edge: Edge, meta: Meta) -> torch.Tensor:
        ctx.edge, ctx.meta = edge, meta
        codec = _codecs(edge)[0]
        return codec.decode(_undressed(vector.detach(), codec.payload_bytes(meta)), meta).clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _dressed(_codecs(ctx.edge)[1].encode(grads[0]), carried(ctx.edge, ctx.meta)), None, None


# autograd functions are untyped in torch.
_pack: Callable[..., torch.Tensor] = _Pack.apply
_unpack: Callable[..., torch.Tensor] = _Unpack.apply


class Carrier(nn.Module):
    """A stage's module between packed edges.

    receives: the edge before it, with `shape_in` and `dtype_in` of the tensor behind the vector; None for the first
    stage.
    sends: the edge after it; None for the last stage.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        receives: Edge | None = None,
        sends: Edge | None = None,
        shape_in: tuple[int, ...] | None = None,
        dtype_in: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if receives is not None and shape_in is None:
            raise EvenbitsError("a carrier that receives must know the shape of the tensor: give shape_in.")
        for edge in (receives, sends):
            if edge is not None:
                _codecs(edge)
        self.module, self.receives, self.sends = module, receives, sends
        self._meta = None if shape_in is None else Meta(tuple(shape_in), dtype_in)

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """A float32 vector if this stage receives, otherwise the module's own input → a vector if it sends."""
        if self.receives is not None:
            x = _unpack(x, self.receives, self._meta)
        y: torch.Tensor = self.module(x, **options)
        return y if self.sends is None else _pack(y, self.sends)
