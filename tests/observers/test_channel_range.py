"""Running channel ranges: what batches, order, layout and type must not change."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evenbits.errors import EvenbitsError
from evenbits.observers.channel_range import ChannelRange


def _seen(*batches: torch.Tensor, dim: int = -1) -> ChannelRange:
    ranges = ChannelRange()
    for batch in batches:
        ranges.update(batch, dim)
    return ranges


@given(
    x=arrays(np.float32, (12, 3), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    cuts=st.lists(st.integers(0, 12), max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_batches_and_their_order_do_not_matter(x: np.ndarray, cuts: list[int], order: object) -> None:
    edges = [0, *sorted(cuts), 12]
    parts = [torch.from_numpy(x[a:b]) for a, b in itertools.pairwise(edges)]  # some of them empty
    order.shuffle(parts)  # type: ignore[attr-defined]
    ranges = _seen(*parts)
    assert ranges.lo.tolist() == x.min(axis=0).tolist()
    assert ranges.hi.tolist() == x.max(axis=0).tolist()
    assert ranges.absmax.tolist() == np.abs(x).max(axis=0).tolist()


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5), (2, 1, 3, 5)])
def test_last_dimension_of_any_rank(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    ranges = _seen(x)
    flat = x.view(-1, 5).numpy()
    assert ranges.lo.tolist() == flat.min(axis=0).tolist()
    assert ranges.hi.tolist() == flat.max(axis=0).tolist()
    assert ranges.hi.dtype == torch.float32


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolution_channels_in_any_memory_format(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=memory_format)
    for dim in (1, -3):
        ranges = _seen(x, dim=dim)
        assert ranges.hi.tolist() == x.numpy().max(axis=(0, 2, 3)).tolist()
        assert ranges.lo.tolist() == x.numpy().min(axis=(0, 2, 3)).tolist()
    unbatched = _seen(x[1], dim=-3)
    assert unbatched.hi.tolist() == x[1].numpy().max(axis=(1, 2)).tolist()


def test_layouts() -> None:
    base = torch.randn(7, 6)
    for view in (base.t(), base[::2], base[:, 1:4], base.flip(1), base[:1].expand(4, 6)):
        assert _seen(view).hi.tolist() == view.numpy().max(axis=0).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_types(dtype: torch.dtype) -> None:
    x = torch.randn(9, 4).to(dtype)
    ranges = _seen(x)
    assert ranges.lo.dtype == torch.float32
    assert ranges.hi.equal(x.amax(0).float())
    assert ranges.lo.equal(x.amin(0).float())


def test_a_lone_negative_outlier_counts() -> None:
    x = torch.rand(50, 3)
    x[7, 1] = -90.0
    ranges = _seen(x[:30], x[30:])
    assert ranges.absmax[1] == 90
    assert ranges.lo[1] == -90
    assert ranges.absmax[0] == x[:, 0].max()


@pytest.mark.parametrize("shape", [(3,), (1, 3), (1, 1, 3)])
def test_what_is_written_into_the_input_later_does_not_count(shape: tuple[int, ...]) -> None:
    x = torch.tensor([1.0, -2.0, 3.0]).view(shape)
    ranges = _seen(x)
    x.zero_()
    assert ranges.hi.tolist() == [1, -2, 3]
    assert ranges.lo.tolist() == [1, -2, 3]


def test_no_graph_is_kept() -> None:
    assert not _seen(torch.ones(2, 3, requires_grad=True) * 2).hi.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_nan_and_infinity_are_refused_and_leave_no_trace(bad: float, shape: tuple[int, ...]) -> None:
    good = torch.randn(3, 4)
    ranges = _seen(good)
    x = torch.randn(shape) * 100
    x.view(-1)[2] = bad
    with pytest.raises(EvenbitsError, match="NaN or infinite values"):
        ranges.update(x)
    assert ranges.hi.equal(good.amax(0))
    assert ranges.lo.equal(good.amin(0))


def test_another_width_is_refused() -> None:
    ranges = _seen(torch.ones(2, 4))
    with pytest.raises(EvenbitsError, match="5 channels after 4 in an earlier batch"):
        ranges.update(torch.ones(2, 5))
    assert ranges.hi.tolist() == [1] * 4


def test_empty_batches_are_no_data() -> None:
    ranges = _seen(torch.zeros(0, 4), torch.zeros(2, 0, 4))
    assert not ranges.seen
    for name in ("lo", "hi", "absmax"):
        with pytest.raises(EvenbitsError, match="no calibration data reached this layer"):
            getattr(ranges, name)
    ranges.update(torch.ones(1, 3))
    ranges.update(torch.zeros(0, 9))
    assert ranges.seen
    assert ranges.lo.tolist() == [1, 1, 1]  # zero is not drawn in
