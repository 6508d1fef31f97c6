"""BatchNorm goes into the layer before it, before anything else looks at that layer's weight or output.

A quantizer behind an unfolded norm would see another range than the one that is deployed, and every norm between two
layers is a pass over memory that integers do not need. What may be folded is seen in one traced forward and compared on
the first few batches; on any error afterwards the norms come back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from evenbits.errors import EvenbitsError
from evenbits.graph.batchnorm import fold_norms, norms_after_layers
from evenbits.graph.folding import float_outputs, outputs_equal
from evenbits.graph.trace import trace
from evenbits.nn.unfuse import BATCH_NORMS
from evenbits.pipeline.batches import REFUSALS, Batches
from evenbits.pipeline.plan import plan_layers
from evenbits.schemes.scheme import Scheme

_ROUNDING = {torch.float16: 2e-2, torch.bfloat16: 1e-1}


@contextmanager
def folded_norms(
    model: nn.Module, scheme: Scheme, batches: Batches | None, *, keep: bool = True
) -> Iterator[tuple[str, ...]]:
    """Inside the block norms of `model` are folded where that is proved; with `keep` afterwards, too. Yields what to
    know about it.

    The model must be in evaluation mode. Without batches nothing is folded, and a note says so. On an error all is
    taken back.
    """
    if not any(type(module) in BATCH_NORMS for module in model.modules()):
        yield ()
        return
    if batches is None:
        yield ("BatchNorm was not folded: which layer it follows is seen on data, and there is none",)
        return
    layouts = {p.name: p.layout for p in plan_layers(model, scheme) if p.layout is not None and not p.reason}
    references = _outputs(batches)
    if references is None:  # the calibration names the batch that the model cannot take
        yield ()
        return
    pairs = norms_after_layers(model, trace(model, batches.runs()[0], layouts))
    undo = fold_norms(model, pairs, layouts)
    try:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        limit = _ROUNDING.get(dtype, 1e-3)
        found = _outputs(batches) or []
        equal = len(found) == len(references) and all(
            outputs_equal(a, b, limit) for a, b in zip(references, found, strict=True)
        )
        if equal:
            yield (f"BatchNorm folded into the layer before it: {len(pairs)}",) if pairs else ()
    except BaseException:
        undo()
        raise
    if not equal or not keep:
        undo()
    if not equal:
        yield ("BatchNorm was not folded: the output changed when it was tried",)


def _outputs(batches: Batches) -> list[list[torch.Tensor]] | None:
    """What the model returns for the kept batches; None if it refuses one."""
    try:
        return [float_outputs(run()) for run in batches.runs()]
    except (*REFUSALS, EvenbitsError):
        return None
