"""A number format = data type × granularity × scale rule, with one spelling everywhere.

    DTYPE:GRANULARITY[:OPTION …]       int8:row   int4:g128   uint8:tensor:affine   int8:row:127.5   int4:g32:mse

| option      | meaning                                                                                            |
|-------------|----------------------------------------------------------------------------------------------------|
| (none)      | scale quantization (symmetric): x ≈ scale · code, scale = absmax / 127 at 8 bits (codes −127..127)  |
| `127.5`     | the other convention peers use: scale = absmax / ((qmax − qmin)/2), codes −128..127 (7.5 at 4 bits) |
| `affine`    | x ≈ scale · (code − zero_point), scale = (max − min) / (qmax − qmin)                               |
| `free`      | affine only: the range is taken as it is and zero need not be a code (zero points become int32)    |
| `mse`       | the range is shrunk to the one with the least squared error                                        |
| `p99.9`     | the range is the 99.9th percentile of |x| (affine: of each side)                                   |

The same spelling stands in the API, recipes, checkpoints and on the wire.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from evenbits.errors import EvenbitsError
from evenbits.numerics.granularity import Granularity
from evenbits.numerics.qdtypes import QDtype

_PERCENTILE = re.compile(r"p(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class ScaleRule:
    """How a scale follows from numbers.

    symmetric:  no zero point (scale quantization) or one (affine).
    full_range: False is absmax/127 (codes −127..127), True is absmax/127.5 (codes −128..127).
    zero_exact: zero is inside the range and is a code (affine; always so when symmetric).
    range:      "minmax", "mse" or "percentile".
    """

    symmetric: bool = True
    full_range: bool = False
    zero_exact: bool = True
    range: Literal["minmax", "mse", "percentile"] = "minmax"
    percentile: float = 100.0


@dataclass(frozen=True)
class Format:
    """A number format; `str(format)` and `Format.parse` are inverse."""

    dtype: QDtype
    granularity: Granularity
    rule: ScaleRule = ScaleRule()

    def __str__(self) -> str:
        rule, percent = self.rule, f"p{self.rule.percentile!r}".removesuffix(".0")
        options = [] if rule.symmetric else ["affine"]
        options += [] if rule.zero_exact else ["free"]
        options += [_half_range(self.dtype)] if rule.full_range else []
        options += {"minmax": [], "mse": ["mse"], "percentile": [percent]}[rule.range]
        return ":".join([self.dtype.name, str(self.granularity), *options])

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and largest code this format uses."""
        narrow = self.rule.symmetric and self.dtype.signed and not self.rule.full_range
        return (-self.dtype.qmax if narrow else self.dtype.qmin), self.dtype.qmax

    def fitted(self, shape: tuple[int, ...]) -> Format:
        """This format as it applies to a tensor of `shape` (a group wider than a row becomes the row's width)."""
        return replace(self, granularity=self.granularity.fitted(shape))

    @staticmethod
    def parse(spelling: str | Format) -> Format:
        """`"int4:g128:mse"` → Format. Raises EvenbitsError that names the part that is wrong."""
        if isinstance(spelling, Format):
            return spelling
        if not isinstance(spelling, str) or ":" not in spelling:
            raise EvenbitsError(
                f"a number format is spelled DTYPE:GRANULARITY, such as 'int8:row' or 'int4:g128'; given: {spelling!r}."
            )
        dtype_name, granularity, *options = spelling.split(":")
        dtype = QDtype.parse(dtype_name)
        rule = ScaleRule()
        for option in options:
            rule = _with_option(rule, option, dtype, spelling)
        if rule.full_range and not (rule.symmetric and dtype.signed):
            raise EvenbitsError(
                f"{spelling!r}: the {_half_range(dtype)} convention is for signed symmetric formats only."
            )
        if rule.symmetric and not rule.zero_exact:
            raise EvenbitsError(f"{spelling!r}: 'free' belongs to affine formats; spell it {spelling + ':affine'!r}.")
        fmt = Format(dtype, Granularity.parse(granularity), rule)
        if str(fmt).count(":") != spelling.count(":"):
            raise EvenbitsError(f"{spelling!r}: options repeat or contradict each other; together they say '{fmt}'.")
        return fmt


def _half_range(dtype: QDtype) -> str:
    return f"{(dtype.qmax - dtype.qmin) / 2:g}"


def _with_option(rule: ScaleRule, option: str, dtype: QDtype, spelling: str) -> ScaleRule:
    if option == "affine":
        return replace(rule, symmetric=False)
    if option == "free":
        return replace(rule, zero_exact=False)
    if option == "mse":
        return replace(rule, range="mse")
    if option == _half_range(dtype):
        return replace(rule, full_range=True)
    match = _PERCENTILE.fullmatch(option)
    if match and 50 < float(match[1]) <= 100:
        return replace(rule, range="percentile", percentile=float(match[1]))
    raise EvenbitsError(
        f"{spelling!r}: unknown option {option!r}. Allowed: affine, free, mse, pN with 50 < N <= 100 (such as p99.9), "
        f"{_half_range(dtype)} (scale = absmax / {_half_range(dtype)})."
    )
