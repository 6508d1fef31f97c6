"""Quantized linear layers under torch.compile without graph breaks, and strict torch.export."""

from __future__ import annotations

import pytest
import torch

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.nn.linear import QLinear
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format

SCHEMES = {
    "W8A8": ("int8:row", "int8:row"),
    "W8A8 static": ("int8:row", "int8:tensor"),
    "W8A8 static affine": ("int8:row", "int8:tensor:affine"),
    "W8A16": ("int8:row", None),
    "W4A16": ("int4:g16", None),
    "NF4": ("nf4:row", None),
    "W4A16 affine": ("uint4:row:affine", None),
    "W4A8_OVP": ("ovp4-int:row", "int8:row"),
    "W4A8_OVP static": ("ovp4-int:row", "int8:tensor"),
    "W4A8 groups": ("int4:g16", "int8:row"),
}


def _layer(scheme: str) -> QLinear:
    weight, activation = SCHEMES[scheme]
    quantizer = None
    if activation is not None:
        static = "static" in scheme
        zero = torch.tensor([3], dtype=torch.int32) if static and "affine" in activation else None
        quantizer = ActivationQuantizer(Format.parse(activation), torch.tensor([0.03]) if static else None, zero)
    return QLinear(encode(torch.randn(6, 32), weight), (6, 32), torch.randn(6), quantizer)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_in_one_graph(scheme: str) -> None:
    torch._dynamo.reset()
    layer = _layer(scheme)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 7):
        x = torch.randn(rows, 32)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_strict_export(scheme: str) -> None:
    torch._dynamo.reset()
    layer, rows = _layer(scheme), torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(3, 32),), dynamic_shapes=({0: rows},), strict=True)
    x = torch.randn(9, 32)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-6, atol=1e-6)
