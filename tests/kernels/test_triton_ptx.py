"""The PTX that decodes four bits: its very text, run by a small model of the instructions on all 256 bytes.

What an instruction does is taken from the PTX manual: prmt's eight-byte pool and its sign mode, lop3's truth table.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from evenbits.kernels.pair_codes import e4m3_codes, float_codes, pair_codes
from evenbits.kernels.triton import ptx
from evenbits.kernels.triton.tables import Decoder, e4m3_decoder, float_decoder, int8_decoder
from evenbits.numerics import elements
from evenbits.numerics.format import Format

MASK = 0xFFFFFFFF
PAIRS = ["ovp4-int:row", "ovp4-flint:row", "ovp4-flint_i8:row"]
TABLES = ["int4:row", "flint4:row", "pot4:row", "fp4:row"]
HALVES = [torch.float16, torch.bfloat16]


def _prmt(a: int, b: int, selector: int) -> int:
    pool, result = (b << 32 | a).to_bytes(8, "little"), 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = pool[pick & 7]
        result |= (255 * (byte >> 7) if pick & 8 else byte) << 8 * i
    return result


def _lop3(a: int, b: int, c: int, table: int) -> int:
    result = 0
    for bit in range(32):
        row = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        result |= (table >> row & 1) << bit
    return result


def _fma(a: int, b: int, c: int, dtype: torch.dtype) -> int:
    """One rounding: float64 holds every product and sum of two 16-bit floats of these sizes."""
    parts = (torch.tensor([v & 0xFFFF, v >> 16]).to(torch.uint16).view(dtype).double() for v in (a, b, c))
    x, y, z = parts
    low, high = ((x * y + z).to(dtype).view(torch.int16).long() & 0xFFFF).tolist()
    return int(high << 16 | low)


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, b: a << b & MASK,
    "shr.b32": lambda a, b: a >> b,
    "add.u32": lambda a, b: a + b & MASK,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "fma.rn.f16x2": lambda a, b, c: _fma(a, b, c, torch.float16),
    "fma.rn.bf16x2": lambda a, b, c: _fma(a, b, c, torch.bfloat16),
}


def _lines(text: str) -> list[str]:
    first, registers, *lines, last = text.splitlines()
    assert (first, last) == ("{", "}") and registers.startswith(".reg .b32 t<")
    return lines


def _run(text: str, outputs: int, word: int) -> list[int]:
    registers = {f"${outputs}": word}
    for line in _lines(text):
        match = re.fullmatch(r"(\S+) (\S+), (.*);", line)
        assert match is not None, line
        arguments = [int(v, 16) if v.startswith("0x") else registers[v] for v in match[3].split(", ")]
        registers[match[2]] = INSTRUCTIONS[match[1]](*arguments)
    return [registers[f"${i}"] for i in range(outputs)]


def _decoded(decoder: Decoder) -> torch.Tensor:
    """What the text makes of every byte → [256, 2], even and odd."""
    wide = decoder.dtype.itemsize
    generator, found = torch.Generator().manual_seed(1), torch.full((256, 2), float("nan"))
    order = torch.cat([torch.randperm(256, generator=generator) for _ in range(2)])  # each byte in two neighbourhoods
    for quad in order.view(-1, 4).tolist():
        outputs = _run(decoder.asm, 2 * wide, int.from_bytes(bytes(quad), "little"))
        raw = b"".join(word.to_bytes(4, "little") for word in outputs)
        values = torch.frombuffer(bytearray(raw), dtype=decoder.dtype).float().view(2, 4)
        for i, byte in enumerate(quad):
            assert found[byte].isnan().all() or found[byte].equal(values[:, i])
            found[byte] = values[:, i]
    return found


def _own(fmt: str) -> torch.Tensor:
    """The numerics' own decoder: [256, 2]."""
    every = torch.arange(256, dtype=torch.uint8).view(256, 1)
    return elements.unpack_values(every, Format.parse(fmt).dtype, 2)


@pytest.mark.parametrize("fmt", PAIRS + TABLES)
def test_int8_of_every_byte(fmt: str) -> None:
    codes = pair_codes(Format.parse(fmt), 64)
    assert codes is not None
    decoders = [int8_decoder(codes.tables, codes.paired, rest) for rest in ([False, True] if codes.wide else [False])]
    by_table = [torch.tensor(decoder.numbers).view(256, 2) for decoder in decoders]
    for decoder, table in zip(decoders, by_table, strict=True):
        assert table.abs().max() <= 128 and table.equal(decoder.table(torch.device("cpu")).float().view(256, 2))
        assert _decoded(decoder).equal(table)
    shift = decoders[0].shift
    assert (sum(by_table) * codes.unit / 2**shift).equal(_own(fmt))
    assert shift == (4 if fmt == "int4:row" else 0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fmt", PAIRS + TABLES)
def test_halves_of_every_byte(fmt: str, dtype: torch.dtype) -> None:
    codes = float_codes(Format.parse(fmt), 64)
    assert not isinstance(codes, str)
    decoder = float_decoder(codes.values, codes.paired, dtype)
    assert decoder is not None
    assert _decoded(decoder).equal(_own(fmt))
    assert decoder.table(torch.device("cpu")).float().view(256, 2).equal(_own(fmt))


@pytest.mark.parametrize("fmt", PAIRS + TABLES)
def test_e4m3_of_every_byte(fmt: str) -> None:
    codes = e4m3_codes(Format.parse(fmt), 64)
    assert not isinstance(codes, str)
    decoder = e4m3_decoder(codes.values, codes.paired)
    assert decoder.dtype == torch.float8_e4m3fn and decoder.shift == 0
    assert _decoded(decoder).equal(_own(fmt))
    assert decoder.table(torch.device("cpu")).float().view(256, 2).equal(_own(fmt))


def test_what_e4m3_does_not_hold_is_refused() -> None:
    assert e4m3_codes(Format.parse("nf4:row"), 64) == "values that E4M3 does not hold"
    assert e4m3_codes(Format.parse("ovp4-mix:g16"), 64) == "pairs whose kind changes from group to group"


def test_what_16_bits_do_not_hold_has_no_such_decoder() -> None:
    codes = float_codes(Format.parse("nf4:row"), 64)
    assert not isinstance(codes, str)
    assert float_decoder(codes.values, False, torch.bfloat16) is None
    single = float_decoder(codes.values, False, torch.float32)
    assert single is not None and single.asm == ""
    assert single.table(torch.device("cpu")).view(256, 2).equal(_own("nf4:row"))


def test_any_table_of_bytes() -> None:
    """Not only tables that a format has: every entry its own number, zero elsewhere, at random."""
    for outlier in (None, [0, *range(100, 107), 0, *range(200, 207)]):
        normal = [7 * i + 3 & 255 for i in range(16)]
        text = ptx.bytes_from_tables(normal, outlier)
        for low, high in itertools.product(range(16), repeat=2):
            table = normal if outlier is None or 8 not in (low, high) else outlier
            even, odd = _run(text, 2, 0x01010101 * (high << 4 | low))
            assert (even, odd) == (0x01010101 * table[low], 0x01010101 * table[high])


def test_any_signed_table_of_bytes() -> None:
    """Magnitudes alike for both signs or not, in either table; a zero may come out with a sign."""
    same, other = [0, *range(9, 16)] * 2, [*range(8), *range(88, 80, -1)]
    signed = [[byte | 128 * (i > 7 and byte > 0) for i, byte in enumerate(table)] for table in (same, other)]
    for normal, outlier in itertools.product(signed, [None, *signed]):
        text = ptx.signed_bytes_from_tables(normal, outlier)
        for low, high in itertools.product(range(16), repeat=2):
            table = normal if outlier is None or 8 not in (low, high) else outlier
            for word, nibble in zip(_run(text, 2, 0x01010101 * (high << 4 | low)), (low, high), strict=True):
                assert word % 0x01010101 == 0
                assert word // 0x01010101 in ({table[nibble]} if table[nibble] else {0, 128})


def _count(decoder: Decoder | None) -> tuple[int, int]:
    """Integer and float instructions for eight weights; constants (mov) are loaded once for a whole loop."""
    assert decoder is not None
    lines = [line for line in _lines(decoder.asm) if not line.startswith("mov")]
    floats = sum(line.startswith("fma") for line in lines)
    return len(lines) - floats, floats


@pytest.mark.parametrize(
    ("fmt", "int8", "e4m3", "float16", "bfloat16"),
    [
        ("int4:row", (3, 0), (13, 0), (9, 4), (9, 4)),
        ("flint4:row", (13, 0), (9, 0), (15, 0), (17, 0)),
        ("pot4:row", (13, 0), (9, 0), (15, 0), (17, 0)),
        ("fp4:row", (13, 0), (9, 0), (15, 0), (17, 0)),
        ("ovp4-int:row", (27, 0), (25, 0), (29, 0), (39, 0)),
        ("ovp4-flint:row", (27, 0), (19, 0), (29, 0), (35, 0)),
        ("ovp4-flint_i8:row", (27, 0), (19, 0), (33, 0), (35, 0)),
    ],
)
def test_no_more_instructions_than_these_for_eight_weights(
    fmt: str, int8: tuple[int, int], e4m3: tuple[int, int], float16: tuple[int, int], bfloat16: tuple[int, int]
) -> None:
    parsed = Format.parse(fmt)
    assert _count(e4m3_decoder(float_codes(parsed, 64).values, fmt.startswith("ovp"))) == e4m3  # type: ignore[union-attr]
    integers, floats = pair_codes(parsed, 64), float_codes(parsed, 64)
    assert integers is not None and not isinstance(floats, str)
    assert _count(int8_decoder(integers.tables, integers.paired, False)) == int8
    if integers.wide:
        assert _count(int8_decoder(integers.tables, True, True)) == (21, 0)
    found = [_count(float_decoder(floats.values, floats.paired, dtype)) for dtype in HALVES]
    assert found == [float16, bfloat16]
