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
    "ant": "evenbits.algorithms.ant:ant",
    "by_format": "evenbits.algorithms.by_format:by_format",
    "olive": "evenbits.algorithms.olive:olive",
    "repair": "evenbits.algorithms.repair:repair",
    "rtn": "evenbits.algorithms.rtn:rtn",
    "smoothquant": "evenbits.algorithms.smoothquant:smoothquant",
}


def get(name: str) -> Any:
    """The method function `name`, marked by one of the decorators of `algorithms.base`. Raises EvenbitsError."""
    # A name of our own is never taken over by another package.
    table = {entry.name: entry.value for entry in entry_points(group="evenbits.algorithms")} | ALGORITHMS
    if name not in table:
        raise unknown_name("method", name, table)
    module, _, attribute = table[name].partition(":")
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise EvenbitsError(f"method {name!r} is registered as {table[name]!r}, which fails: {error}") from error
    if not hasattr(function, "kind"):
        raise EvenbitsError(
            f"method {name!r} ({table[name]}) is not marked by a decorator of evenbits.algorithms.base."
        )
    return function
