"""Round to nearest: the definition, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evenbits.algorithms.rtn import rtn
from evenbits.errors import EvenbitsError
from evenbits.numerics.format import Format


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_is_round_to_nearest(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 21).to(dtype)
    encoded = rtn(weight, Format.parse(f"int{bits}:row"), None)
    values, top = weight.float().numpy(), 2 ** (bits - 1) - 1
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(top)
    if bits < 8:  # scales of rows are stored as float16 (here no factor is needed); codes are taken with those
        assert scale.min() >= 2.0**-13 and scale.max() <= 2.0**15
        scale = scale.astype(np.float16).astype(np.float32)
    assert encoded.scale.tolist() == scale.tolist()
    assert encoded.codes().tolist() == np.clip(np.rint(values / scale), -top, top).tolist()
    assert encoded.dtype == dtype


def test_tiny_rows_of_few_bits_share_a_factor() -> None:
    weight = torch.randn(6, 21) * 1e-7
    encoded = rtn(weight, Format.parse("int4:row"))
    scale = np.abs(weight.numpy()).max(axis=1, keepdims=True) / np.float32(7)
    factor = np.float32(2.0 ** (np.floor(np.log2(scale.max())) - 10))
    assert encoded.global_scale is not None and encoded.global_scale.tolist() == [factor]
    stored = (scale / factor).astype(np.float16)
    assert encoded.scale.tolist() == stored.tolist()
    assert encoded.codes().tolist() == np.rint(weight.numpy() / (stored.astype(np.float32) * factor)).tolist()


def test_groups_are_rounded_alone() -> None:
    weight = torch.randn(4, 10)
    encoded = rtn(weight, Format.parse("int4:g4"))
    for start in (0, 4, 8):
        part = rtn(weight[:, start : start + 4], Format.parse("int4:row"))
        assert encoded.codes()[:, start : start + 4].equal(part.codes())
        assert encoded.scale[:, start // 4 : start // 4 + 1].equal(part.scale)


def test_bad_weights_are_refused() -> None:
    with pytest.raises(EvenbitsError, match="1 of 4 values are NaN or infinite"):
        rtn(torch.tensor([[1.0, 2.0], [float("nan"), 3.0]]), Format.parse("int8:row"))
