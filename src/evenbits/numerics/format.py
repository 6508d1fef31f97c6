"""A number format = element type × granularity × scale rule, with one spelling everywhere.

    TYPE:GRANULARITY[:OPTION …]    int8:row   int4:g128   uint8:tensor:affine   int8:row:127.5   ovp4:g32   nf4:g64
    BLOCK[:OPTION]                 mxfp4   nvfp4

| option   | meaning                                                                                            |
|----------|----------------------------------------------------------------------------------------------------|
| (none)   | scale quantization (symmetric): x ≈ scale · code, scale = absmax / 127 at 8 bits (codes −127..127)  |
| `127.5`  | the other convention: scale = absmax / ((qmax − qmin)/2), codes −128..127 (7.5 at 4 bits)          |
| `affine` | x ≈ scale · (code − zero_point), scale = (max − min) / (qmax − qmin)                               |
| `free`   | affine only: the range is taken as it is and zero need not be a code (zero points become int32)    |
| `mse`    | the scale of least squared error; the default of flint, pot, ant and ovp types                     |
| `minmax` | the scale spans everything; the default of all other types                                         |
| `p99.9`  | the range is the 99.9th percentile of |x| (affine: of each side)                                   |
| `paper`, `reference` | pairs only: another policy than `optimal` (numerics/ovp.py)                            |
| `3sigma` | pairs only: OliVe's released search, 0.75 … 2.49 times three standard deviations in steps of 0.02  |

`mxfp4` (32 numbers, power-of-two scale) and `nvfp4` (16 numbers, E4M3 scale and a float32 factor) are fixed blocks of
FP4; rows are padded to whole blocks with zeros. The same spelling stands in the API, recipes, checkpoints and on the
wire.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from evenbits.errors import EvenbitsError, unknown_name
from evenbits.numerics.codebook import Codebook
from evenbits.numerics.elements import ElementType, PairType, TypeChoice, parse_element
from evenbits.numerics.granularity import Granularity
from evenbits.numerics.ovp import POLICIES
from evenbits.numerics.qdtypes import QDtype
from evenbits.numerics.scales import Storage

Range = Literal["minmax", "mse", "percentile", "3sigma"]
_PERCENTILE = re.compile(r"p(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class ScaleRule:
    """How a scale follows from numbers.

    symmetric:  no zero point (scale quantization) or one (affine).
    full_range: False is absmax/127 (codes −127..127), True is absmax/127.5 (codes −128..127).
    zero_exact: zero is inside the range and is a code (affine; always so when symmetric).
    range:      "minmax", "mse", "percentile" or "3sigma".
    block:      "mx" or "nv": fixed blocks with the scales of that standard.
    policy:     of pairs: "optimal", "paper" or "reference".
    """

    symmetric: bool = True
    full_range: bool = False
    zero_exact: bool = True
    range: Range = "minmax"
    percentile: float = 100.0
    block: Literal["", "mx", "nv"] = ""
    policy: str = "optimal"


@dataclass(frozen=True)
class Format:
    """A number format; `str(format)` and `Format.parse` are inverse."""

    dtype: ElementType
    granularity: Granularity
    rule: ScaleRule = ScaleRule()

    def __post_init__(self) -> None:
        # Asked for at every call of a layer: found once. Equal formats have one spelling, so its hash is theirs.
        object.__setattr__(self, "_spelling", self._spelled())

    def __str__(self) -> str:
        spelling: str = self.__dict__["_spelling"]
        return spelling

    def __hash__(self) -> int:
        return hash(self.__dict__["_spelling"])

    def _spelled(self) -> str:
        rule, percent = self.rule, f"p{self.rule.percentile!r}".removesuffix(".0")
        options = [] if rule.symmetric else ["affine"]
        options += [] if rule.zero_exact else ["free"]
        options += [_half_range(self.dtype)] if rule.full_range else []
        if rule.range != default_range(self.dtype):
            options.append(percent if rule.range == "percentile" else rule.range)
        options += [] if rule.policy == "optimal" else [rule.policy]
        head = [f"{rule.block}{self.dtype.name}"] if rule.block else [self.dtype.name, str(self.granularity)]
        return ":".join([*head, *options])

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and largest code of an integer format."""
        dtype = self.integer
        narrow = self.rule.symmetric and dtype.signed and not self.rule.full_range
        return (-dtype.qmax if narrow else dtype.qmin), dtype.qmax

    @property
    def integer(self) -> QDtype:
        """The integer type. Raises EvenbitsError if the elements are not integers."""
        if isinstance(self.dtype, QDtype):
            return self.dtype
        raise EvenbitsError(f"{self} has no integer codes; its elements are {self.dtype.name}.")

    @property
    def storage(self) -> Storage:
        """How scales are stored (numerics/scales.py)."""
        if self.rule.block:
            return "e8m0" if self.rule.block == "mx" else "e4m3"
        integer = isinstance(self.dtype, QDtype)
        if self.granularity.kind == "tensor" or (integer and (self.dtype.bits == 8 or not self.rule.zero_exact)):
            return "float32"
        small = self.granularity.kind == "group" and self.granularity.size < 64 and not integer
        return "e4m3" if small else "float16"

    def stored_columns(self, columns: int) -> int:
        """Columns of a row as stored: padded to an even number (pairs) or to whole blocks (mx, nv)."""
        step = self.granularity.size if self.rule.block else 2 if isinstance(self.dtype, PairType) else 1
        return -(-columns // step) * step

    def padding(self, columns: int) -> str:
        """What to know about a row of `columns`: "33 columns stored as 34", or nothing where no zeros are added."""
        stored = self.stored_columns(columns)
        return "" if stored == columns else f"{columns} column{'s' * (columns > 1)} stored as {stored}"

    def fitted(self, shape: tuple[int, ...]) -> Format:
        """This format as it applies to a tensor of `shape`: a group wider than a row becomes the row's width (pairs:
        the next even one). Raises EvenbitsError for pairs in groups of an odd size.
        """
        if self.rule.block:
            return self
        if not isinstance(self.dtype, PairType) or self.granularity.kind != "group" or not shape:
            return replace(self, granularity=self.granularity.fitted(shape))
        if self.granularity.size % 2:
            raise EvenbitsError(f"{self}: pairs need groups of an even size.")
        return replace(self, granularity=self.granularity.fitted((*shape[:-1], self.stored_columns(shape[-1]))))

    def with_policy(self, policy: str) -> Format:
        """This format with another pair policy. Raises EvenbitsError for an unknown one and for types without pairs."""
        if policy not in POLICIES:
            raise unknown_name("pair policy", policy, POLICIES)
        if not isinstance(self.dtype, PairType):
            raise EvenbitsError(
                f"the policy {policy!r} says which of two outliers stays, and {self} has no pairs; leave policy away "
                "or use a format of pairs, such as 'ovp4:row'."
            )
        return replace(self, rule=replace(self.rule, policy=policy))

    @staticmethod
    def parse(spelling: str | Format) -> Format:
        """`"int4:g128:mse"` → Format. Raises EvenbitsError that names the part that is wrong."""
        if isinstance(spelling, Format):
            return spelling
        words = spelling.split(":") if isinstance(spelling, str) else []
        dtype: ElementType
        if words and words[0] in _BLOCKS:
            dtype, granularity, rule = _BLOCKS[words[0]]
            options = words[1:]
        elif len(words) > 1:
            dtype, granularity, options = parse_element(words[0]), Granularity.parse(words[1]), words[2:]
            rule = ScaleRule(range=default_range(dtype))
        else:
            raise EvenbitsError(
                f"a number format is spelled TYPE:GRANULARITY, such as 'int8:row' or 'int4:g128', or mxfp4, nvfp4; "
                f"given: {spelling!r}."
            )
        for option in options:
            rule = _with_option(rule, option, dtype, spelling)
        fmt = Format(dtype, granularity, rule)
        _check(fmt, spelling)
        ranges = [o for o in options if o in ("mse", "minmax", "3sigma") or _PERCENTILE.fullmatch(o)]
        if len(ranges) > 1 or len(set(options)) < len(options):
            raise EvenbitsError(f"{spelling!r}: options repeat or contradict each other; together they say '{fmt}'.")
        return fmt


_BLOCKS = {
    "mxfp4": (Codebook.parse("fp4"), Granularity("group", 32), ScaleRule(block="mx")),
    "nvfp4": (Codebook.parse("fp4"), Granularity("group", 16), ScaleRule(block="nv")),
}


def default_range(dtype: ElementType) -> Range:
    """The scale rule of a type that names none: a search for ANT's and OliVe's types, the full range for the others."""
    searched = isinstance(dtype, (PairType, TypeChoice)) or dtype.name.lstrip("u").startswith(("flint", "pot"))
    return "mse" if searched else "minmax"


def _check(fmt: Format, spelling: str) -> None:
    rule, dtype = fmt.rule, fmt.dtype
    if not isinstance(dtype, QDtype) and not rule.symmetric:
        raise EvenbitsError(f"{spelling!r}: only integer types have affine formats.")
    if isinstance(dtype, Codebook) and 0.0 not in dtype.values:
        raise EvenbitsError(f"{spelling!r}: {dtype.name} has no zero; it is what the outliers of pairs are written in.")
    if rule.full_range and not (rule.symmetric and dtype.signed):
        raise EvenbitsError(f"{spelling!r}: the {_half_range(dtype)} convention is for signed symmetric formats only.")
    if rule.symmetric and not rule.zero_exact:
        raise EvenbitsError(f"{spelling!r}: 'free' belongs to affine formats; spell it {spelling + ':affine'!r}.")
    if isinstance(dtype, PairType) and fmt.granularity.kind == "axis":
        raise EvenbitsError(f"{spelling!r}: pairs run along the last dimension; use row, tensor or gN.")
    if rule.range == "3sigma" and not isinstance(dtype, PairType):
        raise EvenbitsError(f"{spelling!r}: '3sigma' is for pairs.")
    if isinstance(dtype, PairType) and dtype.kind == "mix" and fmt.granularity.kind != "group":
        raise EvenbitsError(f"{spelling!r}: a kind for each group needs groups, such as 'ovp4-mix:g32'.")


def _half_range(dtype: ElementType) -> str:
    return f"{(dtype.qmax - dtype.qmin) / 2:g}" if isinstance(dtype, QDtype) else ""


def _with_option(rule: ScaleRule, option: str, dtype: ElementType, spelling: str) -> ScaleRule:
    if option == "affine":
        return replace(rule, symmetric=False)
    if option == "free":
        return replace(rule, zero_exact=False)
    if option in POLICIES and isinstance(dtype, PairType):
        return replace(rule, policy=option)
    if option in ("mse", "minmax", "3sigma"):
        return replace(rule, range=option)  # type: ignore[arg-type]
    if option and option == _half_range(dtype):
        return replace(rule, full_range=True)
    match = _PERCENTILE.fullmatch(option)
    if match and 50 < float(match[1]) <= 100:
        return replace(rule, range="percentile", percentile=float(match[1]))
    raise EvenbitsError(f"{spelling!r}: unknown option {option!r}. Allowed: {_options_of(dtype)}.")


def _options_of(dtype: ElementType) -> str:
    allowed = ["affine", "free"] if isinstance(dtype, QDtype) else []
    allowed += ["mse", "minmax", "pN with 50 < N <= 100 (such as p99.9)"]
    allowed += ["3sigma", *POLICIES] if isinstance(dtype, PairType) else []
    half = _half_range(dtype)
    allowed += [f"{half} (scale = absmax / {half})"] if half and dtype.signed else []
    return ", ".join(allowed)
