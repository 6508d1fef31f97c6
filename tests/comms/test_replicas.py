"""The model of a coded reduction: known sizes, and the committed table of measured steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from evenbits.comms import replicas as planning
from evenbits.comms.replicas import Reduction, Replicas, coded, plan_replicas, uncoded
from evenbits.comms.simulate import Network
from evenbits.comms.timing import Timing
from evenbits.errors import EvenbitsError

DOCS = Path(__file__).resolve().parents[2] / "docs" / "wire.md"
PARAMETERS, TENSORS = 686_698, 16  # of the net of benchmarks/ddp_traffic.py

# Seconds to encode and decode a slice of that net, timed on the machine of the table (shared; the best of many).
CODECS = {"int8": (95e-6, 50e-6, 8.13 / 8), "int4": (170e-6, 130e-6, 4.13 / 8)}


def measured() -> dict[tuple[int, str], list[float]]:
    """{(ranks, setting): seconds at 100 Mbit/s, 1 Gbit/s and without a limit} as docs/wire.md says."""
    number = r"\s*([\d.]+)\s*\|"
    line = re.compile(rf"^\| ([24]) \| (none|int[48](?:\+EF)?) \|[^|]*\|[^|]*\|{3 * number}", re.MULTILINE)
    found = line.findall(DOCS.read_text(encoding="utf-8").partition("### Did the planner say so?")[0])
    return {(int(world), setting): list(map(float, seconds)) for world, setting, *seconds in found}


def foretold(world: int, setting: str, rate: float, compute: float) -> tuple[float, float]:
    """Seconds of a step without and with a codec. Half of the ranks share a link, and all of them two cores."""
    where, (encode, decode, width) = Replicas(world, world // 2, 1), CODECS[setting[:4]]
    one = Timing(encode, decode, round(width * PARAMETERS / (TENSORS * world)))
    with_codec = coded(one, TENSORS, where, add=0.3e-3, feedback="EF" in setting)
    without = uncoded(PARAMETERS, where, add=0.3e-3)
    return compute + without.seconds(Network(rate), where), compute + with_codec.seconds(Network(rate), where)


def test_the_planner_said_so_where_coded_gradients_did_not_pay() -> None:
    table, lost = measured(), 0
    assert len(table) == 8
    for (world, setting), seconds in table.items():
        if setting == "none":
            continue
        for rate, mine, stock in zip((1e8, 1e9, 20e9), seconds, table[world, "none"], strict=True):
            without, with_codec = foretold(world, setting, rate, table[world, "none"][2])
            if mine > 1.03 * stock:
                lost += 1
                assert with_codec > without, f"{world} ranks, {setting}, {rate}: measured {mine} against {stock}"
            if mine < 0.8 * stock:
                assert with_codec < without, f"{world} ranks, {setting}, {rate}: measured {mine} against {stock}"
            assert without == pytest.approx(stock, rel=0.15)
            assert with_codec == pytest.approx(mine, rel=0.5)
    assert lost == 9, "without a limit everywhere, at 1 Gbit/s on four ranks"


def test_bytes_that_leave_a_machine() -> None:
    """As comms/ddp.py counts them, with 4 replicas on 4, 2 and 1 machines."""
    one, add = Timing(0.0, 0.0, 1000), {"add": 0.0}
    alone, pairs, here = Replicas(4), Replicas(4, 2), Replicas(4, 4)
    assert uncoded(1_000_000, alone, **add).nbytes == uncoded(1_000_000, pairs, **add).nbytes == 6e6
    assert coded(one, 10, alone, **add, feedback=True).nbytes == 2 * 3 * 10 * 1000
    assert coded(one, 10, pairs, **add, feedback=True).nbytes == (2 * 2 + 3) * 10 * 1000
    assert uncoded(1_000_000, here, **add).nbytes == coded(one, 10, here, **add, feedback=True).nbytes == 0


def test_work_follows_from_what_a_rank_does() -> None:
    """5 encodings of a slice, 8 or 12 decodings, for each of 10 tensors; four ranks on two cores take twice as long."""
    one = Timing(1.0, 100.0, 1000)
    assert coded(one, 10, Replicas(4), add=0.0, feedback=False).work == 10 * (5 + 800)
    assert coded(one, 10, Replicas(4), add=0.0, feedback=True).work == 10 * (5 + 1200)
    assert coded(one, 10, Replicas(4, 4, 2), add=0.0, feedback=True).work == 2 * 10 * (5 + 1200)
    assert coded(one, 10, Replicas(4, 2, 4), add=0.0, feedback=True).work == 10 * (5 + 1200)
    assert Reduction(1e6, 0.5).seconds(Network(8e6, latency=0.1), Replicas(2)) == pytest.approx(0.5 + 1 + 0.2)


def test_break_even_is_where_a_step_takes_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "timed", lambda *_: Timing(1e-3, 2e-3, 30_000))
    monkeypatch.setattr(planning, "_adding", lambda *_: 1e-3)
    shared = {"parameters": 10**6, "replicas": Replicas(8), "tensors": 4, "feedback": True, "compute": 0.1}
    limit = plan_replicas(["int8:g128"], net=Network(1e9), **shared)[1].break_even
    assert limit is not None
    for factor, faster in ((0.5, True), (2.0, False)):
        raw, int8 = plan_replicas(["raw", "int8:g128"], net=Network(factor * limit), **shared)
        assert raw.codec == "raw" and (int8.step < raw.step) is faster and (int8.speedup > 1) is faster
    raw, int8 = plan_replicas(["int8:g128"], net=Network(limit), **shared)
    assert int8.step == pytest.approx(raw.step)


def test_real_codecs_on_this_machine() -> None:
    offers = plan_replicas(["int8:g128"], parameters=50_000, net=Network(1e6), replicas=Replicas(2), repeats=2)
    assert offers[1].bits == pytest.approx(8.125, abs=0.05) and offers[1].speedup > 3
    assert offers[1].encode > 0 and offers[1].decode > 0


def test_what_makes_no_reduction() -> None:
    for sizes in ((1, 1, 1), (4, 3, 1), (4, 2, 0)):
        with pytest.raises(EvenbitsError, match="at least 2 replicas"):
            Replicas(*sizes)
    with pytest.raises(EvenbitsError, match="owns a slice"):
        plan_replicas(["fp16"], parameters=10, net=Network(1e9), replicas=Replicas(4), tensors=3)
    with pytest.raises(EvenbitsError, match="int17"):
        plan_replicas(["int17:g128"], parameters=1000, net=Network(1e9), replicas=Replicas(4))
