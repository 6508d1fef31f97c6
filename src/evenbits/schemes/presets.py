"""Schemes with a name. In each the output head (`lm_head`) stays in float, as everywhere in the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # One scale per output row; activations: one scale per token, from each input. No calibration needed.
    "W8A8": {"weights": "int8:row", "input_activations": "int8:row", "dynamic": True},
    # One calibrated activation scale per layer. Fastest, and what outlier channels hurt most: use a balance method.
    "W8A8_STATIC": {"weights": "int8:row", "input_activations": "int8:tensor", "dynamic": False},
    # Weights only: bytes are saved, the product is computed in float.
    "W8A16": {"weights": "int8:row"},
    "W4A16": {"weights": "int4:g128:mse"},
}
