"""By format: every layer by the method that its own format needs.

A scheme may give layers different formats, and methods are not made for all of them: `olive` writes pairs, `ant` makes
a choice of types, `rtn` rounds to everything else. This one looks at the format and hands the layer on. It decides
nothing itself: with one format everywhere the result is, bit for bit, that of the method it stands for.
"""

from __future__ import annotations

import torch

from evenbits import algorithms
from evenbits.algorithms.base import LayerStats, weight_method
from evenbits.numerics.elements import PairType, TypeChoice
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor


def weight_method_of(fmt: Format) -> str:
    """The weight method that suits a format: olive for pairs, ant for a choice of types, else rtn."""
    if isinstance(fmt.dtype, PairType):
        return "olive"
    return "ant" if isinstance(fmt.dtype, TypeChoice) else "rtn"


@weight_method(uses=frozenset({"second_moment"}))
def by_format(
    weight_OI: torch.Tensor,
    fmt: Format,
    stats: LayerStats | None = None,
    *,
    policy: str | None = None,
    weighted: bool = True,
) -> QTensor:
    """Weight [O, I] → QTensor in `fmt`. policy, weighted: as in `olive`, for layers of pairs; others do not have them.

    Raises EvenbitsError as the method does that it hands the layer to.
    """
    name = weight_method_of(fmt)
    options = {"policy": policy, "weighted": weighted} if name == "olive" else {}
    quantized: QTensor = algorithms.get(name)(weight_OI, fmt, stats, **options)
    return quantized
