"""A model as named parts, cut into stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from evenbits.errors import EvenbitsError, unknown_name


class Chain(nn.Module):
    """Parts in a row; a part that returns a tuple hands its members to the next one as arguments."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, *given: Tensor) -> Any:
        """What the last part returns."""
        passed: Any = given
        for part in self.parts.values():
            passed = part(*passed) if isinstance(passed, tuple) else part(passed)
        return passed


def stages(parts: Mapping[str, nn.Module], cuts: Sequence[str]) -> list[dict[str, nn.Module]]:
    """The parts of each stage: one more than there are cuts, each cut after the part of that name.

    Raises EvenbitsError for a cut after no part or after the last one, and for cuts out of order.
    """
    names = list(parts)
    for cut in cuts:
        if cut not in names[:-1]:
            raise unknown_name("part to cut after:", cut, names[:-1])
    ends = [names.index(cut) + 1 for cut in cuts]
    if ends != sorted(set(ends)):
        raise EvenbitsError(f"cuts come in the order of the parts, each once; given {', '.join(cuts)}.")
    bounds = [0, *ends, len(names)]
    return [{name: parts[name] for name in names[a:b]} for a, b in pairwise(bounds)]


@torch.no_grad()
def boundaries(chains: Sequence[Chain], given: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """What enters the first stage, what passes each cut and what leaves the last one, for inputs like `given`: zeros of
    the right shapes; floating-point ones require gradients, except the first stage's. BatchNorm learns nothing.
    """
    found, passed = [], given
    for chain in chains:
        found.append(passed)
        mode = chain.training
        made = chain.eval()(*passed)
        chain.train(mode)
        passed = made if isinstance(made, tuple) else (made,)
    found.append(passed)
    shapes = [tuple(torch.zeros_like(x) for x in tensors) for tensors in found]
    for tensors in shapes[1:]:
        for x in tensors:
            x.requires_grad_(x.is_floating_point())
    return shapes
