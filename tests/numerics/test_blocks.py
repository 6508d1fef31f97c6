"""MXFP4 and NVFP4 against plain loops written from the standards: bytes, scales and numbers."""

from __future__ import annotations

import math

import pytest
import torch

from evenbits.numerics.encode import encode

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # code = index; E2M1
E4M3 = [
    (mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    for exponent in range(16)
    for mantissa in range(8)
][:-1]


def _nearest(value: float, table: list[float]) -> int:
    """Code of the nearest value; a tie goes to the even code."""
    best = min(abs(value - v) for v in table)
    tied = [code for code, v in enumerate(table) if abs(value - v) == best]
    return next(code for code in tied if code % 2 == 0) if len(tied) > 1 else tied[0]


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _element(x: float, scale: float) -> int:
    u = _float32(x / scale)
    code = _nearest(abs(u), FP4)
    return code | 8 if u < 0 and code else code


def _blocks(row: list[float], size: int) -> list[list[float]]:
    padded = row + [0.0] * (-len(row) % size)
    return [padded[i : i + size] for i in range(0, len(padded), size)]


def _bytes(codes: list[int]) -> list[int]:
    return [codes[i] | codes[i + 1] << 4 for i in range(0, len(codes), 2)]


def _numbers(codes: list[int], scale: float) -> list[float]:
    return [_float32(math.copysign(FP4[code & 7], -1 if code & 8 else 1) * scale) for code in codes]


def _samples(columns: int) -> torch.Tensor:
    x = torch.randn(4, columns) * torch.tensor([[1e-3], [1.0], [300.0], [1.0]])
    x[3, : columns // 2] = 0
    x[1, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -6.0])[:columns]  # ties
    return x


@pytest.mark.parametrize("columns", [32, 64, 40, 7])
def test_mxfp4(columns: int) -> None:
    x = _samples(columns)
    encoded = encode(x, "mxfp4")
    for r, row in enumerate(x.tolist()):
        scales, codes, numbers = [], [], []
        for block in _blocks(row, 32):
            top = max(map(abs, block))
            exponent = math.floor(math.log2(top)) - 2 if top else 0
            scales.append(exponent + 127)
            found = [_element(value, 2.0**exponent) for value in block]
            codes += found
            numbers += _numbers(found, 2.0**exponent)
        assert encoded.scale[r].tolist() == scales
        assert encoded.packed[r].tolist() == _bytes(codes)
        assert encoded.dequantize()[r].tolist() == numbers[:columns]


@pytest.mark.parametrize("columns", [16, 64, 40, 7])
def test_nvfp4(columns: int) -> None:
    """Factor = absmax / (6 · 448); a block's scale is the E4M3 nearest to its absmax / 6 / factor."""
    x = _samples(columns)
    encoded = encode(x, "nvfp4")
    factor = _float32(_float32(float(x.abs().max()) / 6) / 448)
    assert encoded.global_scale.tolist() == [factor]
    for r, row in enumerate(x.tolist()):
        codes, numbers = [], []
        for b, block in enumerate(_blocks(row, 16)):
            top = max(map(abs, block))
            stored = E4M3[max(1, _nearest(_float32(_float32(top / 6) / factor), E4M3))]
            if top == 0:
                stored = float(encoded.scale[r, b].float())  # what it is does not matter
            assert float(encoded.scale[r, b].float()) == stored
            scale = _float32(stored * factor)
            found = [_element(value, scale) for value in block]
            codes += found
            numbers += _numbers(found, scale)
        assert encoded.packed[r].tolist() == _bytes(codes)
        assert encoded.dequantize()[r].tolist() == numbers[:columns]


def test_mxfp4_saturates_between_6_and_8() -> None:
    """The floor rule puts the largest number of a block anywhere in [4, 8) steps; what is above 6 becomes 6."""
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1] = 7.9, -6.5
    encoded = encode(x, "mxfp4")
    assert encoded.scale.tolist() == [[127]]
    assert encoded.dequantize()[0, :3].tolist() == [6, -6, 0]
    assert encode(x, "mxfp4:mse").dequantize()[0, :2].tolist() == [8, -6]
