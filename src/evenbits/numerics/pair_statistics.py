"""What became of the pairs of a tensor: how many hold an outlier, how many had two, what saturated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evenbits.numerics import ovp
from evenbits.numerics.elements import PairType
from evenbits.numerics.packing import unpack_bits
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

    An outlier is a number beyond the half-way point between the largest normal value and the smallest outlier. The zero
    that pads an odd row makes a pair whole and is not counted as a number.
    """
    element = encoded.format.dtype
    if not isinstance(element, PairType):
        return None
    granularity = encoded.format.granularity
    x_RK = granularity.matrix(x.detach()).float()
    u_RK = (x_RK / granularity.spread(encoded.scales(), x_RK.shape[1])).abs()
    threshold, largest = _limits(encoded, element, x_RK.shape[1])
    beyond_RK = torch.nn.functional.pad(u_RK > threshold, (0, encoded.stored_columns - u_RK.shape[1]))
    outliers_P = beyond_RK.reshape(-1, 2).sum(dim=1)
    return PairStatistics(
        kind=element.kind,
        nn=_percent(outliers_P == 0),
        on=_percent(outliers_P == 1),
        oo=_percent(outliers_P == 2),
        saturated=_percent(u_RK > largest),
    )


def _limits(encoded: QTensor, element: PairType, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where outliers begin and where they saturate, broadcasting against [R, columns] (mix: of each group's kind)."""
    kinds = [ovp.pair_kind(name) for name in (element.choices if encoded.kinds is not None else (element.kind,))]
    index_RK = torch.zeros(1, 1, dtype=torch.int64, device=encoded.packed.device)
    if encoded.kinds is not None:
        bits_RG = unpack_bits(encoded.kinds)[:, : encoded.scale.shape[1]]
        index_RK = encoded.format.granularity.spread(bits_RG, columns).long()
    tables = [[kind.threshold for kind in kinds], [kind.largest for kind in kinds]]
    threshold, largest = (torch.tensor(table, dtype=torch.float32, device=index_RK.device) for table in tables)
    return threshold[index_RK], largest[index_RK]


def _percent(flags: torch.Tensor) -> float:
    return 100 * float(flags.float().mean())
