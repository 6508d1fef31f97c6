"""RTN: round to nearest. The baseline of every table.

Each weight is divided by the scale of its group and rounded; nothing is calibrated and nothing compensates for the
error. The scale follows from the format (`int8:row` spans the row's absmax, `int4:g128:mse` the range of least squared
error). Whatever a cleverer method claims is measured against this.
"""

from __future__ import annotations

import torch

from evenbits.algorithms.base import LayerStats, weight_method
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor


@weight_method()
def rtn(weight_OI: torch.Tensor, fmt: Format, stats: LayerStats | None = None) -> QTensor:
    """Weight [O, I] (any float type) → QTensor in `fmt`. Raises EvenbitsError for NaN or infinite weights."""
    return encode(weight_OI, fmt)
