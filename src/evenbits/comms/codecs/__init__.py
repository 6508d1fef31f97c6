"""The codecs, by the first word of their spelling. A codec is one file and one line here.

`get("int4:g128")`, `get("top0.1+int8:g128")`, … : parts are joined by "+", read from left to right as they are applied.
Words that are no codec's own are number formats (numerics/format.py), which travel unchanged.
"""

from __future__ import annotations

from evenbits.comms.codecs.base import Codec
from evenbits.comms.codecs.registry import CODECS, get

__all__ = ["CODECS", "Codec", "get"]
