"""OliVe: outlier-victim pairs, four bits that still reach outliers.

What. Outliers are few (about one number in a hundred) but stretch a quantizer's range until everyone else has two or
three codes. OliVe gives an outlier its neighbour's place: the pair is written as an outlier code and an identifier that
marks the neighbour as zero. Numbers stay 4 bits, bytes stay aligned, and the scale serves the many (numerics/ovp.py has
the alphabet, docs/ovp-format.md the bytes).

    cost of a pair     normal   Σ h (clip(u) − u)²
                       outlier  h_o (abfloat(u_o) − u_o)² + h_v u_v²

When it helps. Weights or activations with isolated outliers, and scales shared by many numbers (per row, per tensor).
With small groups and an E4M3 scale it beats MXFP4 at equal bits on everything measured here. Where weights are nearly
Gaussian
and groups are 128 wide, plain int4 with a good scale is as good: let the advisor choose.

Ours differs from the paper and its released code in three places: the pair is the one of least squared error instead of
the larger (paper) or the even (code) outlier; the error is weighted by the mean square h of the input channel if
calibration data is at hand (`weighted`); and the scale is searched over everything, not only around three standard
deviations. `policy="paper"` or "reference" and the format option `3sigma` give theirs.

Left out: 4-bit arithmetic on the pairs themselves; that needs the paper's hardware. Products run on decoded values.

Source: C. Guo et al., "OliVe: Accelerating Large Language Models via Hardware-friendly Outlier-Victim Pair
Quantization", ISCA 2023.
"""

from __future__ import annotations

import torch

from evenbits.algorithms.base import LayerStats, weight_method
from evenbits.errors import EvenbitsError
from evenbits.numerics.elements import PairType
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor


@weight_method(uses=frozenset({"second_moment"}))
def olive(
    weight_OI: torch.Tensor,
    fmt: Format,
    stats: LayerStats | None = None,
    *,
    policy: str | None = None,
    weighted: bool = True,
) -> QTensor:
    """Weight [O, I] → pairs in `fmt` ("ovp4:row", "ovp4:g32", …).

    policy: "optimal", "paper" or "reference"; by default the format's. weighted: weigh errors by the input's mean
    square (optimal policy, and only if `stats` has it). Raises EvenbitsError if `fmt` is not a format of pairs.
    """
    if not isinstance(fmt.dtype, PairType):
        raise EvenbitsError(f"method 'olive' writes outlier-victim pairs, such as 'ovp4:row'; the scheme says {fmt}.")
    importance_I = stats.second_moment_I if stats is not None and weighted else None
    if importance_I is not None and not bool(importance_I.any()):
        importance_I = None  # an input of nothing but zeros would make every rounding as good as any other
    return encode(weight_OI, fmt, policy=policy, importance=importance_I)
