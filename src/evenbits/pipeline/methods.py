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
SEARCH_ONLY = ("criterion", *_TUNING)  # they say how `auto` searches
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
    def parse(name: str, options: Mapping[str, Any], scheme: Scheme | None = None) -> Methods:
        """Raises EvenbitsError for an unknown method or option, for two methods of one kind, for options of a search
        that there is none of, and, given the scheme, for options that none of its formats has a use for."""
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
                allowed = [*_defaults(weight), *_defaults(balance), *(_TUNING if balance is not None else ()), *_ALWAYS]
                raise unknown_name(f"option of method {name!r}:", option, allowed)
        tuning = Tuning(**split["tuning"])
        _check_search(balance, options)
        if scheme is not None and weight is algorithms.get("by_format"):
            _check_pairs(split["weight"], scheme)
        criterion = split["balance"].get("criterion", "loss")
        if tuning.scope == "block" and criterion != "loss":
            raise EvenbitsError(
                f"criterion {criterion!r} joins the α that suit each layer, and scope 'block' has none of them: it "
                "gives a block one α by the block's output. Use scope 'region', or criterion 'loss'."
            )
        return Methods(name, dict(options), weight, balance, split["weight"], split["balance"], tuning, correction)


def _check_pairs(options: Mapping[str, Any], scheme: Scheme) -> None:
    """Raises EvenbitsError for options of `by_format`, which are those of pairs, where no layer has pairs."""
    default = _defaults(algorithms.get("by_format"))
    unused = [name for name, value in options.items() if value != default[name]]
    if unused and not any(_suited(formats) == "olive" for formats in scheme.formats):
        raise EvenbitsError(
            f"option {unused[0]!r} is for layers of outlier-victim pairs, and this scheme has none. Leave it out, or "
            "give layers a format such as ovp4:row."
        )


def _check_search(balance: Any | None, options: Mapping[str, Any]) -> None:
    """Raises EvenbitsError if options say how α is searched, and it is a number."""
    default = _defaults(balance) | {name: getattr(Tuning, name) for name in _TUNING}
    if "alpha" not in default:
        return
    alpha = options.get("alpha", default["alpha"])
    unused = [name for name in SEARCH_ONLY if options.get(name, default[name]) != default[name]]
    if unused and not isinstance(alpha, str):
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


def _defaults(function: Any) -> dict[str, Any]:
    """The options of a method, and what they are if not given."""
    if function is None:
        return {}
    keyword = inspect.Parameter.KEYWORD_ONLY
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is keyword}


def _own(function: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _defaults(function) if name in options}
