"""Delta coding of activations (AQ-SGD): a sample's activation is sent as its difference from the last epoch's.

    first visit    a = decode(first(x))               both ends keep a
    later          a = a + decode(codec(x − a))       both ends keep a

When it helps. In fine-tuning over several epochs: activations of a sample change little from one visit to the next, so
the difference has a small range and 2 to 4 bits of it are as good as 8 of the activation. The kept value is what both
ends hold, never x itself, so errors do not add up: each visit's error is that of one small difference.

What it costs. One activation for every sample, at both ends: 20,000 samples of 1024 tokens and 1600 channels are 65 GB
in bfloat16. `memory` bounds what is held in memory and the rest goes to files in `folder`; `capacity` bounds how many
samples are known at all, the one longest unseen being dropped. Without repeated samples it is of no use.

Both ends decide alike. Which samples are known, and so the size of a payload, follows from the identifiers seen so far
and `capacity`; `memory` and `folder` are each end's own affair. Both ends must see the same batches in the same order,
and the codecs must decode to equal bits at both (all element-by-element codecs do; low rank and Hadamard need equal
machines).

Source: J. Wang et al., "Fine-tuning language models over slow networks using activation quantization with guarantees"
(AQ-SGD), NeurIPS 2022. Left out: their half-precision message buffers; `dtype` sets what is kept.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from evenbits.comms.codecs import Codec, get
from evenbits.comms.codecs.base import Meta
from evenbits.errors import EvenbitsError


class SampleStore:
    """Tensors by identifier, the least recently used in files once they exceed `memory` bytes.

    A file is written under another name and renamed, so that it is whole or not there. The folder must be empty: what
    is in it belongs to another run.
    """

    def __init__(self, memory: int | None = None, folder: str | Path | None = None) -> None:
        if (memory is None) != (folder is None):
            raise EvenbitsError("a bound on memory needs a folder for what exceeds it, and a folder needs the bound.")
        self.memory, self.folder = memory, None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                raise EvenbitsError(f"{self.folder} is not empty; spilled samples need a folder of their own.")
        self._held: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def put(self, sample: int, value: torch.Tensor) -> None:
        """Keeps a copy of value for a sample, in place of what was kept."""
        self._release(sample)
        self._held[sample] = value.detach().clone(memory_format=torch.contiguous_format)
        self._bytes += value.nbytes
        while self.memory is not None and self._bytes > self.memory and self._held:
            oldest, spilled = next(iter(self._held.items()))
            self._write(oldest, spilled)
            self._release(oldest)

    def view(self, sample: int) -> torch.Tensor:
        """For a checkpoint, on the CPU: a copy if it is held in memory, a map of its file otherwise."""
        return self._held[sample].detach().cpu().clone() if sample in self._held else self._mapped(sample)

    def get(self, sample: int) -> torch.Tensor:
        """What is kept for a sample. Raises EvenbitsError if it is gone from its file."""
        if sample in self._held:
            self._held.move_to_end(sample)
            return self._held[sample]
        return self._mapped(sample)

    def _mapped(self, sample: int) -> torch.Tensor:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self._file(sample))["value"]
        except (OSError, KeyError, SafetensorError) as error:
            raise EvenbitsError(f"the kept activation of sample {sample} cannot be read: {error}.") from error

    def drop(self, sample: int) -> None:
        """Forgets a sample, wherever it is."""
        self._release(sample)
        if self.folder is not None:
            self._file(sample).unlink(missing_ok=True)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self._bytes

    def _release(self, sample: int) -> None:
        gone = self._held.pop(sample, None)
        self._bytes -= 0 if gone is None else gone.nbytes

    def _file(self, sample: int) -> Path:
        if self.folder is None:
            raise EvenbitsError(f"no activation is kept for sample {sample}.")
        return self.folder / f"{sample}.safetensors"

    def _write(self, sample: int, value: torch.Tensor) -> None:
        from safetensors.torch import save_file

        path = self._file(sample)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
        try:
            save_file({"value": value.cpu()}, partial)
            partial.replace(path)
        except OSError as error:
            raise EvenbitsError(f"writing {path} failed ({error}); free some space or choose another disk.") from error
        finally:
            partial.unlink(missing_ok=True)


class DeltaCoder:
    """One end of a delta-coded link; the other end has one with equal codecs, capacity and dtype.

    codec: of differences, such as "int4:g128". first: of a sample's first visit.
    capacity: how many samples are kept at most (None: all). dtype: what is kept (None: as decoded).
    memory, folder: see SampleStore.
    """

    def __init__(
        self,
        codec: str | Codec,
        first: str | Codec = "bf16",
        *,
        capacity: int | None = None,
        dtype: torch.dtype | None = None,
        memory: int | None = None,
        folder: str | Path | None = None,
    ) -> None:
        self.codec, self.first = (get(c) if isinstance(c, str) else c for c in (codec, first))
        if capacity is not None and capacity < 1:
            raise EvenbitsError(f"a delta coder keeps at least one sample; given capacity {capacity}.")
        self.capacity, self.dtype = capacity, dtype
        self._store = SampleStore(memory, folder)
        self._known: OrderedDict[int, Meta] = OrderedDict()  # from the one longest unseen

    @property
    def spec(self) -> str:
        """What both ends must agree on."""
        kept = "" if self.dtype is None else f":{str(self.dtype).removeprefix('torch.')}"
        return f"delta({self.codec.spec},{self.first.spec}){kept}:{self.capacity or 'all'}"

    def payload_bytes(self, meta: Meta, samples: Sequence[int]) -> int:
        """Bytes of the next payload for a batch `meta` of these samples (its first dimension)."""
        return sum(self._part_bytes(meta, samples))

    def encode(self, x: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        """x [N, …] of N samples → uint8 payload; what the other end will decode is kept. Raises EvenbitsError for
        identifiers that repeat, or do not number N, or samples whose shape has changed."""
        return self.both(x, samples)[0]

    def both(
        self, x: torch.Tensor, samples: Sequence[int], *, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`encode`, and what the other end will decode: payload, x̂. generator: of stochastic codecs."""
        meta = Meta.of(x)
        new, known = self._split(meta, samples)
        parts = [self.first.encode(x[new], generator=generator)] if new else []
        if known:
            change = x[known] - self._kept(meta, samples, known, x.device)
            parts.append(self.codec.encode(change, generator=generator))
        payload = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=x.device)
        return payload, self.decode(payload, meta, samples)

    def expect(self, samples: Sequence[int]) -> None:
        """These samples, no more than `capacity`, come next, in several batches: room is made for them now, and none of
        them is dropped for another. So what is known of them can be asked at once.
        """
        for sample in samples:
            if sample in self._known:
                self._known.move_to_end(sample)
        new = sum(sample not in self._known for sample in samples)
        while self.capacity is not None and self._known and len(self._known) + new > self.capacity:
            self._forget(next(iter(self._known)))

    def forget(self, samples: Sequence[int]) -> None:
        """Their next visits are first visits again."""
        for sample in samples:
            if sample in self._known:
                self._forget(sample)

    def decode(self, payload: torch.Tensor, meta: Meta, samples: Sequence[int]) -> torch.Tensor:
        """A payload → x̂ of `meta`, which is kept for the samples' next visit."""
        new, known = self._split(meta, samples)
        sizes = self._part_bytes(meta, samples)
        if payload.dtype != torch.uint8 or payload.ndim != 1 or payload.numel() != sum(sizes):
            raise EvenbitsError(
                f"a {self.spec} payload of {len(new)} new and {len(known)} known samples has {sum(sizes)} bytes; given "
                f"{payload.dtype} of shape {list(payload.shape)}. Both ends must have seen the same samples."
            )
        head, tail = payload.split(sizes)
        made = torch.empty(meta.shape, dtype=meta.dtype, device=payload.device)
        if new:
            made[new] = self.first.decode(head, _rows(meta, len(new)))
        if known:
            kept = self._kept(meta, samples, known, payload.device)
            limit = torch.finfo(meta.dtype).max  # an infinite value would be kept for good
            made[known] = (kept + self.codec.decode(tail, _rows(meta, len(known)))).clamp_(-limit, limit)
        for row, sample in enumerate(samples):
            self._keep(sample, made[row])
        return made

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What is kept: "samples" int64 [S] from the one longest unseen, and "0" … "S−1", a tensor for each.

        Copies of what is held in memory; what was spilled is mapped from its file, not read, so that `memory` bounds a
        checkpoint too. The maps stay as they are while training goes on: files are replaced, never written into.
        """
        state = {"samples": torch.tensor(list(self._known), dtype=torch.int64)}
        return state | {str(i): self._store.view(sample) for i, sample in enumerate(self._known)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replaces what is kept by a `state_dict`. Raises EvenbitsError for what is not one."""
        samples = state.get("samples")
        if (
            samples is None
            or samples.dtype != torch.int64
            or {str(i) for i in range(len(samples))} | {"samples"} != set(state)
        ):
            raise EvenbitsError('the state of a delta coder is "samples" and one tensor for each, "0", "1", …')
        for sample in list(self._known):
            self._forget(sample)
        for i, sample in enumerate(samples.tolist()):
            self._keep(sample, state[str(i)])

    def _split(self, meta: Meta, samples: Sequence[int]) -> tuple[list[int], list[int]]:
        """The rows of new and of known samples."""
        if not meta.shape or len(samples) != meta.shape[0] or len(set(samples)) != len(samples):
            raise EvenbitsError(
                f"a batch of shape {list(meta.shape)} needs one identifier, different from the others, for each of its "
                f"samples; given {len(samples)}, {len(set(samples))} of them different."
            )
        for sample in samples:
            if not isinstance(sample, int):
                raise EvenbitsError(f"samples are identified by whole numbers; given {type(sample).__name__}.")
            if sample in self._known and self._known[sample].shape != meta.shape[1:]:
                raise EvenbitsError(
                    f"sample {sample} was seen with shape {list(self._known[sample].shape)} and now has "
                    f"{list(meta.shape[1:])}; a sample keeps its shape."
                )
        known = [row for row, sample in enumerate(samples) if sample in self._known]
        return [row for row in range(len(samples)) if row not in set(known)], known

    def _part_bytes(self, meta: Meta, samples: Sequence[int]) -> list[int]:
        new, known = self._split(meta, samples)
        return [
            codec.payload_bytes(_rows(meta, len(rows))) if rows else 0
            for codec, rows in ((self.first, new), (self.codec, known))
        ]

    def _kept(self, meta: Meta, samples: Sequence[int], rows: list[int], device: torch.device) -> torch.Tensor:
        return torch.stack([self._store.get(samples[row]).to(device, meta.dtype) for row in rows])

    def _keep(self, sample: int, value: torch.Tensor) -> None:
        self._known.pop(sample, None)
        self._known[sample] = Meta.of(value)
        self._store.put(sample, value if self.dtype is None else value.to(self.dtype))
        while self.capacity is not None and len(self._known) > self.capacity:
            self._forget(next(iter(self._known)))

    def _forget(self, sample: int) -> None:
        self._known.pop(sample)
        self._store.drop(sample)


def _rows(meta: Meta, count: int) -> Meta:
    return Meta((count, *meta.shape[1:]), meta.dtype)
