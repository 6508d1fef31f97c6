"""ANT: adaptive numerical types. Each tensor takes the 4-bit type that fits its distribution.

What. Uniform weights are served best by integers, heavy tails by powers of two, and most real tensors by something in
between: flint, whose small values are exact integers and whose large ones are powers of two, in the same number of
bits. For every tensor the candidates int, power-of-two and flint are tried, each with its best scale, and the one with
the least squared error is kept (numerics/codebook.py derives the tables).

    type(X) = argmin over types T of Σ_groups min over s ‖X − s · nearest_T(X / s)‖²

When it helps. Against plain int4 with one scale per row. Small groups take most of the advantage away, and outliers
beyond 16 times the bulk are out of reach for every 4-bit table; pairs (OliVe) are for those.

Left out: quantization-aware training, which the paper's main results use, and the float type, which at 4 bits equals
power-of-two. Types are chosen per tensor, as in the paper.

Source: C. Guo et al., "ANT: Exploiting Adaptive Numerical Data Type for Low-bit Deep Neural Network Quantization",
MICRO 2022, sections IV and V.
"""

from __future__ import annotations

import torch

from evenbits.algorithms.base import LayerStats, weight_method
from evenbits.errors import EvenbitsError
from evenbits.numerics.elements import TypeChoice
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor


@weight_method()
def ant(weight_OI: torch.Tensor, fmt: Format, stats: LayerStats | None = None) -> QTensor:
    """Weight [O, I] → QTensor whose format names the type that was chosen, such as "flint4:row".

    Raises EvenbitsError if `fmt` leaves no choice (it must be an "antN" format).
    """
    if not isinstance(fmt.dtype, TypeChoice):
        raise EvenbitsError(f"method 'ant' chooses among types, such as 'ant4:row'; the scheme says {fmt}.")
    return encode(weight_OI, fmt)
