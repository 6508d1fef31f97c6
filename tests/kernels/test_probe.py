"""Timing shapes: who wins by a wide margin is told so, each shape once, within the time, in CPU or wall time."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional as F

from evenbits.errors import EvenbitsError
from evenbits.kernels.probe import Shape, Speed, alternate, float_operation, probe, quantile

SMALL = Shape("Linear", (64, 256), (8, 256))


def busy(x: torch.Tensor) -> torch.Tensor:
    for _ in range(30):
        y = x @ x.t()
    return y


def test_a_slower_operation_loses_and_a_lighter_one_wins() -> None:
    shapes = [Shape("Linear", (512, 512), (64, 512)), SMALL]
    slow = probe(shapes, lambda _: busy, seconds=1.0)
    assert set(slow) == set(shapes)
    assert all(speed.ratio < 1 and not speed.wins for speed in slow.values())
    fast = probe(shapes[:1], lambda _: lambda x: x, seconds=0.5)[shapes[0]]
    assert fast.wins and fast.certain and fast.low <= fast.high and fast.rounds >= 5


def test_the_same_operation_is_about_even() -> None:
    shape = Shape("Linear", (512, 512), (32, 512))
    found = probe([shape], float_operation, seconds=1.0)[shape]
    assert 0.5 < found.ratio < 2


def test_each_shape_is_built_once() -> None:
    built: list[Shape] = []

    def build(shape: Shape) -> object:
        built.append(shape)
        return lambda x: x

    probe([SMALL, SMALL, Shape("Linear", (64, 256), (9, 256))], build, seconds=0.2)  # type: ignore[arg-type]
    assert len(built) == 2


def test_time_is_bounded_and_rounds_are_not_too_few() -> None:
    start = time.perf_counter()
    found = alternate([lambda: time.sleep(0.02), lambda: time.sleep(0.01)], seconds=0.3)
    assert time.perf_counter() - start < 10
    assert len(found.seconds[0]) == len(found.seconds[1]) >= 5


def test_one_thread_counts_cpu_time_and_more_threads_wall_time() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        asleep = alternate([lambda: time.sleep(0.01)], seconds=0.1)
        assert asleep.clock == "CPU" and asleep.typical(0) < 0.005
        torch.set_num_threads(2)
        waiting = alternate([lambda: time.sleep(0.01)], seconds=0.1)
        assert waiting.clock == "wall" and waiting.typical(0) == min(waiting.seconds[0]) >= 0.01
    finally:
        torch.set_num_threads(threads)


def test_convolutions_run_with_their_geometry() -> None:
    shape = Shape(
        "Conv2d", (8, 2, 3, 3), (2, 4, 9, 9), bias=False, stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=2
    )
    y = float_operation(shape)(torch.randn(shape.input))
    assert y.shape == F.conv2d(torch.zeros(2, 4, 9, 9), torch.zeros(8, 2, 3, 3), None, 2, 1, 1, 2).shape
    assert str(shape) == "Conv2d 8×2×3×3 on 2×4×9×9"


def test_certainty_is_agreement_of_the_quartiles() -> None:
    common = {"rounds": 9, "threads": 1, "clock": "CPU"}
    assert Speed(2, 1, 2.0, 1.8, 2.2, **common).certain  # type: ignore[arg-type]
    assert Speed(1, 2, 0.5, 0.4, 0.6, **common).certain  # type: ignore[arg-type]
    assert not Speed(1, 1.1, 0.9, 0.8, 1.2, **common).certain  # type: ignore[arg-type]


def test_quantiles_are_interpolated() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0, 5.0], 0.25) == 2.0 and quantile([1.0, 2.0], 0.5) == 1.5


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(EvenbitsError, match="nothing to time"):
        alternate([], seconds=1)
    with pytest.raises(EvenbitsError, match="ConvTranspose2d"):
        float_operation(Shape("ConvTranspose2d", (1, 1, 1, 1), (1, 1, 1, 1)))
