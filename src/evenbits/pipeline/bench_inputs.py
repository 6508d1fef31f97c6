"""What a benchmark feeds a model: a file's first batch, or synthetic tokens or pictures of a given shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from evenbits.checkpoints.sources import Source
from evenbits.errors import EvenbitsError
from evenbits.evaluation.latency import is_causal
from evenbits.pipeline.calibration import calibration

_TOKENS = 128


@dataclass(frozen=True)
class Inputs:
    """data: as for calibration, or None; tokens: per sequence; image: (channels, height, width)."""

    data: str | None = None
    tokens: int | None = None
    image: tuple[int, ...] | None = None

    @staticmethod
    def parse(data: str | None, tokens: int | None, image: str | None) -> Inputs:
        """Raises EvenbitsError for an image size that is not like 3x224x224, and for pictures and tokens together."""
        if image is not None and tokens is not None:
            raise EvenbitsError("a model takes tokens or an image; give one of the two.")
        sizes: tuple[int, ...] | None = None
        if image is not None:
            parts = image.lower().split("x")
            if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
                raise EvenbitsError(f"an image is CHANNELSxHEIGHTxWIDTH, such as 3x224x224; given {image!r}.")
            sizes = tuple(int(part) for part in parts)
        return Inputs(data, tokens, sizes)

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `Inputs(**data)` is made again."""
        return asdict(self)

    def batch(self, source: Source, size: int) -> Any:
        """A batch of `size`. Raises EvenbitsError if it is not known what the model takes."""
        if self.data is not None:
            length = self.tokens or _TOKENS
            opened = calibration(
                self.data, source.model, source.tokenizer, samples=size, length=length, batch_size=size
            )
            first = next(iter(opened.batches), None)
            if first is None:
                raise EvenbitsError(f"{self.data} holds no batch.")
            return dict(first) if isinstance(first, Mapping) else first
        generator = torch.Generator().manual_seed(0)
        if self.image is not None:
            return torch.randn(size, *self.image, generator=generator)
        return self._ids(source, size, generator)

    def _ids(self, source: Source, size: int, generator: torch.Generator) -> Any:
        config = getattr(source.model, "config", None)
        vocabulary = getattr(config, "vocab_size", None)
        if not isinstance(vocabulary, int):
            raise EvenbitsError(
                "what this model takes is not known (it has no config with a vocabulary): give --image 3x224x224 for "
                "pictures, or --data with arrays or FILE.py:batches."
            )
        length = self.tokens or _TOKENS
        context = getattr(config, "max_position_embeddings", None)
        room = context - is_causal(source.model) if isinstance(context, int) and context > 0 else length
        if length > room:
            raise EvenbitsError(f"the model's context holds {context} tokens; {length} are too many (--tokens {room}).")
        return {"input_ids": torch.randint(vocabulary, (size, length), generator=generator)}


def items(batch: Any) -> tuple[int, str]:
    """How many items a batch has and what they are: tokens, or samples."""
    first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch
    first = first[0] if isinstance(first, (tuple, list)) else first
    if not first.is_floating_point() and first.ndim == 2:
        return first.numel(), "tokens"
    return len(first), "samples"
