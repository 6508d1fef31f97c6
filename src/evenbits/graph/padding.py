"""Channels of zeros: 0 · s = 0, so they carry whatever factor they meet (ResNet's shortcut without parameters).

Each gets a variable of its own, which belongs to no source: nothing has to be divided, and adding another tensor
makes it equal to that tensor's factor.
"""

from __future__ import annotations

from typing import Any

import torch

from evenbits.graph.variables import ONE, Opaque


def padded(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> torch.Tensor | None:
    """Padding with zeros, also with negative lengths, which cut. Raises Opaque for any other number."""
    labels = look.labels(args[0])
    if labels is None:
        return None
    if args[2] if len(args) > 2 else kwargs.get("value", 0):
        raise Opaque
    given = list(args[1])
    lengths = [[0, 0] for _ in range(labels.ndim)]
    for i in range(len(given) // 2):  # from the last dimension on
        if labels.shape[-1 - i] > 1:
            lengths[i] = given[2 * i : 2 * i + 2]
    found: torch.Tensor = torch.constant_pad_nd(labels, [length for pair in lengths for length in pair], -1)
    new = found == -1
    count = int(new.sum())
    found[new] = look.variables.new(count) + torch.arange(count)
    return found


def joined_with_zeros(look: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """The labels of a concatenation along the dimension of which factors vary, if some parts are zeros; else None."""
    parts = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    labels = [look.labels(part) if look.labels(part) is not None else look.parameter(part) for part in parts]
    others = [label for label in labels if label is not None]
    if not others or not any(look.is_zeros(part) for part in parts):
        return None
    along = dim % others[0].ndim
    if any(size > 1 for label in others for at, size in enumerate(label.shape) if at != along):
        return None
    found = []
    for part, label in zip(parts, labels, strict=True):
        size = part.shape[along]
        if label is None and look.is_zeros(part):
            label = look.variables.new(size) + torch.arange(size)
        elif label is None:
            label = torch.full((size,), ONE)
        found.append(label.flatten().expand(size))
    shape = [1] * others[0].ndim
    shape[along] = -1
    return torch.cat(found).view(shape)
