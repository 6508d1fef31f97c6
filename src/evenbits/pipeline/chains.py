"""Byte chains for those who did not ask for `fuse` by name: when to say that they are there, and `evaluate --fuse`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from evenbits.checkpoints.sources import Source
from evenbits.data.arrays import ARRAY_SUFFIXES
from evenbits.errors import EvenbitsError
from evenbits.nn.base import QuantizedLayer
from evenbits.nn.conv import QConv2d
from evenbits.nn.conv_u8 import input_grid
from evenbits.pipeline.calibration import calibration
from evenbits.pipeline.fuse import Fused, fuse

_SAMPLES = 32


def chain_notes(layers: Iterable[QuantizedLayer]) -> tuple[str, ...]:
    """That convolutions of a freshly quantized model could hand on bytes, if at least two could."""
    static = [layer for layer in layers if isinstance(layer, QConv2d) and input_grid(layer) is not None]
    if len(static) < 2:
        return ()
    slow = f"{len(static)} static convolutions quantize and convert one by one, which can be slower than float"
    how = "pipeline.fuse.fuse(model, data), or evenbits evaluate --fuse; evenbits bench times both"
    return (f"{slow}. As byte chains they may hand on bytes: {how}",)


def fused_source(source: Source, data: str, spec: str | None) -> Fused:
    """The byte chains of a loaded model.

    spec: calibration data for the ranges of added tensors, as `calibration` takes it; by default the first inputs of
    the evaluation arrays `data`. Raises EvenbitsError if there are none, or as `fuse` does.
    """
    if spec is None and Path(data).suffix not in ARRAY_SUFFIXES:
        raise EvenbitsError(
            "byte chains need a few inputs for the ranges of added tensors; pass --calibration with arrays (.npz, "
            ".safetensors) or FILE.py:batches."
        )
    given = data if spec is None else spec
    found = calibration(given, source.model, source.tokenizer, samples=_SAMPLES, batch_size=_SAMPLES)
    return fuse(source.model, found.batches)
