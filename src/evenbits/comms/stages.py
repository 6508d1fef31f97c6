"""A stage for torch's own pipeline schedules whose activations and gradients travel as packed bytes.

    stage = CodecStage(module, index, count, device, codec="int4:g128/int8:g128")
    schedule = Schedule1F1B(stage, microbatches, loss_fn=loss)          # or GPipe, Interleaved1F1B, ZBV, …

torch.distributed.pipelining has no hook for what travels, but its schedules touch a stage only through the four
`get_*_ops` methods, which name the buffers to send and receive, and through `_retrieve_recv_*`, which read a received
buffer just before it is needed. Overriding these puts a codec at every schedule's disposal: encoding when the send is
posted, decoding on the compute stream after the wait. The forward and the backward codec of an edge are independent
(gradients need milder
ones: Rudakov et al. 2024, arXiv 2401.07788). With codec "raw" losses and gradients are bit-identical to PipelineStage.

What differs from the stock stage: receive buffers have the packed size, and a new one is taken for every message, so
that a decoded activation is a fresh leaf. Neighbouring stages on one rank hand tensors over as before, uncoded.
Integer tensors travel as they are. Where forward and backward codec both keep an index set, the gradient is coded on
the forward's set and the set is not sent again; with a dense backward codec the gradient of a pruned activation comes
back whole.

Not here: DTensor activations, and stages cut by `torch.distributed.pipelining.pipeline` (the traced front end).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from evenbits.comms.codecs import get
from evenbits.comms.courier import Courier
from evenbits.comms.faults import desk_of
from evenbits.comms.guard import Guard
from evenbits.comms.handshake import Card, card, shake
from evenbits.comms.telemetry import Telemetry
from evenbits.comms.wire import BACKWARD, FORWARD, Edge, edge_of
from evenbits.errors import EvenbitsError


class CodecStage(PipelineStage):
    """PipelineStage with a codec per edge and direction.

    submodule, stage_index, num_stages, device and every further option are PipelineStage's.
    codec: one spelling for all edges, or {edge: spelling}; edge i lies between stages i and i + 1 (`Edge.of`).
    telemetry: measures what the codecs do to this rank's outgoing tensors (comms/telemetry.py).
    guard: warns, or raises the bits, when the measured error becomes dangerous (comms/guard.py); needs telemetry.
    timeout: seconds to wait for the other stages' cards before the first step.

    Before the first step all stages compare codecs, versions and shapes and raise EvenbitsError together if they
    differ; an edge that would prune the output of an embedding is refused there too unless `Edge.prune_embeddings` is
    set.
    """

    def __init__(
        self,
        submodule: torch.nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device,
        *,
        codec: str | Edge | Mapping[int, str | Edge] = "int8:g128",
        telemetry: Telemetry | None = None,
        guard: Guard | None = None,
        timeout: float = 60.0,
        **options: Any,
    ) -> None:
        super().__init__(submodule, stage_index, num_stages, device, **options)
        if guard is not None and telemetry is None:
            raise EvenbitsError("a guard judges what telemetry measures; give the stage a Telemetry too.")
        self.edges = {i: edge_of(codec, i) for i in (stage_index - 1, stage_index) if 0 <= i < num_stages - 1}
        self.desk = desk_of(self.group, self.device)
        self.courier = Courier(stage_index, self.edges, self.device, self.desk, telemetry, guard)
        self._timeout = timedelta(seconds=timeout)

    def codec_state(self) -> dict[str, Any]:
        """What a checkpoint of this stage must hold beside the module: the step and every lane's rung."""
        lanes = {f"{edge}.{direction}": lane.following for (edge, direction), lane in self.courier.lanes.items()}
        guard = self.courier.guard
        return {"step": self.courier.step, "lanes": lanes, "guard": {} if guard is None else guard.state()}

    def load_codec_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `codec_state`, before the first step. Raises EvenbitsError if the edges are other ones."""
        wanted = {f"{edge}.{direction}": lane for (edge, direction), lane in self.courier.lanes.items()}
        if set(wanted) != set(state["lanes"]):
            raise EvenbitsError(
                f"the codec state is of lanes {sorted(state['lanes'])}; stage {self.stage_index} has {sorted(wanted)}."
            )
        for name, rung in state["lanes"].items():
            wanted[name].hear(int(rung))
            wanted[name].advance()
        self.courier.step = int(state["step"])
        if self.courier.guard is not None:
            self.courier.guard.load(state["guard"])

    def bytes_sent(self) -> int:
        """Bytes this stage has handed to the link so far, trailers included."""
        return sum(lane.sent for lane in self.courier.lanes.values())

    # What a schedule asks for

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive the packed activations of one microbatch."""
        edge = self.stage_index - 1
        return [
            self._op(dist.irecv, self.courier.buffer(edge, FORWARD, fwd_chunk_id, slot, info.tensor_meta), edge)
            for slot, info in enumerate(self.args_recv_info[fwd_chunk_id])
            if not info.is_root_arg
        ]

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Encode and send the outputs of one microbatch."""
        if self.is_last:
            return []
        outputs, _ = self.fwd_cache[fwd_chunk_id]
        edge = self.stage_index
        return [
            self._op(dist.isend, self.courier.frame(edge, FORWARD, fwd_chunk_id, slot, out), edge + 1)
            for slot, out in enumerate(outputs)
        ]

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive the packed gradients of one microbatch."""
        if not self.has_backward or self.is_last:
            return []
        edge = self.stage_index
        return [
            self._op(dist.irecv, self.courier.buffer(edge, BACKWARD, bwd_chunk_id, slot, info.tensor_meta), edge + 1)
            for slot, info in enumerate(self.grad_recv_info[bwd_chunk_id])
            if info.tensor_meta is not None
        ]

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Encode and send the gradients of one microbatch."""
        if not self.has_backward or self.is_first:
            return []
        self._check_chunk_id(bwd_chunk_id)
        edge, ops = self.stage_index - 1, []
        for slot, grad in enumerate(self.bwd_cache.pop(bwd_chunk_id)):
            meta = self._get_grad_send_meta(slot)
            if meta is None:
                continue
            if grad is None:  # The neighbour waits for a gradient wherever one was announced.
                grad = torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=self.device)
            ops.append(self._op(dist.isend, self.courier.frame(edge, BACKWARD, bwd_chunk_id, slot, grad), edge))
        return ops

    def _op(self, kind: Any, frame: torch.Tensor, stage: int) -> dist.P2POp:
        return dist.P2POp(kind, frame, self._resolve_peer_global_rank(stage), self.group)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        if self._here(self.stage_index - 1):
            return super()._retrieve_recv_activations(fwd_chunk_id)
        learns = self.has_backward and torch.is_grad_enabled()
        return tuple(
            self.courier.read(self.stage_index - 1, FORWARD, fwd_chunk_id, slot, meta).requires_grad_(
                learns and meta.requires_grad
            )
            for slot, meta in enumerate(self._stage_meta.inputs or ())
        )

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        if self._here(self.stage_index + 1):
            return super()._retrieve_recv_grads(bwd_chunk_id)
        return tuple(
            info.tensor_meta and self.courier.read(self.stage_index, BACKWARD, bwd_chunk_id, slot, info.tensor_meta)
            for slot, info in enumerate(self.grad_recv_info[bwd_chunk_id])
        )

    # Around a step

    def clear_runtime_states(self) -> None:
        """A step begins."""
        super().clear_runtime_states()
        self.desk.begin(self.stage_index)
        self.courier.learns = self.has_backward
        self.courier.begin()

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """A step ends: before gradients are used, all ranks hear whether one of them met a fault. Raises LinkError."""
        if self.has_backward:
            self.desk.agree(self.stage_index, self._local())
        super().perform_reduce_grad(grad_scale_factor)

    def _here(self, stage: int) -> bool:
        """Whether that stage exists and runs on this rank."""
        return self.stage_index_to_group_rank.get(stage) == self.group_rank

    def _local(self) -> set[int]:
        return {stage for stage, rank in self.stage_index_to_group_rank.items() if rank == self.group_rank}

    # Before the first step

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        with self._nowhere(self._here(self.stage_index - 1)):
            super()._setup_forward_recv_info(num_microbatches, has_backward)

    def _create_grad_recv_info(self, act_send_info: dict[int, Any]) -> Any:
        with self._nowhere(self._here(self.stage_index + 1)):
            return super()._create_grad_recv_info(act_send_info)

    @contextmanager
    def _nowhere(self, local: bool) -> Iterator[None]:
        """Buffers of the full size are never used on an edge that is coded: they are taken without memory."""
        device = self.device
        self.device = device if local else torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def _post_metadata_inference_cleanup(self) -> None:
        super()._post_metadata_inference_cleanup()
        cards, local = self.desk.cards, self._local()
        cards[self.stage_index] = self._card()
        if local <= set(cards):
            mine = {stage: cards.pop(stage) for stage in local}
            shake(self.group, mine, self.num_stages, self._timeout)

    def _card(self) -> Card:
        meta, index = self._stage_meta, self.stage_index
        return card(
            self.edges.get(index - 1),
            self.edges.get(index),
            chunks=len(self.args_recv_info),
            rungs={f"{edge}.{direction}": lane.level for (edge, direction), lane in self.courier.lanes.items()},
            step=self.courier.step,
            refuses=self._refuses(),
            inputs=meta.inputs,
            outputs=meta.outputs,
            input_grads=meta.input_grads,
            output_grads=meta.output_grads,
        )

    def _refuses(self) -> str:
        """Why this stage would not start, in words; empty if it would."""
        metas = [m for part in (self._stage_meta.inputs, self._stage_meta.outputs) for m in part or ()]
        if any(hasattr(m, "placements") for m in metas):
            return "DTensor activations cannot be coded; give the stage local tensors"
        edge = self.edges.get(0) if self.is_first else None
        embeds = any(isinstance(m, (torch.nn.Embedding, torch.nn.EmbeddingBag)) for m in self.submod.modules())
        if edge is None or edge.prune_embeddings or not embeds:
            return ""
        prunes = [spec for spec in edge.forward if get(spec).keeps_mask]
        if not prunes:
            return ""
        return (
            f"codec {prunes[0]!r} would prune the output of a stage that holds an embedding, where small values carry "
            "the words; use a dense codec on edge 0, or ask for it with Edge(..., prune_embeddings=True)"
        )
