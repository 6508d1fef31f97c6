"""Re-pairing: keeps outlier channels out of each other's byte.

What. In a format of pairs an outlier takes its neighbour's place. If both are outliers one of them is lost. A static
permutation of the input channels puts each outlier channel beside a quiet one; the weight's columns move along, so
nothing changes in real numbers:

    y = W x = W[:, π] x[π]

When it helps. Only where outlier channels touch; then it is worth more than any rule for which of two outliers stays.
Where none touch, nothing is moved.

How. A channel is hot if its largest activation, or the largest weight of its column, is more than `threshold` times
the median channel's. For every pair of two hot channels, one changes places with a channel of the quietest pair. All
other channels stay where they are, so groups keep their members as far as possible.

The permutation is folded into the rows of the layers that compute the input, through elementwise operations, where the
trace shows that and the proof holds; else it is an index at run time.

Left out: sorting all channels by size, which helps small groups more but tears every group apart; convolutions, whose
pairs are kernel positions (weights) and pixels (activations) of one channel, so that an order of channels parts none
but those of a 1 × 1 kernel's weight.
Source: this project; what happens to pairs of two outliers is described in the OliVe paper, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evenbits.algorithms.base import Rebalance, balance_method
from evenbits.errors import EvenbitsError


@balance_method(permutes=True)
def repair(
    act_absmax_I: torch.Tensor,
    weights_OI: Sequence[torch.Tensor],
    *,
    threshold: float = 4.0,
) -> Rebalance:
    """The permutation of one region's channels; `perm_I` is None if no two hot channels share a pair.

    act_absmax_I: [I], max |x| per channel; weights_OI: weights [O, I] of every layer that reads the tensor.
    Raises EvenbitsError for a threshold of 1 or less.
    """
    if not threshold > 1:
        raise EvenbitsError(f"re-pairing's threshold is a multiple of the median channel, above 1; given {threshold}.")
    weight_I = torch.stack([weight.detach().abs().amax(dim=0).float() for weight in weights_OI]).amax(dim=0)
    heat_I = torch.maximum(_relative(act_absmax_I.float()), _relative(weight_I))
    perm = list(range(len(heat_I)))
    even = len(perm) - len(perm) % 2
    heat_P2 = heat_I[:even].reshape(-1, 2)
    colliding = (heat_P2 > threshold).all(dim=1).nonzero().flatten().tolist()
    quiet = (heat_P2 <= threshold).all(dim=1).nonzero().flatten()
    quietest = quiet[heat_P2[quiet].sum(dim=1).argsort()].tolist()
    for pair, other in zip(colliding, quietest, strict=False):
        a, b = 2 * pair + 1, 2 * other
        perm[a], perm[b] = perm[b], perm[a]
    moved = torch.tensor(perm) if colliding and quietest else None
    return Rebalance(None, {"moved": float(2 * min(len(colliding), len(quietest)))}, moved)


def _relative(size_I: torch.Tensor) -> torch.Tensor:
    median = size_I.median()
    return size_I / (median if median > 0 else size_I.clamp(min=torch.finfo(torch.float32).tiny).max())
