"""Granularity: which numbers share one scale.

Every granularity views a tensor as a matrix `x_RK` (R rows, K columns) and gives a scale per row, per group of `g`
neighbouring columns of a row, or one for all.

| spelled  | matrix view                  | scale shape | example                                                    |
|----------|------------------------------|-------------|------------------------------------------------------------|
| `tensor` | all but the last × last      | [1]         | one scale for a whole activation                           |
| `row`    | all but the last × last      | [R, 1]      | weight [O, I]: per output; activation [N, T, I]: per token |
| `g128`   | all but the last × last      | [R, ⌈K/g⌉]  | a last group that does not fill g is shorter               |
| `axis1`  | dimension 1 × all the others | [R, 1]      | one scale per index of any dimension                       |

`channel` and `token` are accepted and stored as `row`. R: rows, K: columns, G: groups, g: group size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from evenbits.errors import EvenbitsError

_GROUP = re.compile(r"g([1-9][0-9]{0,8})")
_AXIS = re.compile(r"axis(-?[0-9]{1,3})")


@dataclass(frozen=True)
class Granularity:
    """Which numbers share a scale. `size` is the group size (`group`) or the dimension (`axis`), else 0."""

    kind: Literal["tensor", "row", "group", "axis"]
    size: int = 0

    def __str__(self) -> str:
        return {"group": f"g{self.size}", "axis": f"axis{self.size}"}.get(self.kind, self.kind)

    @staticmethod
    def parse(text: str) -> Granularity:
        """`"row"`, `"tensor"`, `"g128"`, `"axis1"`. Raises EvenbitsError for anything else."""
        if text in ("row", "channel", "token"):
            return Granularity("row")
        if text == "tensor":
            return Granularity("tensor")
        if match := _GROUP.fullmatch(text):
            return Granularity("group", int(match[1]))
        if match := _AXIS.fullmatch(text):
            return Granularity("axis", int(match[1]))
        raise EvenbitsError(
            f"unknown granularity {text!r}. Allowed: tensor, row (also: channel, token), gN with N >= 1 (g128), axisN."
        )

    def fitted(self, shape: tuple[int, ...]) -> Granularity:
        """This granularity as it applies to `shape`: a group wider than the row becomes the row's width (recorded)."""
        if self.kind == "group" and shape:
            return Granularity("group", min(self.size, shape[-1]))
        if self.kind == "axis":
            if not -len(shape) <= self.size < len(shape):
                raise EvenbitsError(f"{self} does not exist in a tensor of shape {list(shape)}; dimensions start at 0.")
            return Granularity("axis", self.size % len(shape))
        return self

    def matrix(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (any shape) → its matrix view [R, K] (a view where memory allows, else a copy)."""
        if self.kind == "axis":
            return x.movedim(self.size, 0).reshape(x.shape[self.size], -1)
        return x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)

    def unmatrix(self, x_RK: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The inverse of `matrix`: [R, K] → `shape`."""
        if self.kind != "axis":
            return x_RK.reshape(shape)
        rest = shape[: self.size] + shape[self.size + 1 :]
        return x_RK.reshape(shape[self.size], *rest).movedim(0, self.size)

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(R, K) of the matrix view of `shape`."""
        columns = prod(shape) // shape[self.size] if self.kind == "axis" else (shape[-1] if shape else 1)
        return prod(shape) // columns, columns

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of `shape`."""
        rows, columns = self.matrix_shape(shape)
        if self.kind == "tensor":
            return (1,)
        return (rows, -(-columns // self.size)) if self.kind == "group" else (rows, 1)

    def blocks(self, x_RK: torch.Tensor) -> list[torch.Tensor]:
        """Cuts a matrix into blocks [R', G', g'] whose last dimension shares one scale (two blocks if the last group is
        shorter; else one)."""
        rows, columns = x_RK.shape
        if self.kind == "tensor":
            return [x_RK.reshape(1, 1, -1)]
        if self.kind != "group":
            return [x_RK.reshape(rows, 1, columns)]
        whole = columns // self.size * self.size
        parts = [x_RK[:, :whole].reshape(rows, -1, self.size)] if whole else []
        return [*parts, x_RK[:, whole:].reshape(rows, 1, -1)] if whole < columns else parts

    def spread(self, scale: torch.Tensor, columns: int) -> torch.Tensor:
        """Scales as stored → a tensor that broadcasts against the matrix view [R, columns]."""
        if self.kind == "group":
            return scale.repeat_interleave(self.size, dim=1)[:, :columns]
        return scale.reshape(1, 1) if self.kind == "tensor" else scale
