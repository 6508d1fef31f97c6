"""Pooling of codes against torch's float pooling, and the direct call of byte convolutions against the operation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from evenbits.kernels.conv_u8 import conv2d_u8, max_pool_u8, report_conv


@pytest.mark.parametrize(
    "kernel, stride, padding", [((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 2), (0, 1)), ((1, 1),) * 2 + ((0, 0),)]
)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_pooled_codes_are_the_largest(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], memory: torch.memory_format
) -> None:
    x = torch.randint(0, 256, (2, 5, 9, 11), dtype=torch.uint8).contiguous(memory_format=memory)
    expected = F.max_pool2d(x.float(), kernel, stride, padding).to(torch.uint8)
    assert torch.equal(max_pool_u8(x, kernel, stride, padding), expected)


def test_codes_of_zero_survive_padding() -> None:
    x = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    assert not max_pool_u8(x, (3, 3), (2, 2), (1, 1)).any()


def test_the_direct_call_is_the_operation() -> None:
    if report_conv()[0] != "onednn":
        pytest.skip("byte convolutions run as float ones here, with a warning")
    x = torch.randint(0, 256, (2, 8, 6, 6), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (16, 4, 3, 3), dtype=torch.int8)
    scale, bias = torch.rand(16) / 100, torch.randn(16)
    where = ([1, 1], [1, 1], [1, 1], 2)
    direct = conv2d_u8(x, 0.1, 7, weight, scale, bias, *where, activation="relu", out=(0.2, 3))
    op = torch.ops.evenbits.conv2d_u8(x, 0.1, 7, weight, scale, bias, *where, "relu", 0.2, 3, None, 1.0, 0)
    assert direct.dtype == torch.uint8 and torch.equal(direct, op)
