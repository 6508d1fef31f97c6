"""Unknown scale factors, one per channel of every source, and what is known of them: equal to another, or one.

A source is something whose channels can be scaled by changing parameters: the rows of a matrix layer, or a parameter
that multiplies or is added channel by channel. Every channel of a source is a variable. Adding two tensors makes their
channels' variables equal; an operation that does not commute with scaling fixes the variables it reads at one and says
why. What is left are classes of equal, free variables: the factors that may be folded.

Variable 0 is the number one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

ONE = 0
Numbers: TypeAlias = "np.ndarray[tuple[Any, ...], np.dtype[np.int64]]"


class Opaque(Exception):
    """An operation does not commute with per-channel factors as it is used here."""


@dataclass(frozen=True)
class Source:
    """`size` variables from `first` on. rows: the name is a layer's, whose output channels they are; else a
    parameter's, used as (offset + parameter)."""

    name: str
    rows: bool
    offset: float
    first: int
    size: int

    @property
    def variables(self) -> torch.Tensor:
        """The source's variables, int64 [size]."""
        return torch.arange(self.first, self.first + self.size)


class Variables:
    """Equal variables (union-find) and the reasons why classes are fixed at one. All methods take any shape."""

    def __init__(self) -> None:
        self._parent = np.zeros(1, dtype=np.int64)
        self._reason = np.zeros(1, dtype=np.int64)  # of a class's root; 0: free
        self._count = 1
        self._reasons = ["", "it is not scaled by anything that can be changed"]
        self._reason[ONE] = 1

    def new(self, size: int) -> int:
        """Makes `size` free variables; returns the first."""
        first, self._count = self._count, self._count + size
        if self._count > len(self._parent):  # twice as many as are needed: experts make tens of thousands of sources
            added = 2 * self._count - len(self._parent)
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), 2 * self._count)])
            self._reason = np.concatenate([self._reason, np.zeros(added, dtype=np.int64)])
        return first

    def __len__(self) -> int:
        return self._count

    def find(self, variables: torch.Tensor) -> torch.Tensor:
        """The representative of each variable's class."""
        return torch.from_numpy(self._find(variables.numpy()))

    def _find(self, variables: Numbers) -> Numbers:
        found: Numbers = self._parent[variables]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                self._parent[variables] = found
                return found
            found = above

    def unify(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Makes variables equal, element by element (shapes broadcast)."""
        pairs = torch.stack([part.flatten() for part in torch.broadcast_tensors(a, b)])
        left, right = torch.unique(pairs, dim=1).numpy()
        while True:
            left, right = self._find(left), self._find(right)
            open_pairs = left != right
            if not open_pairs.any():
                return
            high, low = np.maximum(left, right)[open_pairs], np.minimum(left, right)[open_pairs]
            # A high root may stand in several pairs: one of them wins now, the others are found open again.
            self._parent[high] = low
            # A reason outlives a merge: if the class that is absorbed is fixed, so is the whole.
            merged = self._reason[low] == 0
            self._reason[low[merged]] = self._reason[high[merged]]
            fixed = high[self._reason[high] > 0]
            root = self._find(fixed)
            self._reason[root] = np.where(self._reason[root] > 0, self._reason[root], self._reason[fixed])

    def fix(self, variables: torch.Tensor, reason: str) -> None:
        """Fixes the classes of these variables at one, unless they are already."""
        roots = np.unique(self._find(variables.flatten().numpy()))
        self._reasons.append(reason)
        free = roots[self._reason[roots] == 0]
        self._reason[free] = len(self._reasons) - 1

    def free(self, variables: torch.Tensor) -> torch.Tensor:
        """Whether each variable is still free (bool)."""
        return torch.from_numpy(self._reason[self._find(variables.numpy())] == 0)

    def why_fixed(self, variables: torch.Tensor) -> str:
        """Why the first fixed one of these variables is fixed, or ""."""
        reasons = self._reason[self._find(variables.flatten().numpy())]
        fixed = reasons[reasons > 0]
        # "Not scaled by anything" is the least telling reason: any other one is shown first.
        telling = fixed[fixed > 1]
        chosen = telling[0] if len(telling) else fixed[0] if len(fixed) else 0
        return self._reasons[chosen]
