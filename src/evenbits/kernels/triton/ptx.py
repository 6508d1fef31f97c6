"""Four-bit codes → numbers on a GPU: PTX text, eight weights (four bytes, a register) at a time.

`prmt` picks four bytes out of eight by the nibbles of a selector, so a packed word, its sign bits taken out, is itself
the selector of a table of eight: two of them, for numbers of either sign, are sixteen entries. Sign and "this byte
holds an identifier" become masks of whole bytes by prmt's other mode, which repeats a sign bit. In a byte with an
identifier both nibbles are looked up in the outlier table: the identifier is that table's zero. Nothing is shifted or
compared for one weight alone: 27 instructions for eight weights in outlier-victim pairs, 13 from a table of sixteen, 3
for int4 (tests/kernels/test_triton_ptx.py counts, and runs this very text on all 256 bytes). Bytes of E4M3 have their
sign where nibbles have it, so magnitudes are looked up, in one table where both signs have the same: 19 and 9.

Bytes enter as Triton packs them, four of a tile in a register, whichever four: a weight depends on its own byte only.
Results are the even nibbles and the odd ones apart. Names: w word of codes, u without sign bits, A the four weights of
its lower two bytes, B of its upper two.
"""

from __future__ import annotations

from collections.abc import Sequence

_MUX = 0xCA  # lop3: first ? second : third
_SIGNED = 0xF8  # first | second & third
_EVEN, _ODD = 0x6420, 0x7531
_HALF_EVEN, _HALF_ODD = 0x6240, 0x7351


class _Program:
    """PTX with as many registers as it takes."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.registers = 0

    def __call__(self, op: str, *arguments: str | int, to: str = "") -> str:
        """Adds an instruction; the register that has its result."""
        if not to:
            to, self.registers = f"t{self.registers}", self.registers + 1
        words = [arg if isinstance(arg, str) else f"0x{arg:X}" for arg in arguments]
        self.lines.append(f"{op} {', '.join([to, *words])};")
        return to

    def text(self) -> str:
        """What `tl.inline_asm_elementwise` takes."""
        return "\n".join(["{", f".reg .b32 t<{self.registers}>;", *self.lines, "}"])


def shifted_nibbles() -> str:
    """int4 → int8, sixteen times the value: $0 even, $1 odd, of $2."""
    program = _Program()
    high = program("shl.b32", "$2", 4)
    program("and.b32", high, 0xF0F0F0F0, to="$0")
    program("and.b32", "$2", 0xF0F0F0F0, to="$1")
    return program.text()


def half_nibbles(bfloat16: bool) -> str:
    """int4 → float16 or bfloat16: $0, $1 even, $2, $3 odd, of $4. The code becomes the last bits of 1024 + 8 + value
    (128 + 8 + value), from which that number is subtracted, exactly."""
    program = _Program()
    top, *constants = (0x43434343, 0x3F803F80, 0xC308C308) if bfloat16 else (0x64646464, 0x3C003C00, 0xE408E408)
    one, minus = (program("mov.b32", constant) for constant in constants)  # fma takes registers only
    for first, word in ((0, "$4"), (2, program("shr.b32", "$4", 4))):
        for half, pick in ((0, 0x4140), (1, 0x4342)):
            both = program("prmt.b32", word, top, pick)
            both = program("lop3.b32", both, 0xFF0FFF0F, 0x00080008, "0x6A")  # (both & second) ^ third
            kind = "fma.rn.bf16x2" if bfloat16 else "fma.rn.f16x2"
            program(kind, both, one, minus, to=f"${first + half}")
    return program.text()


def bytes_from_tables(normal: Sequence[int], outlier: Sequence[int] | None) -> str:
    """Codes → bytes of a table: $0 even, $1 odd, of $2. outlier: of codes beside an identifier; None: there is none."""
    program = _Program()
    masks = _Masks(program, "$2", outlier is not None)
    a, b = masks.look_up(normal, outlier)
    program("prmt.b32", a, b, _EVEN, to="$0")
    program("prmt.b32", a, b, _ODD, to="$1")
    return program.text()


def signed_bytes_from_tables(normal: Sequence[int], outlier: Sequence[int] | None) -> str:
    """The same for bytes of sign and magnitude whose sign is their code's top bit (zeros: either). Shorter where one of
    the tables has the same magnitudes for both signs."""
    tables = [[byte & 127 for byte in table] for table in (normal, outlier or normal)]
    if not any(table[:8] == table[8:] for table in tables):
        return bytes_from_tables(normal, outlier)
    program = _Program()
    masks = _Masks(program, "$2", outlier is not None)
    a, b = masks.look_up(tables[0], None if outlier is None else tables[1])
    for pick, signs, to in ((_EVEN, masks.shifted(), "$0"), (_ODD, "$2", "$1")):
        program("lop3.b32", program("prmt.b32", a, b, pick), signs, 0x80808080, f"0x{_SIGNED:X}", to=to)
    return program.text()


def halves_from_tables(normal: Sequence[int], outlier: Sequence[int] | None) -> str:
    """Codes → 16-bit patterns of a table: $0, $1 even, $2, $3 odd, of $4. Upper and lower bytes have tables of their
    own; one that is all zeros costs nothing."""
    program = _Program()
    masks = _Masks(program, "$4", outlier is not None)
    low, high = (
        masks.look_up([v >> shift & 255 for v in normal], outlier and [v >> shift & 255 for v in outlier])
        for shift in (0, 8)
    )
    for half in (0, 1):
        program("prmt.b32", low[half], high[half], _HALF_EVEN, to=f"${half}")
        program("prmt.b32", low[half], high[half], _HALF_ODD, to=f"${2 + half}")
    return program.text()


class _Masks:
    """Selectors and byte masks of a word, made once for all tables."""

    def __init__(self, program: _Program, word: str, paired: bool) -> None:
        self.program = program
        self.selectors = (program("and.b32", word, 0x77777777), "")
        self.selectors = (self.selectors[0], program("shr.b32", self.selectors[0], 16))
        self.word, self._shifted, self._negative = word, "", ("", "")
        self.paired = self._paired(word) if paired else ("", "")

    def shifted(self) -> str:
        """The word with even nibbles where odd ones were; made when first asked for."""
        self._shifted = self._shifted or self.program("shl.b32", self.word, 4)
        return self._shifted

    def negative(self, half: int) -> str:
        """The mask of negative codes, likewise."""
        if not self._negative[0]:
            first, second = (self.program("prmt.b32", self.shifted(), self.word, pick) for pick in (0xD9C8, 0xFBEA))
            self._negative = (first, second)
        return self._negative[half]

    def _paired(self, word: str) -> tuple[str, str]:
        """Masks of the bytes that hold the identifier 1000b: sign bit set, nothing below it."""
        something = self.program("add.u32", self.selectors[0], 0x77777777)  # its sign bits: not zero below
        found = self.program("lop3.b32", word, something, 0x88888888, "0x20")  # first & ~second & third
        either = self.program("or.b32", found, self.program("shl.b32", found, 4))
        return self.program("prmt.b32", either, either, 0x9988), self.program("prmt.b32", either, either, 0xBBAA)

    def look_up(self, normal: Sequence[int], outlier: Sequence[int] | None) -> tuple[str, str]:
        """The bytes for A and for B, each in the order of its nibbles."""
        found = []
        for half in (0, 1):
            result = self._of_one(normal, half)
            if outlier is not None and list(outlier) != list(normal):
                result = self.program("lop3.b32", self.paired[half], self._of_one(outlier, half), result, f"0x{_MUX:X}")
            found.append(result)
        return found[0], found[1]

    def _of_one(self, table: Sequence[int], half: int) -> str:
        positive, negative = _words(table[:8]), _words(table[8:])
        if not any(table):
            return "0x0"
        if positive == negative:
            return self.program("prmt.b32", *positive, self.selectors[half])
        first = self.program("prmt.b32", *positive, self.selectors[half])
        second = self.program("prmt.b32", *negative, self.selectors[half])
        return self.program("lop3.b32", self.negative(half), second, first, f"0x{_MUX:X}")


def _words(table: Sequence[int]) -> tuple[int, int]:
    first, second = (sum((value & 255) << 8 * i for i, value in enumerate(part)) for part in (table[:4], table[4:]))
    return first, second
