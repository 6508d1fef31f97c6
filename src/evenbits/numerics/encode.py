"""`encode`: a tensor to a number format.

Symmetric formats of every element type take one road: a scale for each group (spanning the range, a percentile, or the
one of least squared error), rounded to how scales are stored, then every number snapped to a value of the type. Types
that are a choice (`ant4`, `ovp4`) try their members on the whole tensor, or on each group (`ovp4-mix`), and keep the
one with the least squared error. Affine formats are integers with a zero point (numerics/affine.py).

R: rows, K: columns, G: groups, g: group size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from evenbits.errors import EvenbitsError
from evenbits.numerics import elements, scales
from evenbits.numerics.affine import qparams, symmetric_scale, to_codes, zero_points
from evenbits.numerics.blocks import Block
from evenbits.numerics.elements import PairType, TypeChoice
from evenbits.numerics.format import Format
from evenbits.numerics.packing import pack, pack_bits
from evenbits.numerics.qdtypes import QDtype
from evenbits.numerics.qtensor import QTensor
from evenbits.numerics.ranges import find_range
from evenbits.numerics.search import round_scale, search_released, search_scale

_SLICE = 1 << 14  # elements packed at once
_ENCODABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def encode(
    x: torch.Tensor, fmt: str | Format, *, policy: str | None = None, importance: torch.Tensor | None = None
) -> QTensor:
    """Quantizes `x` (any shape with at least one element; float16, bfloat16, float32 or float64) to a number format.

    fmt: a Format or its spelling, such as "int8:row", "int4:g128", "uint8:tensor:affine", "ovp4:g32", "nf4:g64".
    policy: of outlier-victim pairs: "optimal", "paper" or "reference" (numerics/ovp.py); by default the format's.
    importance: weights of the squared error per column, float [K] (such as mean x² of each input channel); used by
        searched scales and by optimal pairs.

    Computed in float32 (float64 for float64 input). Raises EvenbitsError for a tensor that is not float, empty or not
    finite, an unknown format or policy, and negative values in an unsigned format.
    """
    fmt = Format.parse(fmt)
    fmt = fmt if policy is None else fmt.with_policy(policy)
    policy = fmt.rule.policy
    _check_encodable(x)
    shape = tuple(x.shape)
    fmt = fmt.fitted(shape)
    x_RK = fmt.granularity.matrix(x.detach())
    x_RK = x_RK if x_RK.dtype == torch.float64 else x_RK.float()
    if not fmt.rule.symmetric:
        return _affine(x_RK, fmt, shape, x.dtype)
    padding = fmt.stored_columns(x_RK.shape[1]) - x_RK.shape[1]
    importance = _checked_importance(importance, x_RK, padding, fmt)
    x_RK = torch.nn.functional.pad(x_RK, (0, padding)) if padding else x_RK
    tried = solve(x_RK, fmt, policy, importance)
    solved = min(tried, key=lambda solved: float(solved.error.sum()))
    packed = _packed(x_RK, solved, policy, importance)
    kinds = None if solved.kinds is None else pack_bits(solved.kinds)
    return QTensor(packed, solved.scale, None, solved.fmt, shape, x.dtype, solved.factor, kinds)


@dataclass(frozen=True)
class Solved:
    """Stored scales of a matrix, their factor, the squared error of each group, and which groups of a mix are flint."""

    fmt: Format
    scale: torch.Tensor
    factor: torch.Tensor | None
    error: torch.Tensor
    kinds: torch.Tensor | None = None


def solve(
    x_RK: torch.Tensor, fmt: Format, policy: str, importance: torch.Tensor | None, *, by_row: bool = False
) -> list[Solved]:
    """Scales for each type that a choice leaves open (of a mix: for each group's better one, so one entry).

    by_row: each row of x [R, K] as if it were alone, with a factor of its own.
    """
    element = fmt.dtype
    if isinstance(element, TypeChoice):
        members = [replace(fmt, dtype=member) for member in element.choices]
    elif isinstance(element, PairType) and len(element.choices) > 1:
        members = [replace(fmt, dtype=element.with_kind(kind)) for kind in element.choices]
    else:
        members = [fmt]
    blocks = _blocks(x_RK, fmt, importance)
    used = torch.cat([block.absmax() for block in blocks], dim=1) != 0
    raws = [torch.cat([_raw_scale(block, member, policy) for block in blocks], dim=1).float() for member in members]
    if isinstance(element, PairType) and element.kind == "mix":
        # One factor for both kinds, from the start: a scale that is rounded twice is not the one that was chosen.
        factor = scales.factor_for(torch.maximum(*raws), fmt.storage, used, by_row=by_row)
        plain, flint = (
            _rounded(blocks, raw, member, policy, factor) for raw, member in zip(raws, members, strict=True)
        )
        return [_mixed(fmt, plain, flint)]
    return [
        _rounded(blocks, raw, member, policy, scales.factor_for(raw, member.storage, used, by_row=by_row))
        for raw, member in zip(raws, members, strict=True)
    ]


def _mixed(fmt: Format, plain: Solved, flint: Solved) -> Solved:
    """Each group takes the kind with the smaller error; both have the same factor."""
    is_flint = flint.error < plain.error
    real = torch.where(is_flint, scales.real(flint.scale, flint.factor), scales.real(plain.scale, plain.factor))
    error = torch.minimum(flint.error, plain.error)
    return Solved(fmt, scales.store(real, fmt.storage, plain.factor), plain.factor, error, is_flint)


def _rounded(blocks: list[Block], raw: torch.Tensor, fmt: Format, policy: str, factor: torch.Tensor | None) -> Solved:
    """Scales [R, G] → as stored relative to the factor, and the errors under them."""
    stored, errors, column = [], [], 0
    for block in blocks:
        part = raw[:, column : column + block.x_RGg.shape[1]]
        column += part.shape[1]
        if fmt.rule.range == "mse":
            scale, error = round_scale(block, part, fmt, policy, factor)
        else:
            scale = scales.store(part, fmt.storage, factor)
            error = block.error(scales.real(scale, factor), fmt, policy)
        stored.append(scale)
        errors.append(error)
    # float8 cannot be concatenated everywhere; bytes can.
    scale = torch.cat([part.view(torch.uint8) for part in stored], dim=1).view(stored[0].dtype)
    scale = scale.reshape(1) if fmt.granularity.kind == "tensor" else scale
    return Solved(fmt, scale, factor, torch.cat(errors, dim=1))


def _raw_scale(block: Block, fmt: Format, policy: str) -> torch.Tensor:
    if fmt.rule.range == "mse":
        if not fmt.dtype.signed:
            symmetric_scale(block.x_RGg.amin().reshape(1), block.x_RGg.amax().reshape(1), fmt)  # refuses negatives
        return search_scale(block, fmt, policy)[0]
    if fmt.rule.range == "3sigma":
        return search_released(block, fmt, policy)
    flat = block.x_RGg.reshape(1, 1, -1) if block.shared else block.x_RGg
    return symmetric_scale(*find_range(flat, fmt), fmt)


def _blocks(x_RK: torch.Tensor, fmt: Format, importance: torch.Tensor | None) -> list[Block]:
    if fmt.granularity.kind != "group":
        weights = None if importance is None else importance.reshape(1, -1)
        return [Block(x_RK.unsqueeze(1), fmt.granularity.kind == "tensor", weights)]
    found, column = [], 0
    for part in fmt.granularity.blocks(x_RK):
        width = part.shape[1] * part.shape[2]
        weights = None if importance is None else importance[column : column + width].reshape(part.shape[1:])
        found.append(Block(part, False, weights))
        column += width
    return found


def _packed(x_RK: torch.Tensor, solved: Solved, policy: str, importance: torch.Tensor | None) -> torch.Tensor:
    """The bytes of the whole matrix, a slice of rows at a time: what is needed beside it stays small."""
    step = max(1, _SLICE // x_RK.shape[1])
    real = scales.real(solved.scale, solved.factor)
    parts = []
    for start in range(0, len(x_RK), step):
        rows = slice(start, start + step)
        scale = real if solved.fmt.granularity.kind == "tensor" else real[rows]
        kinds = None if solved.kinds is None else solved.kinds[rows]
        parts.append(_packed_rows(x_RK[rows], solved.fmt, scale, kinds, policy, importance))
    return torch.cat(parts)


def _packed_rows(
    x_RK: torch.Tensor,
    fmt: Format,
    scale: torch.Tensor,
    kinds: torch.Tensor | None,
    policy: str,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    scale = fmt.granularity.spread(scale, x_RK.shape[1])
    if isinstance(fmt.dtype, QDtype):
        return pack(to_codes(x_RK, scale, None, fmt), fmt.dtype.bits)
    u_RK = (x_RK / scale).float()
    if kinds is None:
        return elements.pack_values(elements.snap(u_RK, fmt.dtype, policy, importance), fmt.dtype)
    assert isinstance(fmt.dtype, PairType)
    plain, flint = (
        elements.pack_values(elements.snap(u_RK, member, policy, importance), member)
        for member in (fmt.dtype.with_kind(kind) for kind in fmt.dtype.choices)
    )
    # Groups have an even size, so a byte belongs to one group.
    return torch.where(fmt.granularity.spread(kinds, x_RK.shape[1])[:, ::2], flint, plain)


def affine_params(
    x_RK: torch.Tensor, fmt: Format, *, by_row: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Of an affine format: scales as stored, their factor, and zero points int32. by_row: as in `solve`."""
    ranges = [find_range(block, fmt) for block in fmt.granularity.blocks(x_RK)]
    lo, hi = (torch.cat([pair[i] for pair in ranges], dim=1) for i in (0, 1))
    if fmt.granularity.kind == "tensor":
        lo, hi = lo.reshape(1), hi.reshape(1)
    exact, _ = qparams(lo, hi, fmt)
    factor = scales.factor_for(exact, fmt.storage, (lo != 0) | (hi != 0), by_row=by_row)
    scale = scales.store(exact, fmt.storage, factor)
    return scale, factor, zero_points(lo, scales.real(scale, factor), fmt)


def _affine(x_RK: torch.Tensor, fmt: Format, shape: tuple[int, ...], dtype: torch.dtype) -> QTensor:
    scale, factor, zero_point = affine_params(x_RK, fmt)
    spread, columns = fmt.granularity.spread, x_RK.shape[1]
    codes_RK = to_codes(x_RK, spread(scales.real(scale, factor), columns), spread(zero_point, columns), fmt)
    stored_zero = zero_point.to(fmt.integer.storage) if fmt.rule.zero_exact else zero_point
    return QTensor(pack(codes_RK, fmt.dtype.bits), scale, stored_zero, fmt, shape, dtype, factor)


def _checked_importance(
    importance: torch.Tensor | None, x_RK: torch.Tensor, padding: int, fmt: Format
) -> torch.Tensor | None:
    if importance is None:
        return None
    columns = x_RK.shape[1]
    fits = importance.is_floating_point() and tuple(importance.shape) == (columns,) and fmt.granularity.kind != "axis"
    if not fits or not bool((importance.isfinite() & (importance >= 0)).all()):
        raise EvenbitsError(
            f"importance must be {columns} finite weights, not negative, one for each column; given {importance.dtype} "
            f"{list(importance.shape)}."
        )
    return torch.nn.functional.pad(importance.detach().to(x_RK.device, torch.float32), (0, padding))


def _check_encodable(x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in _ENCODABLE:
        given = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise EvenbitsError(
            f"only float16, bfloat16, float32 and float64 tensors can be encoded; given {given}. Convert it with "
            ".float() first."
        )
    if x.numel() == 0:
        raise EvenbitsError(f"a tensor without elements cannot be encoded; given shape {list(x.shape)}.")
    lowest, highest = torch.aminmax(x)  # a NaN anywhere shows in both; no copy of x
    if not bool(lowest.isfinite() & highest.isfinite()):
        bad = int((~torch.isfinite(x)).sum())
        raise EvenbitsError(f"{bad} of {x.numel()} values are NaN or infinite; mend the tensor before quantizing it.")
    if x.dtype == torch.float64 and float(x.abs().max()) > torch.finfo(torch.float32).max:
        raise EvenbitsError(f"scales are float32, which cannot hold {float(x.abs().max()):g}; scale the tensor down.")
