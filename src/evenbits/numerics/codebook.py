"""Number types that are a table: flint, power-of-two, small floats, NormalFloat, adaptive-bias float.

Each table is computed from its rule. A code is a bit pattern; `values[code]` is what it stands for (NaN where a pattern
is not used). Signed types are sign and magnitude: the top bit is the sign, "minus zero" is not used.

flint    first-one encoding (ANT): small values are exact integers, large ones powers of two, most precision in between
pot      0 and powers of two
fp       eXmY with subnormals: fp4 is E2M1 (largest 6), fp8 E4M3 (largest 448, no infinities) and E5M2 (57344)
nf       quantiles of a normal distribution, scaled to ±1 (QLoRA)
abfloat  (2^y + mantissa) << (exponent + bias), no zero: what an outlier is written in (OliVe)

Encoding is to the nearest value of the table; a tie goes to the even code, which for floats is round-to-nearest-even.
Values beyond the table saturate. Sources: C. Guo et al., "ANT", MICRO 2022, section IV, and "OliVe", ISCA 2023, section
3; OCP 8-bit floating point specification 1.0 and microscaling formats 1.0; T. Dettmers et al., "QLoRA", NeurIPS 2023,
appendix E.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch

from evenbits.errors import EvenbitsError

UNUSED = math.nan
_SPELLING = re.compile(r"(u?)(flint|pot|nf|fp|abfloat)([2-8])(?:_e(\d)m(\d))?(?:_b(\d))?")
_LONGEST_TABLE = 1024
_DEFAULT_FLOATS = {4: (2, 1), 8: (4, 3)}


@dataclass(frozen=True)
class Codebook:
    """A table type. `values[code]`, code = 0 … 2^bits − 1; NaN marks patterns that are never written."""

    name: str
    bits: int
    signed: bool
    values: tuple[float, ...]

    @property
    def largest(self) -> float:
        """The largest magnitude of the table: what a group's absmax is mapped to."""
        return max(abs(value) for value in self.values if not math.isnan(value))

    @property
    def storage(self) -> torch.dtype:
        return torch.uint8

    def quantize(self, u: torch.Tensor) -> torch.Tensor:
        """Scaled values (any float shape) → codes uint8, nearest value of the table, ties to the even code."""
        tables = _search_tables(self)
        middles, u = tables.middles.to(u.device), u.contiguous()  # torch warns about searching in views
        x = u.abs() if tables.mirrored else u
        below = torch.bucketize(x, middles, right=False)
        above = torch.bucketize(x, middles, right=True)
        codes = tables.codes.to(u.device)
        first, second = codes[below], codes[above]
        chosen = torch.where(first % 2 == 0, first, second)
        if tables.mirrored:
            # Minus zero is not a code of the table: the sign is set on magnitudes that are not zero.
            negative = (u < 0) & (chosen != tables.zero)
            chosen = chosen | (negative.to(torch.uint8) << (self.bits - 1))
        return chosen

    def nearest(self, u: torch.Tensor) -> torch.Tensor:
        """Scaled values → nearest values of the table: `decode(quantize(u))` but for ties. For measuring errors."""
        tables, u = _search_tables(self), u.contiguous()
        if tables.steps is not None:
            # Every midpoint is a multiple of 1/steps_per_unit: a look-up by the rounded-up step replaces the search.
            last = len(tables.steps) - 1
            index = (u.abs() * tables.steps_per_unit).ceil_().clamp_(max=last).to(torch.int32)
            return tables.steps.to(u.device).index_select(0, index.flatten()).view(u.shape).copysign_(u)
        values = tables.values.to(u.device)
        if tables.mirrored:
            return values[torch.bucketize(u.abs(), tables.middles.to(u.device), out_int32=True)].copysign_(u)
        return values[torch.bucketize(u, tables.middles.to(u.device), out_int32=True)]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (uint8) → float32 values; unused patterns decode to 0."""
        table = torch.tensor(self.values, dtype=torch.float32, device=codes.device).nan_to_num(nan=0.0)
        return table[codes.long()]

    @staticmethod
    def parse(name: str) -> Codebook:
        """`"flint4"`, `"upot4"`, `"fp4"`, `"fp8_e5m2"`, `"nf4"`, `"abfloat4_b2"`. Raises EvenbitsError."""
        return _parse(name)


@cache
def _parse(name: str) -> Codebook:
    match = _SPELLING.fullmatch(name)
    if match is None:
        raise EvenbitsError(
            f"unknown table type {name!r}. Allowed: flintN, potN, nfN, fpN (fp4, fp8, fp6_e3m2, …), abfloatN_bB, "
            "with N from 2 to 8 bits, and u in front for unsigned (uflint4)."
        )
    unsigned, family, digits, exponent, mantissa, bias = match.groups()
    bits, signed = int(digits), not unsigned
    magnitude_bits = bits - 1 if signed else bits
    if (exponent is not None and family != "fp") or (bias is not None and family != "abfloat"):
        raise EvenbitsError(f"{name!r}: _eXmY belongs to fp types and _bB to abfloat types.")
    if family == "nf":
        if not signed or bits < 3:
            raise EvenbitsError(f"{name!r}: NormalFloat is signed, of 3 to 8 bits.")
        return Codebook(name, bits, True, _normal_float(bits))
    if magnitude_bits < 2:
        raise EvenbitsError(f"{name!r}: {family} needs two magnitude bits or more.")
    if family == "fp":
        e, m = (int(exponent), int(mantissa)) if exponent is not None else _default_float(name, bits, signed)
        if e + m != magnitude_bits or e < 1:
            raise EvenbitsError(
                f"{name!r}: exponent and mantissa must fill {magnitude_bits} bits, with an exponent. Allowed: "
                f"{_float_layouts(bits, signed)}."
            )
        magnitudes = _float(e, m, signed=signed)
    elif family == "abfloat":
        magnitudes = _abfloat(magnitude_bits, int(bias) if bias is not None else 2)
    else:
        magnitudes = {"flint": _flint, "pot": _pot}[family](magnitude_bits)
    if max(magnitudes) > torch.finfo(torch.float32).max:
        raise EvenbitsError(f"{name!r}: its largest value, {max(magnitudes):g}, is beyond float32.")
    return Codebook(name, bits, signed, _mirrored(magnitudes) if signed else tuple(magnitudes))


def _default_float(name: str, bits: int, signed: bool) -> tuple[int, int]:
    if not signed or bits not in _DEFAULT_FLOATS:
        raise EvenbitsError(
            f"{name!r}: only fp4 and fp8 have a default layout; spell it out: {_float_layouts(bits, signed)}."
        )
    return _DEFAULT_FLOATS[bits]


def _float_layouts(bits: int, signed: bool) -> str:
    """The names of all floats of so many bits; those that reach beyond float32 are left out."""
    width = bits - signed
    layouts = [(e, width - e) for e in range(1, width + 1)]
    held = [(e, m) for e, m in layouts if max(_float(e, m, signed=signed)) <= torch.finfo(torch.float32).max]
    return ", ".join(f"{'' if signed else 'u'}fp{bits}_e{e}m{m}" for e, m in held)


def _mirrored(magnitudes: list[float]) -> tuple[float, ...]:
    negative = [UNUSED if value == 0 or math.isnan(value) else -value for value in magnitudes]
    return (*magnitudes, *negative)


def _flint(width: int) -> list[float]:
    """Code = top bit t, then L of width − 1 bits. L's leading one ends the exponent, the rest is the mantissa."""
    values = []
    for code in range(1 << width):
        top, low = code >> (width - 1), code & ((1 << (width - 1)) - 1)
        leading_zeros = width - 1 - low.bit_length()
        if not top and not low:
            values.append(0.0)
            continue
        exponent = width + leading_zeros if top else width - 1 - leading_zeros
        fraction = low / (1 << (low.bit_length() - 1)) if low else 1.0
        values.append(fraction * 2.0 ** (exponent - 1))
    return values


def _pot(width: int) -> list[float]:
    return [0.0, *(2.0**power for power in range((1 << width) - 1))]


def _float(exponent_bits: int, mantissa_bits: int, *, signed: bool) -> list[float]:
    """OCP rules: subnormals at exponent 0; no infinities, except that E5M2 keeps IEEE's; E4M3 keeps one NaN pattern.

    Unsigned tables and layouts without mantissa have no subnormals to speak of and use bias 1, as ANT's do.
    """
    bias = (1 << (exponent_bits - 1)) - 1 if signed and mantissa_bits else 1
    values = []
    for code in range(1 << (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
        values.append(mantissa * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa) * 2.0 ** (exponent - bias))
    if (exponent_bits, mantissa_bits) == (4, 3):
        values[-1] = UNUSED
    if (exponent_bits, mantissa_bits) == (5, 2):
        values[-4:] = [UNUSED] * 4
    return values


def _abfloat(width: int, bias: int) -> list[float]:
    """One mantissa bit at 4 bits (E2M1), three at 8 (E4M3): ⌊width / 2⌋. The zero pattern is not used."""
    mantissa_bits = width // 2
    values = []
    for code in range(1 << width):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        values.append(float(((1 << mantissa_bits) + mantissa) << (exponent + bias)))
    values[0] = UNUSED
    return values


def _normal_float(bits: int) -> tuple[float, ...]:
    half = 1 << (bits - 1)
    offset = 1 - (1 / (2 * (2 * half - 1)) + 1 / (4 * half)) / 2
    quantile = NormalDist().inv_cdf

    def spaced(count: int) -> list[float]:
        return [quantile(offset + (0.5 - offset) * i / count) for i in range(count)]

    positive, negative = spaced(half), spaced(half - 1)
    largest = max(positive)
    return tuple(sorted([*(value / largest for value in positive), *(-value / largest for value in negative), 0.0]))


@dataclass(frozen=True)
class _Search:
    """values: sorted (of mirrored tables: magnitudes); middles: between them; codes: theirs; steps: see `nearest`."""

    values: torch.Tensor
    middles: torch.Tensor
    codes: torch.Tensor
    mirrored: bool
    zero: int
    steps: torch.Tensor | None
    steps_per_unit: int


@cache
def _search_tables(book: Codebook) -> _Search:
    mirrored = book.signed and not book.name.startswith("nf")
    count = 1 << (book.bits - 1) if mirrored else 1 << book.bits
    pairs = sorted((value, code) for code, value in enumerate(book.values[:count]) if not math.isnan(value))
    # On the CPU whatever the default device is: a cached table must not be left on "meta".
    values = torch.tensor([value for value, _ in pairs], dtype=torch.float64, device="cpu")
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.tensor([code for _, code in pairs], dtype=torch.uint8, device="cpu")
    zero = next((code for value, code in pairs if value == 0), -1)
    steps, per_unit = _steps(values, middles) if mirrored else (None, 0)
    return _Search(values.float(), middles.float(), codes, mirrored, zero, steps, per_unit)


def _steps(values: torch.Tensor, middles: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """The value of every step ((i − 1)/n, i/n], for the smallest n ≤ 8 whose steps no midpoint cuts, or None."""
    for per_unit in (1, 2, 4, 8):
        scaled = middles * per_unit
        if bool((scaled == scaled.round()).all()) and float(scaled[-1]) <= _LONGEST_TABLE:
            steps = torch.arange(int(scaled[-1]) + 2, dtype=torch.float64, device="cpu") / per_unit
            return values[torch.bucketize(steps, middles)].float(), per_unit
    return None, 0
