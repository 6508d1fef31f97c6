"""The methods, by name. A method is one file of pure tensor functions and one line here.

`ALGORITHMS` maps a name to "module:function"; nothing is imported before it is asked for. Packages outside evenbits add
theirs through the entry-point group `evenbits.algorithms`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from evenbits.errors import EvenbitsError, unknown_name

ALGORITHMS: dict[str, str] = {
    "rtn": "evenbits.algorithms.rtn:rtn",
    "smoothquant": "evenbits.algorithms.smoothquant:smoothquant",
}


def get(name: str) -> Any:
    """The method function `name`, marked by one of the decorators of `algorithms.base`. Raises EvenbitsError."""
    table = dict(ALGORITHMS) | {entry.name: entry.value for entry in entry_points(group="evenbits.algorithms")}
    if name not in table:
        raise unknown_name("method", name, table)
    module, _, attribute = table[name].partition(":")
    function = getattr(import_module(module), attribute)
    if not hasattr(function, "kind"):
        raise EvenbitsError(
            f"method {name!r} ({table[name]}) is not marked by a decorator of evenbits.algorithms.base."
        )
    return function
