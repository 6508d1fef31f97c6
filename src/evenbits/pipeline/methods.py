"""Method names to functions: "smoothquant", "rtn", "smoothquant+rtn". A balance method alone is followed by `rtn`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evenbits import algorithms
from evenbits.algorithms.by_format import weight_method_of
from evenbits.errors import EvenbitsError, unknown_name
from evenbits.schemes.scheme import LayerFormats, Scheme


@dataclass(frozen=True)
class Tuning:
    """How a balance method's search is driven. scope: "region", each by its layers' outputs, or "block": all regions of
    a block share one choice, by the block's output. sequential: blocks are tuned in order of the forward, and later
    ones see the quantized outputs of those before them."""

    scope: str = "region"
    sequential: bool = False

    def __post_init__(self) -> None:
        if self.scope not in ("region", "block"):
            raise unknown_name("scope of the search", str(self.scope), ("region", "block"))
        if not isinstance(self.sequential, bool):
            raise EvenbitsError(f"option 'sequential' must be true or false; given {self.sequential!r}.")


_TUNING = ("scope", "sequential")
_SEARCH_DEFAULTS: dict[str, Any] = {"criterion": "loss", "scope": "region", "sequential": False}
SEARCH_ONLY = tuple(_SEARCH_DEFAULTS)  # they say how `auto` searches
_ALWAYS = ("bias_correction",)


@dataclass(frozen=True)
class Methods:
    """The functions of one run and the options of each. bias_correction: of any method (bias_correction.py)."""

    name: str
    options: dict[str, Any]
    weight: Any
    balance: Any | None
    weight_options: dict[str, Any]
    balance_options: dict[str, Any]
    tuning: Tuning
    bias_correction: bool = False

    @staticmethod
    def parse(name: str, options: Mapping[str, Any]) -> Methods:
        """Raises EvenbitsError for an unknown method or option, for two methods of one kind, and for options of a
        search that there is none of."""
        if not isinstance(name, str):
            raise EvenbitsError(f"a method is named by a string, such as 'smoothquant'; given {type(name).__name__}.")
        found: dict[str, Any] = {}
        for part in name.split("+"):
            function = algorithms.get(part)
            if function.kind in found:
                raise EvenbitsError(
                    f"method {name!r} names two {function.kind} methods; join a balance and a weight method."
                )
            found[function.kind] = function
        weight = found.get("weight") or algorithms.get("rtn")
        balance = found.get("balance")
        split = {kind: _own(function, options) for kind, function in (("weight", weight), ("balance", balance))}
        split["tuning"] = {name: options[name] for name in _TUNING if name in options and balance is not None}
        correction = options.get("bias_correction", False)
        if not isinstance(correction, bool):
            raise EvenbitsError(f"option 'bias_correction' must be true or false; given {correction!r}.")
        for option in options:
            if option not in _ALWAYS and not any(option in own for own in split.values()):
                allowed = [*_names(weight), *_names(balance), *(_TUNING if balance is not None else ()), *_ALWAYS]
                raise unknown_name(f"option of method {name!r}:", option, allowed)
        tuning = Tuning(**split["tuning"])
        _check_search(balance, options)
        criterion = split["balance"].get("criterion", "loss")
        if tuning.scope == "block" and criterion != "loss":
            raise EvenbitsError(
                f"criterion {criterion!r} joins the α that suit each layer, and scope 'block' has none of them: it "
                "gives a block one α by the block's output. Use scope 'region', or criterion 'loss'."
            )
        return Methods(name, dict(options), weight, balance, split["weight"], split["balance"], tuning, correction)

    def check(self, scheme: Scheme) -> None:
        """Raises EvenbitsError for options of `by_format` that no format of the scheme has a use for."""
        if self.weight is not algorithms.get("by_format"):
            return
        unused = [name for name, value in self.weight_options.items() if value != _default(self.weight, name)]
        if unused and not any(_suited(formats) == "olive" for formats in scheme.formats):
            raise EvenbitsError(
                f"option {unused[0]!r} is for layers of outlier-victim pairs, and this scheme "
                "has none. Leave it out, or give layers a format such as ovp4:row."
            )


def _check_search(balance: Any | None, options: Mapping[str, Any]) -> None:
    """Raises EvenbitsError if options say how α is searched, and it is a number."""
    own = _names(balance)
    alpha = options.get("alpha", 0.5)
    if "alpha" not in own or isinstance(alpha, str):
        return
    unused = [name for name in SEARCH_ONLY if options.get(name, _SEARCH_DEFAULTS[name]) != _SEARCH_DEFAULTS[name]]
    if unused:
        raise EvenbitsError(
            f"option {unused[0]!r} says how α is searched, and here α is {alpha}. Use alpha='auto', or leave "
            f"{unused[0]} out."
        )


def default_method(scheme: Scheme) -> str:
    """The method that suits a scheme when none is named. Where overrides put pairs or a choice of types beside other
    formats it is `by_format`: each layer by its own format, and no smoothing."""
    found = {_suited(formats) for formats in scheme.formats}
    if len(found) == 1:
        return found.pop()
    return "by_format" if found & {"olive", "ant"} else "smoothquant"


def _suited(formats: LayerFormats) -> str:
    method = weight_method_of(formats.weights)
    activations = formats.input_activations
    smoothed = method == "rtn" and activations is not None and activations.dtype.bits == 8
    return "smoothquant" if smoothed else method


def _names(function: Any) -> list[str]:
    if function is None:
        return []
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is keyword]


def _default(function: Any, name: str) -> Any:
    return inspect.signature(function).parameters[name].default


def _own(function: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _names(function) if name in options}
