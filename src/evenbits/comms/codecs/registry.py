"""Codec names to functions that read the rest of the spelling; imported when asked for."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module

from evenbits.comms.codecs.base import Codec
from evenbits.errors import EvenbitsError, unknown_name

# A whole first word ("fp8"), or its letters ("int" of "int4:g128").
CODECS: dict[str, str] = {
    "raw": "evenbits.comms.codecs.cast:cast",
    "fp16": "evenbits.comms.codecs.cast:cast",
    "bf16": "evenbits.comms.codecs.cast:cast",
    "fp8": "evenbits.comms.codecs.cast:cast",
    "hadamard": "evenbits.comms.codecs.hadamard:hadamard",
    "int": "evenbits.comms.codecs.grouped:grouped",
    "uint": "evenbits.comms.codecs.grouped:grouped",
    "lloyd": "evenbits.comms.codecs.lloyd:lloyd",
    "lowrank": "evenbits.comms.codecs.lowrank:lowrank",
    "multi": "evenbits.comms.codecs.multi:multi",
    "sign": "evenbits.comms.codecs.sign:sign",
    "top": "evenbits.comms.codecs.topk:top",
}
# What is no codec's word is a number format: TYPE:GRANULARITY, or one of the blocks.
_FORMATS = "evenbits.comms.codecs.formats:formatted"
BLOCKS = ("mxfp4", "nvfp4")


@cache
def get(spec: str) -> Codec:
    """The codec of a spelling, such as "int8:g128". Raises EvenbitsError for a spelling that no codec reads."""
    if not isinstance(spec, str):
        raise EvenbitsError(f"a codec is named by a string, such as 'int8:g128'; given {type(spec).__name__}.")
    word = spec.partition("+")[0]
    letters = re.match(r"[a-z]*", word)
    name = word if word in CODECS else letters[0] if letters else ""
    if name not in CODECS and ":" not in word and word not in BLOCKS:
        raise unknown_name("codec", word, [*CODECS, *BLOCKS])
    module, _, function = CODECS.get(name, _FORMATS).partition(":")
    codec: Codec = getattr(import_module(module), function)(spec)
    return codec
