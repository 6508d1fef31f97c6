"""Codec names to functions that read the rest of the spelling; imported when asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from evenbits.comms.codecs.base import Codec
from evenbits.errors import EvenbitsError, unknown_name

CODECS: dict[str, str] = {
    "raw": "evenbits.comms.codecs.cast:cast",
    "fp16": "evenbits.comms.codecs.cast:cast",
    "bf16": "evenbits.comms.codecs.cast:cast",
}


@cache
def get(spec: str) -> Codec:
    """The codec of a spelling, such as "bf16". Raises EvenbitsError for a name that is not in `CODECS`."""
    if not isinstance(spec, str):
        raise EvenbitsError(f"a codec is named by a string, such as 'int8:g128'; given {type(spec).__name__}.")
    name = spec.partition(":")[0].partition("+")[0]
    if name not in CODECS:
        raise unknown_name("codec", name, CODECS)
    module, _, function = CODECS[name].partition(":")
    codec: Codec = getattr(import_module(module), function)(spec)
    return codec
