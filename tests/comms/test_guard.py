"""When the guard speaks, when it climbs, and that it does neither without reason."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

from evenbits.comms.guard import Guard, GuardWarning
from evenbits.comms.telemetry import Figures, Sums
from evenbits.comms.wire import Lane
from evenbits.errors import EvenbitsError

PLAIN = Sums(messages=1, n=100, xx=100.0, ee=0.1, yy=100.0, xy=100.0).figures(0, 0, "backward", "int4:g16")


def drive(guard: Guard, lane: Lane, figures: list[Figures]) -> list[int]:
    """Steps of a pipeline as the sender sees them: the rung used in each."""
    used = []
    last: Figures | None = None
    for step, f in enumerate(figures):
        lane.advance()
        lane.following = guard.rung(lane, last)
        used.append(lane.level)
        last = replace(f, step=step, codec=lane.codec.spec)
    return used


def ladder() -> Lane:
    return Lane(0, "backward", ("int4:g16", "int6:g16", "int8:g16"))


def test_quiet_when_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drive(Guard(act="raise"), ladder(), [PLAIN] * 40) == [0] * 40


def test_a_dc_ratio_above_one_climbs_one_rung_after_patience() -> None:
    bad = replace(PLAIN, dc_ratio=4.0)
    with pytest.warns(GuardWarning, match="DC ratio is above the limit"):
        used = drive(Guard(act="raise", patience=2), ladder(), [bad] * 3 + [PLAIN] * 10)
    # Measured in steps 0 and 1, decided at the start of step 2, announced during it, used from step 3 on.
    assert used == [0, 0, 0] + [1] * 10


def test_a_channel_is_enough() -> None:
    bad = replace(PLAIN, channel_dc=40.0)
    with pytest.warns(GuardWarning, match="DC ratio of a channel is above the limit"):
        used = drive(Guard(act="raise", patience=2), ladder(), [bad] * 3 + [PLAIN] * 10)
    assert used == [0, 0, 0] + [1] * 10


def test_one_bad_step_is_not_enough() -> None:
    bad = replace(PLAIN, dc_ratio=4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drive(Guard(act="raise", patience=2), ladder(), [bad, PLAIN] * 10) == [0] * 20


def test_a_falling_signal_to_noise_ratio_climbs_and_is_then_judged_afresh() -> None:
    falling = [replace(PLAIN, snr_db=30.0 - 0.5 * i) for i in range(20)]
    with pytest.warns(GuardWarning, match="signal-to-noise ratio falls"):
        used = drive(Guard(act="raise", window=4, drop_db=3.0), ladder(), falling)
    assert used[0] == 0 and 1 in used and used == sorted(used)
    steady = [replace(PLAIN, snr_db=30.0 + (-1) ** i) for i in range(40)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drive(Guard(act="raise", window=4, drop_db=3.0), ladder(), steady) == [0] * 40


def test_warning_does_not_climb_and_is_said_once() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert drive(Guard(), ladder(), [replace(PLAIN, dc_ratio=9.0)] * 12) == [0] * 12
    assert len(said) == 1 and "use more bits or smaller groups" in str(said[0].message)


def test_the_last_rung_is_the_last() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        used = drive(Guard(act="raise", patience=1), ladder(), [replace(PLAIN, dc_ratio=9.0)] * 20)
    assert used[-1] == 2
    assert len(said) == 3 and "on its last rung" in str(said[-1].message)


def test_state_resumes_in_the_middle_of_a_decision() -> None:
    bad = replace(PLAIN, dc_ratio=4.0)
    one, lane = Guard(act="raise", patience=3), ladder()
    drive(one, lane, [bad, bad, bad])
    two, fresh = Guard(act="raise", patience=3), ladder()
    two.load(one.state())
    with pytest.warns(GuardWarning):
        assert one.rung(lane, replace(bad, step=2)) == 1
    with pytest.warns(GuardWarning):
        assert two.rung(fresh, replace(bad, step=2)) == 1


def test_options_are_checked() -> None:
    for wrong in (
        {"act": "panic"},
        {"window": 0},
        {"dc_limit": 0.0},
        {"channel_limit": -1.0},
        {"patience": 0},
        {"drop_db": -1.0},
    ):
        with pytest.raises(EvenbitsError):
            Guard(**wrong)  # type: ignore[arg-type]
