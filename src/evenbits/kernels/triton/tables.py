"""A weight's sixteen (and sixteen) numbers → what a kernel decodes its bytes with.

Every kernel has two ways to decode, with the same result for all 256 bytes (tests/kernels/test_triton_ptx.py): PTX text
(ptx.py), and a table of 256 pairs from which it reads the two numbers of a byte. The second is what the interpreter
runs, and what remains for numbers that neither int8 nor 16 bits hold (NormalFloat, float32 activations). E4M3 has one
byte a number as int8 has, so it is looked up likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from evenbits.kernels.triton import ptx

_IDENTIFIER = 8
_INT4 = tuple(range(8)) + tuple(range(-8, 0))
_SHIFT = 4


@dataclass(frozen=True)
class Decoder:
    """numbers: 512, even and odd of every byte, of `dtype`. asm: PTX, "" if there is none for these numbers. shift: the
    decoded numbers are 2^shift times what they should be."""

    numbers: tuple[float, ...]
    dtype: torch.dtype
    asm: str
    shift: int = 0

    def table(self, device: torch.device) -> torch.Tensor:
        """[512] on a device."""
        return _table(self.numbers, self.dtype, device)


@cache
def _table(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device="cpu").to(dtype).to(device)


@cache
def int8_decoder(tables: tuple[int, ...], paired: bool, rest: bool) -> Decoder:
    """tables: the 48 numbers of PairCodes. rest: what outliers have beyond int8, zero for all else."""
    normal, outlier = ((0,) * 16, tables[32:]) if rest else (tables[:16], tables[16:32])
    if not paired and normal == _INT4:
        return Decoder(pairs([16.0 * v for v in normal], None), torch.int8, ptx.shifted_nibbles(), _SHIFT)
    other = outlier if paired else None
    return Decoder(pairs(normal, other), torch.int8, ptx.bytes_from_tables(normal, other))


@cache
def float_decoder(values: tuple[float, ...], paired: bool, dtype: torch.dtype) -> Decoder | None:
    """values: the 32 numbers of FloatCodes. None if `dtype` does not hold them all."""
    normal, outlier = values[:16], values[16:] if paired else None
    numbers = torch.tensor(values, dtype=torch.float32, device="cpu")
    if not numbers.to(dtype).float().equal(numbers):
        return None
    if dtype == torch.float32:
        return Decoder(pairs(normal, outlier), dtype, "")
    if not paired and normal == _INT4:
        return Decoder(pairs(normal, None), dtype, ptx.half_nibbles(dtype == torch.bfloat16))
    bits = [v & 0xFFFF for v in numbers.to(dtype).view(torch.int16).tolist()]
    asm = ptx.halves_from_tables(bits[:16], bits[16:] if paired else None)
    return Decoder(pairs(normal, outlier), dtype, asm)


@cache
def e4m3_decoder(values: tuple[float, ...], paired: bool) -> Decoder:
    """values: the 32 numbers of FloatCodes, which E4M3 holds."""
    normal, outlier = values[:16], values[16:] if paired else None
    codes = torch.tensor(values, dtype=torch.float32, device="cpu").to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    asm = ptx.signed_bytes_from_tables(codes[:16], codes[16:] if paired else None)
    return Decoder(pairs(normal, outlier), torch.float8_e4m3fn, asm)


def pairs(normal: Sequence[float], outlier: Sequence[float] | None) -> tuple[float, ...]:
    """The two numbers of every byte, low nibble first."""
    found: list[float] = []
    for byte in range(256):
        low, high = byte & 15, byte >> 4
        table = normal if outlier is None or _IDENTIFIER not in (low, high) else outlier
        found += [float(table[low]), float(table[high])]
    return tuple(found)
