"""Error feedback: nothing is lost in the long run, by name, and a checkpoint carries it."""

from __future__ import annotations

import pytest
import torch

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.feedback import ErrorFeedback
from evenbits.errors import EvenbitsError


def _step(
    feedback: ErrorFeedback, name: str, x: torch.Tensor, spec: str, generator: torch.Generator | None = None
) -> torch.Tensor:
    codec, wanted = get(spec), feedback.compensate(name, x)
    decoded = codec.decode(codec.encode(wanted, generator=generator), Meta.of(wanted))
    feedback.update(name, wanted, decoded)
    return decoded


@pytest.mark.parametrize("spec", ["sign", "top0.05+int8:g128", "int2:g32", "uint4:tensor:affine:free", "lowrank1"])
def test_what_arrives_adds_up_to_what_was_sent(spec: str) -> None:
    x, feedback, generator = torch.randn(40, 30), ErrorFeedback(), torch.Generator().manual_seed(0)
    arrived, alone = torch.zeros(40, 30), torch.zeros(40, 30)
    for _ in range(300):
        arrived += _step(feedback, "w", x, spec, generator)
        alone += _step(ErrorFeedback(), "w", x, spec)
    # Sent minus arrived is the one error that is kept, however many steps there were.
    torch.testing.assert_close(300 * x - arrived, feedback.state_dict()["w"], rtol=0, atol=2e-2)
    assert float((arrived / 300 - x).norm()) < 0.25 * float((alone / 300 - x).norm())


def test_low_rank_from_a_fixed_start_never_sends_the_rest() -> None:
    x, feedback = torch.randn(40, 30), ErrorFeedback()
    sent = [_step(feedback, "w", x, "lowrank1") for _ in range(3)]
    torch.testing.assert_close(sent[2], sent[0], rtol=1e-3, atol=1e-4)


def test_names_do_not_mix_and_order_does_not_matter() -> None:
    first, second = torch.randn(8), torch.randn(5)
    one, other = ErrorFeedback(), ErrorFeedback()
    for name, x in (("a", first), ("b", second)):
        _step(one, name, x, "sign")
    for name, x in (("b", second), ("a", first)):
        _step(other, name, x, "sign")
    assert len(one) == 2 and one.nbytes == 4 * 13
    for name in ("a", "b"):
        assert one.state_dict()[name].equal(other.state_dict()[name])
    one.forget("a")
    assert one.compensate("a", first).equal(first) and not one.compensate("b", second).equal(second)
    one.forget()
    assert len(one) == 0


def test_a_restart_goes_on_where_it_stopped() -> None:
    steps = [torch.randn(16) for _ in range(6)]
    whole, before, after = ErrorFeedback(), ErrorFeedback(), ErrorFeedback()
    expected = [_step(whole, "w", x, "sign") for x in steps]
    found = [_step(before, "w", x, "sign") for x in steps[:3]]
    state = before.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    after.load_state_dict(state)
    before.forget()  # the state is a copy
    found += [_step(after, "w", x, "sign") for x in steps[3:]]
    assert all(a.equal(b) for a, b in zip(expected, found, strict=True))


def test_small_errors_of_half_precision_gradients_are_not_rounded_away() -> None:
    x, feedback = torch.ones(4, dtype=torch.bfloat16), ErrorFeedback()
    feedback.update("w", torch.full((4,), 1e-4), torch.zeros(4))
    assert feedback.compensate("w", x).tolist() == pytest.approx([1.0001] * 4, abs=1e-6)
    assert x.tolist() == [1.0] * 4


def test_the_gradient_itself_is_not_touched() -> None:
    x, feedback = torch.ones(4), ErrorFeedback()
    for _ in range(2):
        wanted = feedback.compensate("w", x)
        assert wanted.data_ptr() != x.data_ptr()
        wanted.zero_()
        feedback.update("w", torch.ones(4), torch.zeros(4))
    assert x.tolist() == [1.0] * 4
    assert not feedback.compensate("w", x.clone().requires_grad_()).requires_grad


def test_old_errors_fade_with_decay() -> None:
    feedback = ErrorFeedback(decay=0.5)
    feedback.update("w", torch.ones(2), torch.zeros(2))
    assert feedback.compensate("w", torch.zeros(2)).tolist() == [0.5, 0.5]
    with pytest.raises(EvenbitsError, match="between 0 and 1"):
        ErrorFeedback(decay=1.5)


def test_what_does_not_fit_is_refused() -> None:
    feedback = ErrorFeedback()
    feedback.update("w", torch.ones(4), torch.zeros(4))
    with pytest.raises(EvenbitsError, match=r"kept for 'w' has shape \[4\]"):
        feedback.compensate("w", torch.ones(5))
    with pytest.raises(EvenbitsError, match="what was decoded"):
        feedback.update("w", torch.ones(4), torch.zeros(3))
    with pytest.raises(EvenbitsError, match="floating-point"):
        feedback.compensate("v", torch.ones(4, dtype=torch.int64))
    for state in ({"w": torch.tensor([float("nan")])}, {"w": torch.ones(2, dtype=torch.int32)}, {3: torch.ones(2)}):
        with pytest.raises(EvenbitsError, match="maps names to finite tensors"):
            feedback.load_state_dict(state)  # type: ignore[arg-type]
    assert feedback.state_dict()["w"].tolist() == [1] * 4
