"""The worked numbers of our users' own note on INT8, and where the note is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evenbits.kernels.ops import int8_matmul
from evenbits.numerics.encode import encode
from evenbits.numerics.metrics import mse

W = torch.tensor([[0.6839, 0.4741, 0.7451], [0.9301, 0.1742, 0.6835]])
W8 = torch.tensor([[0.0806, 0.7589, 0.6038], [0.3815, 0.5040, 0.7174]])
X8 = torch.tensor(
    [[0.5444, 0.5826, 0.7772, 0.5555], [0.3740, 0.3253, 0.0698, 0.1381], [0.5972, 0.0086, 0.0737, 0.8298]]
)


def test_per_tensor_affine() -> None:
    encoded = encode(W, "uint8:tensor:affine:free")
    assert float(encoded.scale) == pytest.approx(0.00296431384, abs=5e-12)
    assert encoded.zero_point.tolist() == [-59]
    assert encoded.zero_point.dtype == torch.int32
    assert encoded.codes().tolist() == [[172, 101, 192], [255, 0, 172]]
    assert mse(W, encoded.dequantize()) == pytest.approx(7.39e-7, abs=5e-10)


def test_per_channel_affine_done_right() -> None:
    encoded = encode(W, "uint8:row:affine:free")
    spans = [(0.7451 - 0.4741) / 255, (0.9301 - 0.1742) / 255]
    assert encoded.scale.flatten().tolist() == pytest.approx(spans, rel=1e-6)
    assert encoded.zero_point.tolist() == [[-446], [-59]]
    assert encoded.zero_point.dtype == torch.int32
    assert encoded.codes().tolist() == [[198, 0, 255], [255, 0, 172]]
    assert mse(W, encoded.dequantize()) == pytest.approx(4.71e-7, abs=5e-10)


def test_dividing_max_alone_wastes_most_codes() -> None:
    """scale = max/255 with the zero point of min: correct only where min = 0. Steps are max/(max − min) too wide."""
    w = W.double().numpy()
    low, high = w.min(axis=1, keepdims=True), w.max(axis=1, keepdims=True)
    scale = high / 255
    zero = -np.rint(low / scale)
    codes = np.clip(np.rint(w / scale) + zero, 0, 255)
    assert codes.max(axis=1).tolist() == [93, 207]  # of 255: two thirds and a fifth of the codes are never used
    wrong = float(((scale * (codes - zero) - w) ** 2).mean())
    right = mse(W, encode(W, "uint8:row:affine:free").dequantize())
    assert wrong > 1.15 * right
    assert (scale / ((high - low) / 255)).flatten() == pytest.approx([2.749, 1.230], abs=1e-3)
    # Six numbers flatter it. Over all numbers of the first row's range the squared error is 2.749² times as large.
    dense = torch.linspace(0.4741, 0.7451, 10001)
    coarse = np.rint(dense.double().numpy() / scale[0]) * scale[0]
    ratio = float(((coarse - dense.double().numpy()) ** 2).mean())
    ratio /= mse(dense, encode(dense, "uint8:tensor:affine:free").dequantize())
    assert ratio == pytest.approx(2.749**2, rel=0.03)


def test_forcing_zero_inside_costs_resolution_here() -> None:
    forced = encode(W, "uint8:tensor:affine")
    assert float(forced.scale) == pytest.approx(0.9301 / 255, rel=1e-6)
    assert forced.zero_point.tolist() == [0]
    assert forced.zero_point.dtype == torch.uint8
    assert forced.codes().tolist() == [[188, 130, 204], [255, 48, 187]]


def test_symmetric_codes_and_integer_product() -> None:
    w, x = encode(W8, "int8:tensor"), encode(X8, "int8:tensor")
    assert w.codes().tolist() == [[13, 127, 101], [64, 84, 120]]
    assert x.codes().tolist() == [[83, 89, 119, 85], [57, 50, 11, 21], [91, 1, 11, 127]]
    assert float(w.scale) == pytest.approx(0.0059755, abs=0.00005 / 127)
    assert float(x.scale) == pytest.approx(0.0065338, abs=0.00005 / 127)
    product = int8_matmul(w.codes(), x.codes().t())
    assert product.dtype == torch.int32
    assert product.tolist() == [[17509, 7608, 4055, 16599], [21020, 10016, 9860, 22444]]
    assert (product * (w.scale * x.scale)).sub(W8 @ X8).abs().max() < 0.01


@pytest.mark.parametrize(
    ("spelling", "levels", "codes"),
    [
        ("int8:tensor", 127, [[13, 127, 101], [64, 84, 120]]),
        ("int8:tensor:127.5", 127.5, [[14, 127, 101], [64, 85, 121]]),
        ("int4:tensor", 7, [[1, 7, 6], [4, 5, 7]]),
        ("int4:tensor:7.5", 7.5, [[1, 7, 6], [4, 5, 7]]),
    ],
)
def test_both_conventions(spelling: str, levels: float, codes: list[list[int]]) -> None:
    encoded = encode(W8, spelling)
    assert float(encoded.scale) == float(np.float32(0.7589) / np.float32(levels))
    assert encoded.codes().tolist() == codes
    negative = encode(-W8, spelling).codes()
    assert int(negative.min()) == (-127 if levels == 127 else -128 if levels == 127.5 else -7 if levels == 7 else -8)
