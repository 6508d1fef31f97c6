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
    # Outlier-victim pairs (method olive): weights, and activations as pairs too, as int8, or left in float.
    "W4A16_OVP": {"weights": "ovp4:row"},
    "W4A8_OVP": {"weights": "ovp4-i8:row", "input_activations": "int8:row"},
    "W4A4_OVP": {"weights": "ovp4:row", "input_activations": "ovp4:tensor", "dynamic": False},
    "W4A4_OVP_DYNAMIC": {"weights": "ovp4:row", "input_activations": "ovp4:row"},
    "W4A16_OVP_G32": {"weights": "ovp4:g32"},
    "W4A8_OVP_G32": {"weights": "ovp4:g32", "input_activations": "int8:row"},
    "W4A4_OVP_G32": {"weights": "ovp4:g32", "input_activations": "ovp4:g32"},
    # As the released code has them: the even outlier stays, scales are searched around three standard deviations.
    "W4A4_OVP_REFERENCE": {
        "weights": "ovp4:row:reference:3sigma",
        "input_activations": "ovp4:tensor:reference:3sigma",
        "dynamic": False,
    },
    # Adaptive types (method ant), and the plain integers both are compared with.
    "W4A4_ANT": {"weights": "ant4:row", "input_activations": "ant4:tensor", "dynamic": False},
    "W4A4": {"weights": "int4:row:mse", "input_activations": "int4:tensor:mse", "dynamic": False},
    "W4A16": {"weights": "int4:g128:mse"},
}
