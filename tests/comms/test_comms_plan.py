"""Which codecs pay off on a link."""

from __future__ import annotations

import pytest

from evenbits.comms import plan as planning
from evenbits.comms.plan import parse_link, parse_shape, plan
from evenbits.comms.simulate import Network
from evenbits.comms.timing import Timing
from evenbits.errors import EvenbitsError


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1Gbit", 1e9),
        ("100 Mbit/s", 1e8),
        ("2.5gbit", 2.5e9),
        ("25e6", 25e6),
        ("10kbps", 1e4),
        ("7", 7.0),
        ("1Mb/s", 1e6),
    ],
)
def test_links_that_are_understood(text: str, rate: float) -> None:
    assert parse_link(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "0", "-1Gbit", "1GB", "1.2.3", "10 MB/s", "1Xbit", "."])
def test_links_that_are_not(text: str) -> None:
    with pytest.raises(EvenbitsError, match="in bits"):
        parse_link(text)


@pytest.mark.parametrize("text", ["", "8x", "8×4", "0x4", "4x-1", "99999x99999"])
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(EvenbitsError, match="shape"):
        parse_shape(text)


def test_offers_follow_from_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages, one microbatch, no computation: forward and backward message one after the other."""
    made = {"raw": Timing(0.0, 0.0, 1_000_000), "int8:g128": Timing(0.01, 0.03, 250_000)}
    monkeypatch.setattr(planning, "timed", lambda spec, x, repeats: made[spec])
    offers = plan(["int8:g128"], shape=(250_000,), net=Network(1e8), stages=2, microbatches=1)
    assert [o.codec for o in offers] == ["raw", "int8:g128"]
    raw, int8 = offers
    assert raw.step == pytest.approx(2 * 0.08) and raw.bits == 32 and raw.break_even == 0
    assert int8.step == pytest.approx(2 * (0.02 + 0.04)) and int8.bits == 8
    assert int8.break_even == pytest.approx(8 * 750_000 / 0.04)
    assert int8.speedup == pytest.approx(0.16 / 0.12)
    # At that bandwidth it makes no difference, which is what break-even means.
    even = plan(["int8:g128"], shape=(250_000,), net=Network(int8.break_even or 0), stages=2, microbatches=1)
    assert even[1].step == pytest.approx(even[0].step)


def test_computation_hides_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "timed", lambda spec, x, repeats: Timing(0.0, 0.0, 1000))
    idle, busy = (
        plan(["fp16"], shape=(250,), net=Network(1e9), stages=4, microbatches=16, schedule=kind, compute=0.05)[0].step
        for kind in ("GPipe", "1F1B")
    )
    assert idle == pytest.approx((16 + 3) * 0.15, rel=0.01) and busy == pytest.approx((16 + 3) * 0.15, rel=0.01)


def test_real_codecs_on_this_machine() -> None:
    offers = plan(["int4:g128/int8:g128", "raw"], shape=(4, 32, 64), net=Network(1e6), repeats=2)
    assert [o.codec for o in offers] == ["raw", "int4:g128/int8:g128"]
    assert offers[1].bits == pytest.approx((4.125 + 8.125) / 2, abs=0.02)
    assert offers[1].speedup > 3  # On a megabit the saving is all there is.


def test_what_makes_no_pipeline() -> None:
    with pytest.raises(EvenbitsError, match="at least 2 stages"):
        plan(["fp16"], shape=(8,), net=Network(1e6), stages=1)
    with pytest.raises(EvenbitsError, match="int17"):
        plan(["int17:g128"], shape=(8,), net=Network(1e6))
