"""Codes to bytes and back, one flat vector at a time, at every width from 1 to 32 bits.

Code k occupies bits [k·b, (k+1)·b) of a little-endian bit stream, lowest bit first: the order of numerics/packing.py.
A code wider than 8 bits is stored in planes: first the low bytes of all codes, then the next bytes, then what is left
of each, packed. So every width takes ⌊b/8⌋·n + ⌈n·(b mod 8)/8⌉ bytes.

Eight codes lie in the eight bytes of an int64 and are pushed together in three steps (neighbours, pairs, quadruples),
so that packing is a dozen passes over contiguous words and no loop over lanes. Words are read as the machine has them:
both ends must be little-endian, as every machine is that torch is built for today. n: codes.
"""

from __future__ import annotations

import torch

_LANES = 8


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits (1..32)."""
    planes, rest = divmod(bits, 8)
    return planes * count + -(-count * rest // 8)


def pack(codes_n: torch.Tensor, bits: int) -> torch.Tensor:
    """Integer codes [n], 0 ≤ code < 2^bits → uint8 [packed_bytes(n, bits)]."""
    planes, rest = divmod(bits, 8)
    wide = codes_n if bits > 8 else codes_n.to(torch.uint8)
    parts = [((wide >> (8 * i)) & 0xFF).to(torch.uint8) if bits > 8 else wide for i in range(planes)]
    if rest:
        top = (codes_n >> (8 * planes)) if planes else codes_n
        parts.append(_pack_narrow(top.to(torch.uint8), rest))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """uint8 [packed_bytes(count, bits)] → codes [count], uint8 up to 8 bits, int32 up to 31, int64 at 32."""
    planes, rest = divmod(bits, 8)
    if bits == 8:
        return packed
    if not planes:
        return _unpack_narrow(packed, rest, count)
    dtype = torch.int32 if bits < 32 else torch.int64
    codes_n = packed[:count].to(dtype)
    for i in range(1, planes):
        codes_n |= packed[i * count : (i + 1) * count].to(dtype) << (8 * i)
    if rest:
        codes_n |= _unpack_narrow(packed[planes * count :], rest, count).to(dtype) << (8 * planes)
    return codes_n


def _steps(bits: int) -> list[tuple[int, int, int]]:
    """(shift, mask of codes that stay, mask of codes that move) of the three steps, for packed fields of 8, 16 and 32
    bits."""
    found = []
    for width, lane in ((bits, 8), (2 * bits, 16), (4 * bits, 32)):
        field, period = (1 << width) - 1, 2 * lane
        stays = sum(field << start for start in range(0, 64, period))
        found.append((lane - width, stays, stays << width))
    return found


def _pack_narrow(codes_n: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [n] of 1..7 bits → uint8 [⌈n·bits/8⌉]."""
    count = codes_n.numel()
    words = words_of(torch.nn.functional.pad(codes_n, (0, -count % _LANES)) if count % _LANES else codes_n, torch.int64)
    for shift, stays, moves in _steps(bits):
        moved = (words >> shift).bitwise_and_(moves)
        words = (words & stays).bitwise_or_(moved)
    return words.view(torch.uint8).view(-1, _LANES)[:, :bits].reshape(-1)[: packed_bytes(count, bits)]


def _unpack_narrow(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """uint8 [⌈n·bits/8⌉] → uint8 codes [n] of 1..7 bits."""
    groups = -(-count // _LANES)
    lanes = torch.zeros(groups, _LANES, dtype=torch.uint8, device=packed.device)
    if packed.numel() == groups * bits:
        lanes[:, :bits] = packed.view(groups, bits)
    elif groups:
        lanes[:-1, :bits] = packed[: (groups - 1) * bits].view(groups - 1, bits)
        last = packed[(groups - 1) * bits :]
        lanes[-1, : last.numel()] = last
    words = lanes.view(-1).view(torch.int64)
    for shift, stays, moves in reversed(_steps(bits)):
        moved = (words & moves).bitwise_left_shift_(shift)
        words = (words & stays).bitwise_or_(moved)
    return words.view(torch.uint8)[:count]


def words_of(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of a contiguous vector as `dtype`, copied only where they do not lie at a whole word of it."""
    data = data.contiguous().view(torch.uint8)
    offset = data.storage_offset() * data.element_size()
    return (data.clone() if offset % dtype.itemsize else data).view(dtype)


def bytes_of(values: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, uint8 [nbytes]."""
    return values.contiguous().view(-1).view(torch.uint8)
