"""Rows that are encoded each by itself: what dynamic activations become.

A token must not see its neighbours: not another sentence of the batch, not the padding, not what comes after it. So
whatever `encode` takes from the whole tensor (the factor of E4M3 and float16 scales, the kind of pairs, ANT's type) is
taken from the row alone here, and row i of the result is `encode(x[i:i + 1], fmt).dequantize()`, bit for bit.

R: rows (tokens; of a convolution: images), K: columns.
"""

from __future__ import annotations

import torch

from evenbits.numerics import elements, scales
from evenbits.numerics.affine import from_codes, to_codes
from evenbits.numerics.elements import PairType
from evenbits.numerics.encode import Solved, affine_params, encode, solve
from evenbits.numerics.format import Format
from evenbits.numerics.qdtypes import QDtype


def round_rows(x_RK: torch.Tensor, fmt: Format) -> torch.Tensor:
    """x float32 [R, K], finite → what encoding and decoding every row alone makes of it, float32 [R, K].

    One scale per tensor is one for all rows, as the format says. Raises EvenbitsError as `encode` does.
    """
    if fmt.granularity.kind == "tensor":
        return encode(x_RK, fmt).dequantize()
    fmt, columns = fmt.fitted(tuple(x_RK.shape)), x_RK.shape[1]
    spread = fmt.granularity.spread
    if not fmt.rule.symmetric:
        stored, factor, zero = affine_params(x_RK, fmt, by_row=True)
        scale, zero = spread(scales.real(stored, factor), columns), spread(zero, columns)
        return from_codes(to_codes(x_RK, scale, zero, fmt), scale, zero)
    padded_RK = torch.nn.functional.pad(x_RK, (0, fmt.stored_columns(columns) - columns))
    tried = solve(padded_RK, fmt, fmt.rule.policy, None, by_row=True)
    if len(tried) == 1:
        return _decoded(padded_RK, tried[0], slice(None))[:, :columns]
    best_R = torch.stack([solved.error.sum(dim=1) for solved in tried]).argmin(dim=0)
    found_RK = torch.empty_like(padded_RK)
    for index, solved in enumerate(tried):
        rows = (best_R == index).nonzero().squeeze(1)
        if len(rows):
            found_RK[rows] = _decoded(padded_RK[rows], solved, rows)
    return found_RK[:, :columns]


def row_values(x_RK: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """x float32 [R, K], finite → (values of the type [R, K], scale float32 [R, 1]), of symmetric tables with a scale a
    row: the two factors of `round_rows`."""
    solved = solve(x_RK, fmt, fmt.rule.policy, None, by_row=True)[0]
    scale_R1 = scales.real(solved.scale, solved.factor)
    return elements.snap((x_RK / scale_R1).float(), fmt.dtype) + 0.0, scale_R1


def _decoded(x_RK: torch.Tensor, solved: Solved, rows: slice | torch.Tensor) -> torch.Tensor:
    """The rows x as they are decoded; `rows` says which of `solved` they are."""
    fmt, columns = solved.fmt, x_RK.shape[1]
    spread = fmt.granularity.spread
    scale = spread(scales.real(solved.scale, solved.factor)[rows], columns)
    if isinstance(fmt.dtype, QDtype):
        return from_codes(to_codes(x_RK, scale, None, fmt), scale, None)
    u_RK = (x_RK / scale).float()
    if solved.kinds is None:
        values_RK = elements.snap(u_RK, fmt.dtype, fmt.rule.policy)
    else:
        assert isinstance(fmt.dtype, PairType)
        plain, flint = (elements.snap(u_RK, fmt.dtype.with_kind(k), fmt.rule.policy) for k in fmt.dtype.choices)
        values_RK = torch.where(spread(solved.kinds, columns), flint, plain)
    return from_codes(values_RK + 0.0, scale, None)  # no minus zero: bytes have none
