"""A stage for torch's own pipeline schedules whose activations and gradients travel as packed bytes.

    stage = CodecStage(module, index, count, device, codec="int4:g128/int8:g128")
    schedule = Schedule1F1B(stage, microbatches, loss_fn=loss)          # or GPipe, Interleaved1F1B, ZBV, …

torch.distributed.pipelining has no hook for what travels, but its schedules touch a stage only through the four
`get_*_ops` methods, which name the buffers to send and receive, and through `_retrieve_recv_*`, which read a received
buffer just before it is needed. Overriding these puts a codec at every schedule's disposal: encoding when the send is
posted, decoding on the compute stream after the wait. The forward and the backward codec of an edge are independent
(gradients need milder ones: Rudakov et al. 2024, arXiv 2401.07788). With codec "raw" losses and gradients are
bit-identical to PipelineStage.

What differs from the stock stage: receive buffers have the packed size, and a new one is taken for every message, so
that a decoded activation is a fresh leaf. Neighbouring stages on one rank hand tensors over as before, uncoded.
Integer tensors travel as they are. Where forward and backward codec both keep an index set, the gradient is coded on
the forward's set and the set is not sent again; with a dense backward codec the gradient of a pruned activation comes
back whole.

Not here: DTensor activations, and stages cut by `torch.distributed.pipelining.pipeline` (the traced front end).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from evenbits.comms.courier import Courier
from evenbits.comms.embeddings import refusal
from evenbits.comms.faults import desk_of
from evenbits.comms.guard import Guard
from evenbits.comms.handshake import Card, card, shake
from evenbits.comms.telemetry import Telemetry
from evenbits.comms.visits import Delta
from evenbits.comms.wire import BACKWARD, FORWARD, Edge, edge_of
from evenbits.errors import EvenbitsError

# What is overridden or read beyond the documented methods: a torch without one of these must not be used half.
_NEEDED = (
    "_retrieve_recv_activations",
    "_retrieve_recv_grads",
    "_setup_forward_recv_info",
    "_create_grad_recv_info",
    "_get_grad_send_meta",
    "_post_metadata_inference_cleanup",
    "_resolve_peer_global_rank",
)


class CodecStage(PipelineStage):
    """PipelineStage with a codec per edge and direction.

    submodule, stage_index, num_stages, device and every further option are PipelineStage's.
    codec: one spelling for all edges, or {edge: spelling}; edge i lies between stages i and i + 1 (`Edge.of`).
    telemetry: measures what the codecs do to this rank's outgoing tensors (comms/telemetry.py).
    guard: warns, or raises the bits, when the measured error becomes dangerous (comms/guard.py); needs telemetry.
    delta: activations travel as differences from the same sample's last ones (comms/visits.py); `samples` names them.
        A guard's ladder then moves gradients only.
    timeout: seconds to wait for the other stages' cards before the first step.
    ahead: how many microbatches ahead of its need a receive is posted; None leaves it to the schedule, as NCCL needs
        it; "auto" is 1 on gloo. gloo announces a receive on the connection that also carries the data going that way,
        and 1F1B posts its sends first: without this, activations and gradients take turns on a link that could carry
        both at once.

    Before the first step all stages compare codecs, versions and shapes and raise AgreedError together if they
    differ; an edge that would prune the output of an embedding (comms/embeddings.py) is refused there too unless
    `Edge.prune_embeddings` is set.
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
        delta: Delta | None = None,
        timeout: float = 60.0,
        ahead: int | str | None = "auto",
        **options: Any,
    ) -> None:
        missing = [name for name in _NEEDED if not hasattr(PipelineStage, name)]
        if missing:
            raise EvenbitsError(
                f"torch {torch.__version__} has another PipelineStage (without {', '.join(missing)}); CodecStage was "
                "written for torch 2.13. comms/carrier.py needs nothing of it."
            )
        super().__init__(submodule, stage_index, num_stages, device, **options)
        self.ahead = _ahead(ahead, dist.get_backend(self.group))
        self._works: dict[tuple[str, int], list[dist.Work]] = {}
        if guard is not None and telemetry is None:
            raise EvenbitsError("a guard judges what telemetry measures; give the stage a Telemetry too.")
        self.edges = {i: edge_of(codec, i) for i in (stage_index - 1, stage_index) if 0 <= i < num_stages - 1}
        self.desk = desk_of(self.group, self.device)
        self.desk.stages.add(self)
        self.courier = Courier(stage_index, self.edges, self.device, self.desk, telemetry, guard, delta)
        self._timeout = timedelta(seconds=timeout)

    def codec_state(self) -> dict[str, Any]:
        """What a checkpoint of this stage must hold beside the module: the step and every lane's rung."""
        lanes = {f"{edge}.{direction}": lane.following for (edge, direction), lane in self.courier.lanes.items()}
        guard, telemetry = self.courier.guard, self.courier.telemetry
        judged = {} if guard is None or telemetry is None else {"state": guard.state(), "figures": telemetry.state()}
        state = {"step": self.courier.step, "lanes": lanes, "guard": judged}
        visits = self.courier.visits
        return state if visits is None else {**state, "delta": visits.state()}

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
        if self.courier.guard is not None and self.courier.telemetry is not None and state["guard"]:
            self.courier.guard.load(state["guard"]["state"])
            self.courier.telemetry.load(state["guard"]["figures"])
        if self.courier.visits is not None:
            self.courier.visits.load(state.get("delta", {}))

    def samples(self, ids: Sequence[int] | torch.Tensor) -> None:
        """With `delta`: a whole number for each sample of the batch, in its order; on every rank, before every training
        step. Raises EvenbitsError without `delta`, and for numbers that repeat.
        """
        if self.courier.visits is None:
            raise EvenbitsError("this stage has no delta coding; give CodecStage delta=Delta('int4:g128').")
        self.courier.visits.announce(ids)

    def bytes_sent(self) -> int:
        """Bytes this stage has handed to the link so far, trailers included."""
        return sum(lane.sent for lane in self.courier.lanes.values())

    # What a schedule asks for

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive the packed activations of one microbatch; nothing is left to do for those that are posted already."""
        return [] if self.is_first else self._receive(FORWARD, fwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Encode and send the outputs of one microbatch."""
        if self.is_last:
            return []
        outputs, _ = self.fwd_cache[fwd_chunk_id]
        edge, ops = self.stage_index, []
        for slot, out in enumerate(outputs):
            frame = self.courier.frame(edge, FORWARD, fwd_chunk_id, slot, out)
            ops.append(self._op(dist.isend, edge, FORWARD, fwd_chunk_id, slot, frame))
        return ops

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive the packed gradients of one microbatch; nothing is left to do for those that are posted already."""
        return [] if not self.has_backward or self.is_last else self._receive(BACKWARD, bwd_chunk_id)

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
            frame = self.courier.frame(edge, BACKWARD, bwd_chunk_id, slot, grad)
            ops.append(self._op(dist.isend, edge, BACKWARD, bwd_chunk_id, slot, frame))
        return ops

    def _op(self, kind: Any, edge: int, direction: str, chunk: int, slot: int, frame: torch.Tensor) -> dist.P2POp:
        """The tag names the message, so that receives may be posted in another order than sends (NCCL has no tags)."""
        peer = edge if edge != self.stage_index else edge + 1
        tag = (edge << 1 | (direction == BACKWARD)) << 16 | chunk << 4 | slot & 0xF
        return dist.P2POp(kind, frame, self._resolve_peer_global_rank(peer), self.group, tag)

    def _receive(self, direction: str, chunk: int) -> list[dist.P2POp]:
        """The operations of one microbatch, or none after posting it and those ahead of it here."""
        if self.ahead is None:
            return self._receives(direction, chunk)
        for near in range(chunk, min(chunk + self.ahead, len(self.args_recv_info) - 1) + 1):
            # The size of a gradient on the forward's index set is known once that activation was sent.
            if (direction, near) in self._works or (near > chunk and self._waits_for_mask(direction)):
                continue
            ops = self._receives(direction, near)
            self._works[direction, near] = [
                work for op in ops if (work := dist.irecv(op.tensor, op.peer, op.group, op.tag)) is not None
            ]
        return []

    def _receives(self, direction: str, chunk: int) -> list[dist.P2POp]:
        edge = self.stage_index - 1 if direction == FORWARD else self.stage_index
        infos = (self.args_recv_info if direction == FORWARD else self.grad_recv_info)[chunk]
        return [
            self._op(dist.irecv, edge, direction, chunk, slot, self.courier.buffer(edge, direction, chunk, slot, meta))
            for slot, meta in enumerate(info.tensor_meta for info in infos)
            if meta is not None
        ]

    def _waits_for_mask(self, direction: str) -> bool:
        return direction == BACKWARD and self.courier.lanes[self.stage_index, BACKWARD].codec.keeps_mask

    def drop_receives(self) -> None:
        """Forget what this stage has posted itself: a step begins, or the connections are being closed."""
        self._works.clear()

    def _arrived(self, direction: str, chunk: int) -> None:
        """Wait for what this stage has posted itself; the schedule waits for the rest."""
        for work in self._works.pop((direction, chunk), ()):
            work.wait()

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        if self._here(self.stage_index - 1):
            return super()._retrieve_recv_activations(fwd_chunk_id)
        self._arrived(FORWARD, fwd_chunk_id)
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
        self._arrived(BACKWARD, bwd_chunk_id)
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
        self.drop_receives()

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """A step ends: before gradients are used, all ranks hear if one of them met a fault. Raises AgreedError."""
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
            delta="" if self.courier.visits is None else self.courier.visits.delta.spec,
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
        return "" if edge is None or edge.prune_embeddings else refusal(self.submod, edge.forward)


def _ahead(given: int | str | None, backend: str) -> int | None:
    """How far ahead receives are posted; "auto" is 1 on gloo and None elsewhere. Raises EvenbitsError for the rest."""
    if given == "auto":
        return 1 if backend == "gloo" else None
    if given is None or (isinstance(given, int) and given >= 0 and backend == "gloo"):
        return None if given is None else int(given)
    raise EvenbitsError(
        "ahead is 'auto', None, or a number of microbatches on gloo (other back ends post sends and receives "
        f"together); given {given!r} on {backend}."
    )
