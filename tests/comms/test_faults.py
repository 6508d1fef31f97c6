"""What goes wrong on one rank ends on every rank, with one error and without a hang. Real processes."""

from __future__ import annotations

from pathlib import Path

import fault_work
import pytest
from ranks import run, values

from evenbits.comms.faults import NOT_FINITE, NOT_READ, Fault

SLACK = 12.0  # seconds that a busy machine may need beyond a timeout; without an end these tests would take for ever


@pytest.mark.parametrize(
    ("schedule", "where", "way"),
    [("1F1B", 0, "forward"), ("1F1B", 1, "backward"), ("GPipe", 1, "forward"), ("ZBVZeroBubble", 1, "backward")],
)
def test_a_nan_on_one_stage_stops_the_step_on_all_and_the_next_batch_goes_on(
    schedule: str, where: int, way: str
) -> None:
    world = 2 if schedule == "ZBVZeroBubble" else 3
    results = values(run(fault_work.not_finite, world, schedule, where, way))
    words = "the activation to send" if way == "forward" else "the gradient to send"
    for steps in results:
        assert [kind for kind, _ in steps] == ["ok", "AgreedError", "ok", "ok"]
        assert f"stage {where}, microbatch 1: {words} holds NaN or infinite values" in steps[1][1]
        assert "No rank has stepped its optimizer" in steps[1][1]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_cut_payload_is_an_error_on_every_rank(direction: str) -> None:
    receiver = 1 if direction == "forward" else 0
    what = "activation" if direction == "forward" else "gradient"
    for steps in values(run(fault_work.cut, 2, direction)):
        assert isinstance(steps[0], list) and isinstance(steps[2], list), "the steps before and after are whole"
        name, text, seconds = steps[1]
        assert name == "AgreedError" and seconds < 10  # the link's timeout: nobody waited for it
        assert f"stage {receiver}, microbatch 2: the {what} received could not be read" in text
        assert ("arrived without its end" in text) == (steps[0] == [] if receiver == 0 else steps[0] != [])


@pytest.mark.parametrize(
    ("who", "tcp"), [pytest.param(0, False, marks=pytest.mark.slow), (1, False), (2, False), (0, True), (1, True)]
)
def test_a_killed_peer_is_one_error_on_every_other_rank(who: int, tcp: bool) -> None:
    results = run(fault_work.killed, 3, who, link_timeout=8.0, tcp=tcp)
    assert results[who][0] == "killed"
    for rank, (kind, steps) in enumerate(results):
        if rank != who:
            assert kind == "ok", steps
            name, text, seconds = steps[1]
            # A closed connection usually wakes the others at once; where it does not, the link's timeout does.
            assert name == "LinkError" and seconds < 8 + SLACK
            if tcp and who == 0:  # The store died with rank 0: no rank can read what the others wrote.
                assert "the store was lost" in text
            else:
                assert f"rank(s) [{who}] said nothing: killed, stalled or cut off" in text
            assert "continue from the last checkpoint" in text


def test_a_stalled_peer_is_an_error_within_the_timeout() -> None:
    results = values(run(fault_work.stalled, 3, 1, link_timeout=2.0))
    for rank, steps in enumerate(results):
        name, text, seconds = steps[1]
        assert name == "LinkError" and seconds < 2 + SLACK
        if rank != 1:
            assert "rank(s) [1] said nothing: killed, stalled or cut off" in text


@pytest.mark.parametrize(("who", "tcp"), [(2, False), (0, True)])
def test_an_exception_in_the_model_is_named_on_every_rank(who: int, tcp: bool) -> None:
    for rank, steps in enumerate(values(run(fault_work.raising, 3, who, tcp=tcp))):
        name, text, seconds = steps[1]
        assert name == "LinkError" and seconds < 10 + SLACK, rank
        assert f"rank {who} stopped with RuntimeError: [Stage {who}] failed to run forward" in text
        assert "(from KeyError: 'no such head')" in text


def test_a_resumed_run_is_bit_identical_with_guard_and_stochastic_rounding(tmp_path: Path) -> None:
    """Rungs change before and after the checkpoint; the whole run and its continuation do not differ in a bit."""
    (tmp_path / "a").mkdir()
    whole = values(run(fault_work.resumed, 2, 0, 7, str(tmp_path / "a")))
    again = values(run(fault_work.resumed, 2, 3, 7, str(tmp_path / "a")))
    for (losses, rungs, digest), (losses2, rungs2, digest2) in zip(whole, again, strict=True):
        assert losses[3:] == losses2 and rungs[3:] == rungs2 and digest == digest2
    assert whole[0][1] == whole[1][1], "both ends change at the same step"
    forward = [rungs[0, "forward"] for rungs in whole[0][1]]
    assert forward[0] == 0 and forward[-1] == 2 and sorted(forward) == forward


@pytest.mark.parametrize("kind", [NOT_FINITE, NOT_READ])
def test_a_fault_survives_the_maximum_over_ranks(kind: int) -> None:
    fault = Fault(kind, stage=70_000, microbatch=4_095, direction="backward")
    assert Fault.of(fault.code()) == fault
    assert 0 < fault.code() < 2**63
