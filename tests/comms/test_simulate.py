"""The model of a step: known formulas at its ends, order where it must hold, and torch's own order of computation."""

from __future__ import annotations

from itertools import product

import pytest
import stage_work
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run, values

from evenbits.comms.programs import SCHEDULES, program
from evenbits.comms.simulate import Costs, Machine, Network, predict
from evenbits.comms.timing import Timing, break_even, timed
from evenbits.errors import EvenbitsError

FREE = Network(1e30)
SIZES = {"stages": st.integers(1, 6), "microbatches": st.integers(1, 9)}


@given(schedule=st.sampled_from(SCHEDULES), **SIZES)
def test_without_a_link_the_step_is_computation_and_bubble(schedule: str, stages: int, microbatches: int) -> None:
    """(microbatches + stages − 1) (forward + backward): the known length of GPipe and of 1F1B."""
    made = predict(schedule, stages=stages, microbatches=microbatches, cost=Costs(1.0, 2.0, 0, 0), net=FREE)
    assert made.seconds == pytest.approx(3.0 * (microbatches + stages - 1))
    assert made.compute == pytest.approx(microbatches / (microbatches + stages - 1))


@given(schedule=st.sampled_from(SCHEDULES), latency=st.sampled_from([0.0, 0.5]), **SIZES)
def test_without_computation_the_step_is_the_link(
    schedule: str, stages: int, microbatches: int, latency: float
) -> None:
    """Every link sends each microbatch both ways; a microbatch passes all links one after the other."""
    cost, net = Costs(0.0, 0.0, 125, 250), Network(1000.0, latency)  # one and two seconds
    seconds = predict(schedule, stages=stages, microbatches=microbatches, cost=cost, net=net).seconds
    if stages == 1:
        assert seconds == 0
    else:
        assert seconds >= (stages - 1) * (3 + 2 * latency)
        assert seconds >= 2 * microbatches  # the slower direction of one link
        if microbatches == 1 and not latency:
            assert seconds == pytest.approx(3.0 * (stages - 1))


@settings(max_examples=25)
@given(
    schedule=st.sampled_from(SCHEDULES),
    nbytes=st.integers(1, 10_000),
    bandwidth=st.floats(1e3, 1e9),
    **SIZES,
)
def test_more_bytes_less_bandwidth_more_latency_never_help(
    schedule: str, stages: int, microbatches: int, nbytes: int, bandwidth: float
) -> None:
    def seconds(size: int, rate: float, latency: float) -> float:
        cost = Costs(0.01, 0.02, size, size)
        net = Network(rate, latency)
        return predict(schedule, stages=stages, microbatches=microbatches, cost=cost, net=net).seconds

    base = seconds(nbytes, bandwidth, 0.0)
    assert base <= seconds(2 * nbytes, bandwidth, 0.0) + 1e-9
    assert base <= seconds(nbytes, bandwidth / 2, 0.0) + 1e-9
    assert base <= seconds(nbytes, bandwidth, 0.01) + 1e-9


def test_receives_posted_when_needed_make_every_transfer_wait() -> None:
    cost, net = Costs(1.0, 1.0, 150, 150), Network(1000.0)  # 1.2 s a message
    when_needed, early = (
        predict("GPipe", stages=4, microbatches=16, cost=cost, net=net, ahead=ahead).seconds for ahead in (None, 1)
    )
    # The next receive is posted when the last microbatch is done, so each one takes transfer and computation.
    assert when_needed == pytest.approx(2 * (16 + 3) + 1.2 * 2 * (16 + 2))
    assert early < 0.75 * when_needed


def test_a_receive_posted_after_a_send_waits_behind_it_and_the_two_directions_take_turns() -> None:
    cost = Costs(0.0, 0.0, 125, 125)  # a second each
    turns, both = (
        predict("1F1B", stages=2, microbatches=32, cost=cost, net=Network(1000.0), ahead=ahead).seconds
        for ahead in (None, 0)
    )
    assert turns == pytest.approx(64.0) and both == pytest.approx(33.0)


def test_coding_takes_the_ranks_own_time() -> None:
    plain = predict("GPipe", stages=2, microbatches=8, cost=Costs(1.0, 1.0, 0, 0), net=FREE).seconds
    coded = predict("GPipe", stages=2, microbatches=8, cost=Costs(1.0, 1.0, 0, 0, 0.5, 0.25, 0.5, 0.25), net=FREE)
    assert coded.seconds > plain + 8 * 0.5 and coded.coding > 0


def test_replicas_wait_for_the_slowest_and_jitter_and_stragglers_cost() -> None:
    cost = Costs(0.1, 0.2, 1000, 1000)
    shared = {"stages": 4, "microbatches": 8, "cost": cost}
    calm = predict("1F1B", net=Network(1e6, 0.01), **shared)
    many = predict("1F1B", net=Network(1e6, 0.01, jitter=0.05), replicas=64, **shared)
    slow = predict("1F1B", net=Network(1e6, 0.01), replicas=64, stragglers=0.05, slowdown=3.0, **shared)
    assert many.seconds > calm.seconds and slow.seconds > calm.seconds
    assert many.replicas.shape == (64,) and many.seconds >= float(many.replicas.max())
    again = predict("1F1B", net=Network(1e6, 0.01, jitter=0.05), replicas=64, **shared)
    assert torch.equal(many.replicas, again.replicas), "same seed, same step"
    reduced = predict("1F1B", net=Network(1e6, 0.01), replicas=4, gradient_bytes=10**6, **shared)
    assert reduced.seconds == pytest.approx(calm.seconds + 2 * 0.75 * 8 + 0.02)


@pytest.mark.parametrize("name", ["GPipe", "1F1B"])
@pytest.mark.parametrize("world", [2, 3])
def test_programs_compute_in_the_order_of_torch(name: str, world: int) -> None:
    for stage, order in enumerate(values(run(stage_work.order, world, name))):
        mine = [(a.direction, a.microbatch) for a in program(name, stage, world, 4) if a.kind == "compute"]
        assert mine == [tuple(act) for act in order]


def test_every_message_is_posted_at_both_ends_once() -> None:
    for name, ahead in product(SCHEDULES, (None, 0, 1, 9)):
        programs = [program(name, stage, 3, 5, ahead) for stage in range(3)]
        sends = sorted((s + (1 if a.direction == "forward" else -1), a.direction, a.microbatch)
                       for s, acts in enumerate(programs) for a in acts if a.kind == "post send")  # fmt: skip
        receives = sorted((s, a.direction, a.microbatch)
                          for s, acts in enumerate(programs) for a in acts if a.kind == "post receive")  # fmt: skip
        assert sends == receives and len(sends) == 2 * 2 * 5


@given(
    sizes=st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)),
    seconds=st.tuples(*[st.floats(1e-6, 1.0) for _ in range(4)]),
)
def test_break_even_is_where_both_take_the_same_time(sizes: tuple[int, int], seconds: tuple[float, ...]) -> None:
    mine, other = Timing(seconds[0], seconds[1], sizes[0]), Timing(seconds[2], seconds[3], sizes[1])
    limit = break_even(mine, other)

    def moved(timing: Timing, rate: float) -> float:
        return timing.encode + timing.decode + 8 * timing.nbytes / rate

    if limit == 0:
        assert mine.nbytes >= other.nbytes
    elif limit == float("inf"):
        assert all(moved(mine, rate) <= moved(other, rate) for rate in (1e3, 1e12))
    else:
        assert moved(mine, limit) == pytest.approx(moved(other, limit), rel=1e-6)
        assert moved(mine, limit / 2) < moved(other, limit / 2)
        assert moved(mine, limit * 2) > moved(other, limit * 2)


@given(schedule=st.sampled_from(SCHEDULES), ahead=st.sampled_from([None, 0, 2]), rate=st.floats(1e3, 1e7), **SIZES)
def test_a_machine_with_a_core_for_every_stage_changes_nothing(
    schedule: str, ahead: int | None, rate: float, stages: int, microbatches: int
) -> None:
    """Two simulations, one rank by rank and one in the order of time: the same step. Of 1F1B's stock stage, whose two
    directions take turns, the first does not always know whose turn it is."""
    cost = Costs(0.01, 0.02, 300, 200, 1e-3, 2e-3, 1e-3, 2e-3, message=1e-4)
    given_ = {"stages": stages, "microbatches": microbatches, "cost": cost, "net": Network(rate, 0.003), "ahead": ahead}
    own, one = (predict(schedule, machine=machine, **given_).seconds for machine in (None, Machine(stages)))
    assert one == pytest.approx(own, rel=0.15 if schedule == "1F1B" and ahead is None else 1e-6)


def test_stages_on_few_cores_wait_for_them() -> None:
    """Four stages on one core do all work one after the other; on two cores no faster than half of it."""
    shared = {"stages": 4, "microbatches": 8, "cost": Costs(1.0, 2.0, 0, 0), "net": FREE}
    alone, two, four = (predict("1F1B", machine=Machine(cores), **shared).seconds for cores in (1, 2, 4))
    assert alone == pytest.approx(4 * 8 * 3)
    assert four == pytest.approx((8 + 3) * 3) and max(four, 4 * 8 * 3 / 2) <= two < 1.2 * 4 * 8 * 3 / 2
    slower = predict("1F1B", machine=Machine(2, together=0.5), **shared).seconds
    assert two < slower <= 2 * two
    with pytest.raises(EvenbitsError, match="one replica only"):
        predict("1F1B", machine=Machine(2), replicas=2, **shared)
    with pytest.raises(EvenbitsError, match="at least 1 core"):
        Machine(0)


def test_every_message_costs_both_ends() -> None:
    """One microbatch, two stages: a send and a receive for the activation, and again for the gradient."""
    cost = Costs(1.0, 2.0, 0, 0, message=0.25)
    assert predict("GPipe", stages=2, microbatches=1, cost=cost, net=FREE).seconds == pytest.approx(6 + 4 * 0.25)


def test_a_bucket_lets_the_first_bytes_pass_and_then_keeps_its_rate() -> None:
    cost = Costs(0.0, 0.0, 1000, 0)  # a second each at the full rate
    one, many = (
        predict("GPipe", stages=2, microbatches=m, cost=cost, net=Network(8000.0, burst=400)).seconds for m in (1, 10)
    )
    assert one == pytest.approx(0.6) and many == pytest.approx(9.6), "saved up once"
    with pytest.raises(EvenbitsError, match="burst at least 0"):
        Network(1.0, burst=-1)


def test_a_thousand_stages_fill_and_drain_their_pipeline() -> None:
    """1024 stages, 64 microbatches over the internet: bubble of 1023 stages, each with two messages, and the steady
    state between; jitter and stragglers only add to it."""
    cost, shared = Costs(0.5, 1.0, 10**6, 10**6), {"stages": 1024, "microbatches": 64, "ahead": 1}
    calm = predict("1F1B", cost=cost, net=Network(1e9, 0.03), **shared).seconds
    message = 0.03 + 8e6 / 1e9
    assert calm >= (64 + 1023) * 1.5 + 2 * 1023 * message * (1 - 1e-9)
    assert calm < 1.5 * ((64 + 1023) * 1.5 + 2 * 1023 * message)
    rough = predict("1F1B", cost=cost, net=Network(1e9, 0.03, jitter=0.01), replicas=2, stragglers=0.01, **shared)
    assert rough.seconds > calm


def test_costs_are_timed_on_the_tensor_itself() -> None:
    x = torch.randn(64, 1024)
    cost = Costs.measured("int4:g128/int8:g128", x, forward=0.1, backward=0.2, repeats=2)
    assert cost.forward_bytes == timed("int4:g128", x, 1).nbytes < cost.backward_bytes < 4 * x.numel() / 3
    assert min(cost.forward_encode, cost.forward_decode, cost.backward_encode, cost.backward_decode) > 0


def test_what_cannot_be_predicted_is_refused() -> None:
    with pytest.raises(EvenbitsError, match="schedules that can be predicted"):
        program("DualPipeV", 0, 2, 2)
    with pytest.raises(EvenbitsError, match="at least 1"):
        predict("GPipe", stages=0, microbatches=1, cost=Costs(1, 1, 0, 0), net=FREE)
    with pytest.raises(EvenbitsError, match="bandwidth is above 0"):
        Network(0.0)
