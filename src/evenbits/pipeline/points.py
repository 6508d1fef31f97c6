"""The points of an α sweep: float, no smoothing, α = auto, and every α of a range or a list."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evenbits import algorithms
from evenbits.algorithms.alpha import CRITERIA, AlphaGrid
from evenbits.errors import EvenbitsError, unknown_name
from evenbits.pipeline.methods import SEARCH_ONLY, Methods

_MOST = 1000
_FORMS = "give LOW:HIGH:STEP, such as 0.05:0.95:0.05, or a list, such as 0.3,0.5,0.7"


@dataclass(frozen=True)
class Point:
    """One model to make and score. name: "float", "none", "auto" or α; method: None for float."""

    name: str
    alpha: float | None
    method: str | None
    options: Mapping[str, Any]

    @property
    def label(self) -> str:
        """As it is called in tables and messages."""
        return (
            {"none": "no smoothing", "auto": "α = auto"}.get(self.name, self.name)
            if self.alpha is None
            else (f"α = {self.name}")
        )


def parse_alphas(text: str | float | Sequence[float]) -> tuple[float, ...]:
    """`LOW:HIGH:STEP` or a comma list (or numbers) as ascending α. Raises EvenbitsError for anything else."""
    if isinstance(text, str) and ":" in text:
        numbers = _numbers(text, text.split(":"))
        if len(numbers) != 3:
            raise EvenbitsError(f"alpha {text!r} has {len(numbers)} numbers; {_FORMS}.")
        low, high, step = numbers
        grid = AlphaGrid(low, high, step).checked()
        if (high - low) / step > _MOST:
            raise EvenbitsError(f"alpha {text!r} is more than {_MOST} points; take a larger step.")
        return grid.values
    given = text.split(",") if isinstance(text, str) else [text] if isinstance(text, (int, float)) else list(text)
    values = _numbers(text, given)
    outside = [value for value in values if not 0.0 <= value <= 1.0]
    if outside or not values:
        raise EvenbitsError(f"alpha runs from 0 to 1; given {outside[0] if outside else 'nothing'}; {_FORMS}.")
    if len({_name(value) for value in values}) < len(values):
        raise EvenbitsError(f"alpha {text!r} names a value twice; give each once.")
    return tuple(sorted(values))


def _numbers(text: Any, parts: Sequence[Any]) -> list[float]:
    try:
        values = [float(part) for part in parts]
    except (TypeError, ValueError):
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise EvenbitsError(f"alpha {text!r} is not a range or a list of numbers; {_FORMS}.")
    return values


def _name(alpha: float) -> str:
    return f"{alpha:.6g}"


def make_points(alphas: Sequence[float], method: str, options: Mapping[str, Any], *, auto: bool) -> tuple[Point, ...]:
    """Baselines first, so that every α can be compared as soon as it is done.

    Raises EvenbitsError for a method that has no α, and for options that it does not have.
    """
    if "alpha" in options:
        raise EvenbitsError("the option alpha is what a sweep varies; give the values as alpha=…")
    if options.get("criterion", CRITERIA[0]) not in CRITERIA:
        raise unknown_name("criterion", str(options["criterion"]), CRITERIA)
    unused = [name for name in SEARCH_ONLY if name in options and not auto]
    if unused:
        raise EvenbitsError(
            f"option {unused[0]!r} says how α is searched, and auto=False (--no-auto) leaves the search out. Leave out "
            "one of them."
        )
    plain = {name: value for name, value in options.items() if name not in SEARCH_ONLY}
    Methods.parse(method, {**options, "alpha": "auto"})
    unsmoothed = "+".join(part for part in method.split("+") if algorithms.get(part).kind == "weight") or "rtn"
    parsed = Methods.parse(method, plain)
    of_weights = parsed.weight_options | ({"bias_correction": True} if parsed.bias_correction else {})
    points = [Point("float", None, None, {}), Point("none", None, unsmoothed, of_weights)]
    if auto:
        points.append(Point("auto", None, method, {**options, "alpha": "auto"}))
    points += [Point(_name(alpha), alpha, method, {**plain, "alpha": float(_name(alpha))}) for alpha in alphas]
    return tuple(points)
