"""Running mean squares: what batches, order, layout and type must not change, against numpy in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from evenbits.errors import EvenbitsError
from evenbits.observers.calibrate import channel_ranges
from evenbits.observers.second_moment import SecondMoment


def _seen(*batches: torch.Tensor, dim: int = -1) -> SecondMoment:
    moment = SecondMoment()
    for batch in batches:
        moment.update(batch, dim)
    return moment


def _oracle(x_MC: np.ndarray) -> list[float]:
    return pytest.approx((x_MC.astype(np.float64) ** 2).mean(axis=0).astype(np.float32).tolist(), rel=1e-6)  # type: ignore[no-any-return]


@given(
    x=arrays(np.float32, (12, 3), elements=st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False)),
    cuts=st.lists(st.integers(0, 12), max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_batches_and_their_order_do_not_matter(x: np.ndarray, cuts: list[int], order: object) -> None:
    edges = [0, *sorted(cuts), 12]
    parts = [torch.from_numpy(x[a:b]) for a, b in itertools.pairwise(edges)]  # some of them empty
    order.shuffle(parts)  # type: ignore[attr-defined]
    assert _seen(*parts).mean.tolist() == _oracle(x)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5), (2, 1, 3, 5)])
def test_last_dimension_of_any_rank(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    mean = _seen(x).mean
    assert mean.tolist() == _oracle(x.reshape(-1, 5).numpy())
    assert mean.dtype == torch.float32 and mean.shape == (5,)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolution_channels(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=memory_format)
    expected = (x.numpy().astype(np.float64) ** 2).mean(axis=(0, 2, 3))
    for dim in (1, -3):
        assert _seen(x, dim=dim).mean.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    apart = _seen(x[0], x[1], dim=-3)  # unbatched
    assert apart.mean.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_types_are_added_up_in_float64(dtype: torch.dtype) -> None:
    x = (torch.randn(300, 4) * 200).to(dtype)  # squares beyond float16, sums beyond bfloat16's digits
    assert _seen(x[:100], x[100:]).mean.tolist() == _oracle(x.double().numpy())


def test_a_million_small_numbers_are_not_lost_beside_a_large_one() -> None:
    big, small = torch.full((1, 2), 1e4), torch.full((1000, 2), 0.1)
    mean = _seen(big, *[small] * 50).mean
    square = float(np.float32(0.1)) ** 2
    assert mean.tolist() == pytest.approx([(1e8 + 50_000 * square) / 50_001] * 2, rel=1e-7)


def test_layouts() -> None:
    base = torch.randn(7, 6)
    for view in (base.t(), base[::2], base[:, 1:4], base.flip(1), base[:1].expand(4, 6)):
        assert _seen(view).mean.tolist() == _oracle(view.numpy())


def test_what_is_written_into_the_input_later_does_not_count() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0]])
    moment = _seen(x)
    x.zero_()
    assert moment.mean.tolist() == [1, 4, 9]
    assert not _seen(torch.ones(2, 3, requires_grad=True) * 2).mean.requires_grad


def test_empty_batches_are_no_data() -> None:
    moment = _seen(torch.zeros(0, 4), torch.zeros(2, 0, 4))
    assert not moment.seen
    with pytest.raises(EvenbitsError, match="no calibration data reached this layer"):
        _ = moment.mean
    moment.update(torch.full((1, 3), 2.0))
    moment.update(torch.zeros(0, 3))
    assert moment.seen and moment.mean.tolist() == [4, 4, 4]


def test_moments_are_collected_in_the_pass_that_collects_ranges() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Linear(4, 2))
    batches = [torch.randn(2, 3, 2, 2) for _ in range(3)]
    moments = {"0": SecondMoment(), "2": SecondMoment()}

    def run_all() -> None:
        for batch in batches:
            model(batch)

    ranges = channel_ranges(model, {"0": -3, "2": -1}, run_all, moments)
    everything = torch.cat(batches)
    hidden = model[0](everything).flatten(2).detach().reshape(-1, 4)
    assert moments["0"].mean.tolist() == _oracle(everything.movedim(1, -1).reshape(-1, 3).numpy())
    assert moments["2"].mean.tolist() == pytest.approx(hidden.double().square().mean(0).tolist(), rel=1e-5)
    assert all(bool((moments[name].mean <= ranges[name].absmax.square() * (1 + 1e-6)).all()) for name in moments)
