"""What became of the pairs of a tensor: how many hold an outlier, how many had two, what saturated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evenbits.numerics import ovp
from evenbits.numerics.elements import PairType
from evenbits.numerics.qtensor import QTensor


@dataclass(frozen=True)
class PairStatistics:
    """Shares in percent. nn: both normal; on: one outlier, kept; oo: two outliers, one of them lost; saturated: numbers
    beyond the largest outlier. kind: the alphabet ("int", "flint", …)."""

    kind: str
    nn: float
    on: float
    oo: float
    saturated: float


def pair_statistics(x: torch.Tensor, encoded: QTensor) -> PairStatistics | None:
    """Statistics of `x` as it was encoded; None if `encoded` is not made of pairs.

    An outlier is a number beyond the half-way point between the largest normal value and the smallest outlier.
    """
    element = encoded.format.dtype
    if not isinstance(element, PairType):
        return None
    granularity = encoded.format.granularity
    x_RK = granularity.matrix(x.detach()).float()
    u_RK = x_RK / granularity.spread(encoded.scales(), x_RK.shape[1])
    u_RK = torch.nn.functional.pad(u_RK, (0, encoded.stored_columns - u_RK.shape[1]))
    kind = ovp.pair_kind("int" if element.kind == "mix" else element.kind)
    beyond_P2 = u_RK.reshape(-1, 2).abs() > kind.threshold
    outliers_P = beyond_P2.sum(dim=1)
    return PairStatistics(
        kind=element.kind,
        nn=_percent(outliers_P == 0),
        on=_percent(outliers_P == 1),
        oo=_percent(outliers_P == 2),
        saturated=_percent(u_RK.abs() > kind.largest),
    )


def _percent(flags: torch.Tensor) -> float:
    return 100 * float(flags.float().mean())
