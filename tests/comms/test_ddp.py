"""The DDP hook on gloo, in real processes, against the same algorithm in one process."""

from __future__ import annotations

from pathlib import Path

import ddp_work
import pytest
import torch
from ranks import run, values

SHAPES = {name: p.shape for name, p in ddp_work.Net().named_parameters()}


def tensors(gradients: dict[str, list[float]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values).view(SHAPES[name]) for name, values in gradients.items()}


@pytest.mark.parametrize(
    ("world", "view", "feedback", "codec"),
    [
        (2, False, True, "int4:g32"),
        (2, True, False, "int8:g32"),
        (4, True, True, "top0.25+int8:g32"),
        (4, False, True, "int2:g32"),
        (2, False, False, "raw"),
    ],
)
def test_gradients_are_those_of_the_algorithm_bit_by_bit(world: int, view: bool, feedback: bool, codec: str) -> None:
    """Two steps: in the second one DDP has rebuilt its buckets, and errors of the first one are added."""
    results = values(run(ddp_work.one_step, world, view, feedback, codec, 2))
    errors: list[dict[str, torch.Tensor]] = [{} for _ in range(world)]
    for step in range(2):
        if not feedback:
            errors = [{} for _ in range(world)]
        means = ddp_work.expected([tensors(found[step][0]) for found, _ in results], errors, codec, small=100)
        for found, _ in results:
            made = tensors(found[step][1])
            assert set(made) == set(SHAPES)
            for name, mean in means.items():
                assert torch.equal(made[name], mean), (step, name)


def test_one_rank_sends_nothing_and_changes_nothing() -> None:
    ((found, sent),) = values(run(ddp_work.one_step, 1, False, True, "int2:g32", 1))
    assert sent == 0 and found[0][0] == found[0][1]


@pytest.mark.parametrize(("codec", "view"), [("int4:g32", True), ("int2:g32:stochastic", False)])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, codec: str, view: bool) -> None:
    """The new process starts with DDP's first bucket layout, the old one had rebuilt its buckets."""
    whole = values(run(ddp_work.train, 2, 0, 6, str(tmp_path), codec, view))
    again = values(run(ddp_work.train, 2, 3, 6, str(tmp_path), codec, view))
    assert whole[0][1] == whole[1][1], "all ranks have the same parameters"
    for (losses, digest), (losses2, digest2) in zip(whole, again, strict=True):
        assert losses[3:] == losses2 and digest == digest2


def test_training_with_few_bits_and_feedback_ends_near_training_without() -> None:
    codecs = ["none", "raw", "int8:g32", "int4:g32|feedback", "int2:g32|feedback"]
    one, two = values(run(ddp_work.compare, 2, codecs, 40))
    assert one == two
    loss = {codec: value for codec, (value, _) in one.items()}
    start = 0.5
    assert loss["none"] < 0.5 * start
    assert loss["raw"] == pytest.approx(loss["none"], rel=1e-4)
    for codec in codecs[2:]:
        assert abs(loss[codec] - loss["none"]) < 0.1 * loss["none"], (codec, loss)


def test_a_nan_on_one_rank_stops_all_and_the_next_batch_goes_on() -> None:
    one, two = values(run(ddp_work.nan, 2))
    for steps in (one, two):
        name, text, seconds = steps[1]
        assert name == "AgreedError" and "rank(s) [1] could not code their gradients" in text and seconds < 10
    assert [steps for steps in one if isinstance(steps, str)] == [steps for steps in two if isinstance(steps, str)]
    assert isinstance(one[3], str)


def test_settings_that_differ_are_one_error() -> None:
    for kind, text in run(ddp_work.differing, 2):
        assert kind == "AgreedError" and "differ in 'codec': rank 0 has int8:g32, rank 1 has int4:g32" in text


def test_telemetry_sees_both_codings() -> None:
    for lines in values(run(ddp_work.measured, 2)):
        assert {direction for direction, *_ in lines} == {"reduce", "gather"}
        coded = sum(shape.numel() for shape in SHAPES.values() if shape.numel() >= 100)
        assert sum(elements for direction, _, elements, _ in lines if direction == "reduce") == coded
        assert all(codec == "int4:g32" and 10 < snr < 40 for _, codec, _, snr in lines)
