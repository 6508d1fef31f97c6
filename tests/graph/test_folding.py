"""Folds: exact in float64 for every kind of norm, refused by the numeric proof where the trace is fooled, undone bit
for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_nets import HandRMSNorm, Trap, affine, bits, forced, proved, random_scale, regions, same_bits, smooth
from torch import nn

from evenbits.graph.folding import Fold, prove

D = 16


class Block(nn.Module):
    """A pre-norm block: q, k, v share the first norm, up and gate the second."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.n1, self.n2 = make(), make()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.up, self.gate, self.down = nn.Linear(D, 32), nn.Linear(D, 32), nn.Linear(32, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.n1(x)
        attention = (self.q(h) @ self.k(h).transpose(-1, -2)).softmax(-1)
        x = x + self.o(attention @ self.v(h))
        h = self.n2(x)
        return x + self.down(self.up(h) * torch.sigmoid(self.gate(h)))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: affine(nn.LayerNorm(D)),
    "LayerNorm without bias": lambda: affine(nn.LayerNorm(D, bias=False)),
    "RMSNorm": lambda: affine(nn.RMSNorm(D)),
    "RMSNorm by hand": lambda: HandRMSNorm(width=D),
    "1 + w": lambda: HandRMSNorm(1.0, width=D),
    "0.25 + w": lambda: HandRMSNorm(0.25, width=D),
}


@pytest.mark.parametrize("kind", NORMS)
def test_smoothing_through_folds_leaves_the_float64_output_unchanged(kind: str) -> None:
    """Norms into gains, and now also v → o and up → down into rows."""
    model = Block(NORMS[kind]).double().eval()
    x = torch.randn(2, 5, D, dtype=torch.float64) * torch.logspace(-1, 1, D, dtype=torch.float64)
    found = regions(model, x)
    assert {r.name: r.into for r in found} == {
        "{q,k,v}": "n1",
        "o": "the rows of v",
        "{up,gate}": "n2",
        "down": "the rows of up",
    }
    before = model(x)
    smooth(model, found, {})
    error = (model(x) - before).norm() / before.norm()
    assert error < 1e-12


@pytest.mark.parametrize("kind", NORMS)
def test_a_fold_really_divides_the_producers_tensor(kind: str) -> None:
    model = Block(NORMS[kind]).double().eval()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    region = regions(model, x)[0]
    before = model.n1(x)
    scale_S = torch.rand(D, dtype=torch.float64) + 0.5
    Fold(model, region).apply(scale_S)
    assert torch.allclose(model.n1(x) * scale_S, before, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(model.n1(x), before)


def normed(make: Callable[[], nn.Module]) -> tuple[nn.Module, Fold]:
    """A norm before a layer, and the fold into all of its parameters."""
    model = nn.Sequential(make(), nn.Linear(D, 4)).eval()
    names = [f"0.{name}" for name, _ in model[0].named_parameters()]
    return model, Fold(model, forced(model, ["1"], *names, offset=getattr(model[0], "offset", 0.0)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", NORMS)
def test_undo_is_bit_exact_in_every_type(kind: str, dtype: torch.dtype) -> None:
    model, fold = normed(NORMS[kind])
    model.to(dtype)
    before = bits(model)
    fold.apply(torch.rand(D) * 3 + 0.1)
    assert not same_bits(model, before)
    fold.undo()
    assert same_bits(model, before)


@pytest.mark.parametrize("times", [0, 1, 2])
def test_undo_takes_back_every_application(times: int) -> None:
    model, fold = normed(lambda: nn.LayerNorm(D))
    before = bits(model)
    for _ in range(times):
        fold.apply(torch.rand(D) + 0.1)
    fold.undo()
    assert same_bits(model, before)


def test_undo_restores_rows_columns_and_gains_of_one_region() -> None:
    body = lambda m, x: m.a(m.norm(x) + m.up(x)) + m.b(m.norm(x))  # noqa: E731
    model = Trap(body, up=nn.Linear(D, D)).eval()
    (region,) = [r for r in regions(model, torch.randn(3, D), layers=["a", "b"]) if "a" in r.layers]
    before, fold = bits(model), Fold(model, region)
    fold.apply(random_scale(D))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"norm.weight", "norm.bias", "up.weight", "up.bias"}
    fold.undo()
    assert same_bits(model, before)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_legal_folds_are_proved_and_leave_no_mark(kind: str, dtype: torch.dtype) -> None:
    model = Block(NORMS[kind]).to(dtype).eval()
    batches = [torch.randn(2, 5, D, dtype=dtype) for _ in range(3)]
    found = regions(model, batches[0])
    assert all(region.parts for region in found) and len(found) == 4
    before = bits(model)
    assert prove(model, [lambda b=b: model(b) for b in batches], found) == {}
    assert same_bits(model, before)
    assert not any(m._forward_pre_hooks for m in model.modules())


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(y.detach().numpy().copy()).tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError


ILLEGAL: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "residual": lambda m, x: (lambda y: y + m.a(y))(m.norm(x)),
    "second layer left out": lambda m, x: (lambda y: m.a(y) + m.b(y))(m.norm(x)),
    "returned": lambda m, x: (lambda y: (m.a(y), y))(m.norm(x)),
    "another tensor": lambda m, x: m.a(x) + m.norm(x).sum(),
    "numpy": lambda m, x: (lambda y: m.a(y) + torch.from_numpy(y.numpy()).mean(-1, keepdim=True))(m.norm(x)),
    "custom function": lambda m, x: (lambda y: m.a(y) + _Opaque.apply(y))(m.norm(x)),
    "nonlinear between": lambda m, x: m.a(torch.tanh(m.norm(x))),
    "channels rolled": lambda m, x: m.a(m.norm(x).roll(1, -1)),
    "square transpose": lambda m, x: m.a(m.norm(x).transpose(-1, -2)),
    "second use of the norm": lambda m, x: m.a(m.norm(x)) + m.norm(x * 2),
    "gain used elsewhere": lambda m, x: m.a(m.norm(x)) * m.norm.weight.sum(),
    "number added": lambda m, x: m.a(m.norm(x) + 1.0),
    "squared": lambda m, x: m.a(m.norm(x) * m.norm(x)),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_an_illegal_fold_that_is_forced_by_hand_is_refuted(case: str) -> None:
    model = Trap(ILLEGAL[case]).eval()
    before = bits(model)
    failed = proved(model, [model.forced()], torch.randn(2, D, D))
    assert failed == {"a": "the fold changed the output when tried"}
    assert same_bits(model, before)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("case", [case for case in ILLEGAL if case != "another tensor"])
def test_the_rules_and_the_proof_leave_no_illegal_fold_standing(case: str) -> None:
    """Readers that torch does not show (numpy, a function that leaves torch) are the proof's to catch."""
    model = Trap(ILLEGAL[case]).eval()
    x = torch.randn(2, D, D, dtype=torch.float64)
    model.double()
    found = [region for region in regions(model, x) if "a" in region.layers]
    with torch.no_grad():
        failed, before = proved(model, found, x), model(x)
        smooth(model, found, failed)
        assert torch.allclose(torch.as_tensor(model(x)[0]), torch.as_tensor(before[0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_even_one_two_or_three_channels_refute_a_wrong_fold(width: int) -> None:
    for seed in range(20):
        model = Trap(lambda m, x: (m.a(m.norm(x)), m.norm(x)), width)
        x = torch.randn(5, width)
        assert prove(model, [lambda model=model, x=x: model(x)], [model.forced()], seed=seed), seed


def test_two_channels_transposed_are_refuted_whatever_the_seed() -> None:
    for seed in range(20):
        model = Trap(lambda m, x: m.a(m.norm(x).transpose(-1, -2)), 2)
        x = torch.randn(3, 2, 2)
        assert prove(model, [lambda model=model, x=x: model(x)], [model.forced()], seed=seed), seed


def test_a_wrong_offset_or_a_forgotten_shift_is_refuted() -> None:
    model, x = nn.Sequential(HandRMSNorm(1.0, width=D), nn.Linear(D, 4)).eval(), torch.randn(5, D)
    assert proved(model, [forced(model, ["1"], "0.weight")], x)
    assert not proved(model, [forced(model, ["1"], "0.weight", offset=1.0)], x)
    model = nn.Sequential(affine(nn.LayerNorm(D)), nn.Linear(D, 4)).eval()
    assert proved(model, [forced(model, ["1"], "0.weight")], x)


def test_only_the_wrong_fold_of_several_is_dropped() -> None:
    model = Block(NORMS["RMSNorm"]).eval()
    right, wrong = forced(model, ["q", "k", "v"], "n1.weight"), forced(model, ["up"], "n2.weight")
    before = bits(model)
    assert list(proved(model, [right, wrong], torch.randn(2, 5, D))) == ["up"]
    assert same_bits(model, before)


def test_folds_that_are_wrong_only_together_are_all_dropped() -> None:
    """Each passes alone; a forward that looks at both gains breaks when both are changed."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        clean = torch.equal(m.norm.weight, m.gains[0]) or torch.equal(m.n2.weight, m.gains[1])
        return (m.a(m.norm(x)) + m.b(m.n2(x))) * (1.0 if clean else 2.0)

    model = Trap(body, n2=nn.RMSNorm(D)).eval()
    model.gains = [model.norm.weight.detach().clone(), model.n2.weight.detach().clone()]
    failed = proved(model, [model.forced(), forced(model, ["b"], "n2.weight")], torch.randn(3, D))
    assert set(failed) == {"a", "b"} and "together" in failed["a"]


def test_a_path_taken_only_by_a_later_batch_is_proved_too() -> None:
    """Data-dependent flow: on the first batch the layer alone reads the norm, on the second a residual does too."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        return m.a(y) if x.sum() > 0 else m.a(y) + y

    model = Trap(body).eval()
    del model.b
    batches = [torch.ones(3, D) + torch.randn(3, D) * 0.1, -torch.ones(3, D) + torch.randn(3, D) * 0.1]
    (region,) = regions(model, batches[0])
    assert region.into == "norm"
    assert prove(model, [lambda b=b: model(b) for b in batches], [region])
    assert not prove(model, [lambda: model(batches[0])], [region])


def test_nothing_is_proved_on_an_output_that_is_not_repeatable_or_has_no_numbers() -> None:
    noisy = Trap(lambda m, x: m.a(m.norm(x)) + torch.rand(1)).eval()
    classes = Trap(lambda m, x: m.a(m.norm(x)).argmax(-1)).eval()
    broken = Trap(lambda m, x: m.a(m.norm(x)) * float("nan")).eval()
    for model in (noisy, classes, broken):
        assert "cannot be proved" in proved(model, [model.forced()], torch.randn(3, D))["a"]


def test_a_layer_called_by_keyword_is_proved() -> None:
    model, x = Trap(lambda m, x: m.a(input=m.norm(x))).eval(), torch.randn(3, D)
    assert not proved(model, [model.forced()], x)
    assert proved(model, [forced(model, ["a"], "norm.weight")], x)


def test_a_forward_that_fails_during_the_proof_leaves_parameters_and_hooks_as_they_were() -> None:
    calls = [0]

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("half-way")
        return m.a(m.norm(x))

    model = Trap(body).eval()
    before = bits(model)
    with pytest.raises(RuntimeError, match="half-way"):
        proved(model, [model.forced()], torch.ones(3, D))
    assert same_bits(model, before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_a_type_cannot_hold_is_known_before_it_is_folded() -> None:
    """1 + w in bfloat16 divided by 100 is 0.01, and w = −0.99 has two digits: the gain would be off by a fifth."""
    scale_S = torch.full((D,), 100.0)
    for offset, dtype, loses in (
        (1.0, torch.bfloat16, True),
        (1.0, torch.float16, True),
        (1.0, torch.float32, False),
        (0.0, torch.bfloat16, False),
        (0.0, torch.float16, False),
    ):
        model, fold = normed(lambda offset=offset: HandRMSNorm(offset, width=D))
        model.to(dtype)
        before = bits(model)
        assert fold.loses(scale_S) is loses, (offset, dtype)
        assert same_bits(model, before)


def test_a_gain_that_overflows_or_vanishes_in_float16_is_known_before_it_is_folded() -> None:
    model, fold = normed(lambda: nn.LayerNorm(D))
    model.half()[0].weight.data.fill_(100.0)
    assert fold.loses(torch.full((D,), 1e-4))
    assert not fold.loses(torch.full((D,), 1.0))
    model[0].weight.data.fill_(1e-4)
    assert fold.loses(torch.full((D,), 1e4))


def test_one_number_too_small_for_float16_among_larger_ones_refuses_no_fold() -> None:
    """MiniLM's value biases: -2e-6 beside numbers of a thousandth to a tenth."""
    model = nn.Sequential(nn.Linear(4, D), nn.Linear(D, 4)).half().eval()
    fold = Fold(model, forced(model, ["1"], "0"))
    model[0].bias.data.fill_(0.01)[3] = -2e-6
    assert not fold.loses(torch.full((D,), 8.0))
    model[0].bias.data.fill_(-2e-6)  # all of them: nothing larger that they would be lost beside
    assert fold.loses(torch.full((D,), 8.0))
    model[0].bias.data.zero_()
    assert not fold.loses(torch.full((D,), 8.0))


def test_rows_that_overflow_in_float16_are_known_and_small_ones_are_rounded_like_all_others() -> None:
    model = nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, 4)).half().eval()
    fold = Fold(model, forced(model, ["2"], "0"))
    model[0].weight.data.fill_(100.0)
    assert fold.loses(torch.full((D,), 1e-4)) and not fold.loses(torch.full((D,), 1.0))
    model[0].weight.data.fill_(1e-6)
    model[0].bias.data.zero_()
    assert not fold.loses(torch.full((D,), 10.0))
