"""Packing of 2..8-bit codes: a little-endian bit stream per row, each row padded to whole bytes with zero bits.

Code k of a row occupies bits [k·b, (k+1)·b), lowest bit first. So at 4 bits the even code is the low nibble, at 2 bits
four codes share a byte from low to high, at 3 bits eight codes fill three bytes. Signed codes are two's complement.
R: rows, K: codes per row, b: bits, B = ⌈K·b/8⌉: bytes per row.
"""

from __future__ import annotations

import torch

from evenbits.errors import EvenbitsError

_LANES = 8  # eight b-bit codes fill exactly b bytes


def packed_width(columns: int, bits: int) -> int:
    """Bytes of one packed row of `columns` codes."""
    return -(-columns * bits // 8)


def pack(codes_RK: torch.Tensor, bits: int) -> torch.Tensor:
    """Integer codes [R, K] (any integer dtype, signed or not, within `bits`) → uint8 [R, ⌈K·bits/8⌉]."""
    _check_bits(bits)
    rows, columns = codes_RK.shape
    if bits == 8:
        codes_RK = codes_RK.contiguous()
        return codes_RK.to(torch.uint8) if codes_RK.dtype != torch.int8 else codes_RK.view(torch.uint8)
    padded = torch.nn.functional.pad(codes_RK, (0, -columns % _LANES))
    lanes_RWL = padded.reshape(rows, -1, _LANES)
    mask = (1 << bits) - 1
    words_RW = torch.zeros(lanes_RWL.shape[:2], dtype=torch.int64, device=codes_RK.device)
    for lane in range(_LANES):
        words_RW |= (lanes_RWL[..., lane].to(torch.int64) & mask) << (lane * bits)
    bytes_RWb = torch.stack([(words_RW >> (8 * i)) & 0xFF for i in range(bits)], dim=-1).to(torch.uint8)
    return bytes_RWb.reshape(rows, -1)[:, : packed_width(columns, bits)].contiguous()


def unpack(packed_RB: torch.Tensor, bits: int, columns: int, *, signed: bool) -> torch.Tensor:
    """uint8 [R, B] → codes [R, columns], int8 if `signed` else uint8. Raises EvenbitsError if B does not fit."""
    _check_bits(bits)
    rows, width = packed_RB.shape
    if packed_RB.dtype != torch.uint8 or width != packed_width(columns, bits):
        raise EvenbitsError(
            f"packed codes must be uint8 [rows, {packed_width(columns, bits)}] for {columns} codes of {bits} bits; "
            f"given {packed_RB.dtype} {list(packed_RB.shape)}."
        )
    if bits == 8:
        return packed_RB.view(torch.int8) if signed else packed_RB
    padded = torch.nn.functional.pad(packed_RB, (0, -width % bits))
    bytes_RWb = padded.reshape(rows, -1, bits)
    words_RW = torch.zeros(bytes_RWb.shape[:2], dtype=torch.int64, device=packed_RB.device)
    for i in range(bits):
        words_RW |= bytes_RWb[..., i].to(torch.int64) << (8 * i)
    mask, sign = (1 << bits) - 1, 1 << (bits - 1)
    lanes = [(words_RW >> (lane * bits)) & mask for lane in range(_LANES)]
    if signed:
        lanes = [(lane ^ sign) - sign for lane in lanes]
    dtype = torch.int8 if signed else torch.uint8
    return torch.stack([lane.to(dtype) for lane in lanes], dim=-1).reshape(rows, -1)[:, :columns].contiguous()


def pack_bits(flags_RG: torch.Tensor) -> torch.Tensor:
    """bool [R, G] → uint8 [R, ⌈G/8⌉], lowest bit first."""
    padded = torch.nn.functional.pad(flags_RG.to(torch.uint8), (0, -flags_RG.shape[1] % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=flags_RG.device)
    return (padded.reshape(len(padded), -1, 8) << shifts).sum(dim=-1).to(torch.uint8)


def unpack_bits(packed_RB: torch.Tensor) -> torch.Tensor:
    """uint8 [R, B] → bool [R, 8·B], lowest bit first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed_RB.device)
    return ((packed_RB.unsqueeze(-1) >> shifts) & 1).flatten(1).bool()


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise EvenbitsError(f"codes of 2 to 8 bits can be packed; given: {bits} bits.")
