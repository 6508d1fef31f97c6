"""The one step that changes the model: folds go into parameters, layers are replaced. All of it, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from evenbits.graph.folding import Fold
from evenbits.nn.replace import replace_modules


@contextmanager
def swap(
    model: nn.Module, layers: Mapping[str, nn.Module], folds: Sequence[tuple[Fold, torch.Tensor]]
) -> Iterator[None]:
    """Applies the folds and replaces the named modules, everywhere they are shared. Inside the block the model is the
    quantized one; on an error, there or before, all is taken back.
    """
    with ExitStack() as undo:
        for fold, scale_I in folds:
            undo.callback(fold.undo)
            fold.apply(scale_I, without=layers)
        undo.callback(replace_modules(model, layers))
        yield
        undo.pop_all()
