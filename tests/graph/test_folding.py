"""Folds: exact in float64 for every kind of norm, refused by the numeric proof where the trace is fooled, undone bit
for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from evenbits.graph.folding import Fold, prove
from evenbits.graph.regions import Producer, Region, find_regions
from evenbits.graph.trace import trace

D = 16


class HandRMSNorm(nn.Module):
    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D) * 0.1 + (1.0 - offset))
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (self.offset + self.weight if self.offset else self.weight)


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


def affine(norm: nn.Module) -> nn.Module:
    for parameter in norm.parameters():
        parameter.data.uniform_(0.5, 1.5)
    return norm


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: affine(nn.LayerNorm(D)),
    "LayerNorm without bias": lambda: affine(nn.LayerNorm(D, bias=False)),
    "RMSNorm": lambda: affine(nn.RMSNorm(D)),
    "RMSNorm by hand": HandRMSNorm,
    "1 + w": lambda: HandRMSNorm(1.0),
    "0.25 + w": lambda: HandRMSNorm(0.25),
}


def linear_regions(model: nn.Module, x: torch.Tensor) -> list[Region]:
    widths = {name: module.in_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return find_regions(trace(model, lambda: model(x), widths), widths)


def folds_of(model: nn.Module, regions: list[Region]) -> list[tuple[Region, Fold]]:
    return [(region, Fold(model, region.producer)) for region in regions if region.producer is not None]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(
        now[name].dtype == tensor.dtype and torch.equal(now[name], tensor) for name, tensor in before.items()
    )


@pytest.mark.parametrize("kind", NORMS)
def test_smoothing_through_a_fold_leaves_the_float64_output_unchanged(kind: str) -> None:
    model = Block(NORMS[kind]).double().eval()
    x = torch.randn(2, 5, D, dtype=torch.float64) * torch.logspace(-1, 1, D, dtype=torch.float64)
    before = model(x)
    folds = folds_of(model, linear_regions(model, x))
    assert [region.name for region, _ in folds] == ["{q,k,v}", "{up,gate}"]
    for region, fold in folds:
        scale_I = torch.logspace(-2, 2, D, dtype=torch.float64)[torch.randperm(D)]
        fold.apply(scale_I)
        for name in region.layers:
            model.get_submodule(name).weight.data.mul_(scale_I)
    error = (model(x) - before).norm() / before.norm()
    assert error < 1e-9


@pytest.mark.parametrize("kind", NORMS)
def test_a_fold_really_divides_the_producers_tensor(kind: str) -> None:
    model = Block(NORMS[kind]).double().eval()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    (_region, fold), _ = folds_of(model, linear_regions(model, x))
    before = model.n1(x)
    scale_I = torch.rand(D, dtype=torch.float64) + 0.5
    fold.apply(scale_I)
    assert torch.allclose(model.n1(x) * scale_I, before, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(model.n1(x), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", NORMS)
def test_undo_is_bit_exact_in_every_type(kind: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(NORMS[kind](), nn.Linear(D, 4)).to(dtype).eval()
    before = bits(model)
    producer = Producer("0.weight", "0.bias" if "0.bias" in before else None, getattr(model[0], "offset", 0.0))
    fold = Fold(model, producer)
    fold.apply(torch.rand(D) * 3 + 0.1)
    assert not same_bits(model, before)
    fold.undo()
    assert same_bits(model, before)


def test_undo_takes_back_two_applications() -> None:
    model = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4))
    before = bits(model)
    fold = Fold(model, Producer("0.weight", "0.bias", 0.0))
    fold.apply(torch.rand(D) + 0.1)
    fold.apply(torch.rand(D) + 0.1)
    fold.undo()
    assert same_bits(model, before)


def test_undo_without_apply_does_nothing() -> None:
    model = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4))
    before = bits(model)
    Fold(model, Producer("0.weight", "0.bias", 0.0)).undo()
    assert same_bits(model, before)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_legal_folds_are_proved_and_leave_no_mark(kind: str, dtype: torch.dtype) -> None:
    model = Block(NORMS[kind]).to(dtype).eval()
    batches = [torch.randn(2, 5, D, dtype=dtype) for _ in range(3)]
    folds = folds_of(model, linear_regions(model, batches[0]))
    before = bits(model)
    assert prove(model, [lambda b=b: model(b) for b in batches], folds) == {}
    assert len(folds) == 2
    assert same_bits(model, before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def forced(layers: tuple[str, ...], gain: str, shift: str | None = None, offset: float = 0.0) -> Region:
    return Region(layers, D, Producer(gain, shift, offset), "")


class Trap(nn.Module):
    """A norm, layers a and b, and a forward given as a function."""

    def __init__(self, body: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.body = affine(nn.LayerNorm(D)), nn.Linear(D, D), nn.Linear(D, D), body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


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
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_an_illegal_fold_that_is_forced_by_hand_is_refuted(case: str) -> None:
    model = Trap(ILLEGAL[case]).eval()
    x = torch.randn(2, D, D)
    before = bits(model)
    region = forced(("a",), "norm.weight", "norm.bias")
    with torch.no_grad():
        failed = prove(model, [lambda: model(x)], [(region, Fold(model, region.producer))])
    assert failed == {"a": "the fold changed the output when tried"}
    assert same_bits(model, before)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("case", ["numpy", "custom function"])
def test_a_reader_that_torch_does_not_show_is_caught_by_the_proof_if_not_by_the_trace(case: str) -> None:
    model = Trap(ILLEGAL[case]).eval()
    x = torch.randn(2, 5, D)
    (region,) = linear_regions(model, x)
    failed: dict[str, str] = {}
    if region.producer is not None:
        with torch.no_grad():
            failed = prove(model, [lambda: model(x)], [(region, Fold(model, region.producer))])
    assert region.producer is None or failed


def test_a_square_transpose_fools_the_shapes_but_not_the_proof() -> None:
    model = Trap(ILLEGAL["square transpose"]).eval()
    x = torch.randn(2, D, D)
    (region,) = linear_regions(model, x)
    if region.producer is not None:  # the trace alone would fold it
        assert prove(model, [lambda: model(x)], [(region, Fold(model, region.producer))])


@pytest.mark.parametrize("width", [1, 2, 3])
def test_even_one_two_or_three_channels_refute_a_wrong_fold(width: int) -> None:
    for seed in range(20):
        model = nn.Module()
        model.norm, model.a = nn.LayerNorm(width), nn.Linear(width, 4)
        nn.init.normal_(model.norm.bias)
        x = torch.randn(5, width)

        def run(model: Any = model, x: torch.Tensor = x) -> Any:
            return model.a(model.norm(x)), model.norm(x)

        region = Region(("a",), width, Producer("norm.weight", "norm.bias", 0.0), "")
        assert prove(model, [run], [(region, Fold(model, region.producer))], seed=seed), seed


def test_two_channels_transposed_are_refuted_whatever_the_seed() -> None:
    for seed in range(20):
        model = nn.Module()
        model.norm, model.a = affine(nn.LayerNorm(2)), nn.Linear(2, 4)
        x = torch.randn(3, 2, 2)

        def run(model: Any = model, x: torch.Tensor = x) -> Any:
            return model.a(model.norm(x).transpose(-1, -2))

        region = Region(("a",), 2, Producer("norm.weight", "norm.bias", 0.0), "")
        assert prove(model, [run], [(region, Fold(model, region.producer))], seed=seed), seed


def test_a_wrong_offset_or_a_forgotten_shift_is_refuted() -> None:
    model = nn.Sequential(HandRMSNorm(1.0), nn.Linear(D, 4)).eval()
    x = torch.randn(5, D)
    wrong = forced(("1",), "0.weight", None, 0.0)
    right = forced(("1",), "0.weight", None, 1.0)
    assert prove(model, [lambda: model(x)], [(wrong, Fold(model, wrong.producer))])
    assert not prove(model, [lambda: model(x)], [(right, Fold(model, right.producer))])
    model = nn.Sequential(affine(nn.LayerNorm(D)), nn.Linear(D, 4)).eval()
    forgotten = forced(("1",), "0.weight", None, 0.0)
    assert prove(model, [lambda: model(x)], [(forgotten, Fold(model, forgotten.producer))])


def test_only_the_wrong_fold_of_several_is_dropped() -> None:
    model = Block(NORMS["RMSNorm"]).eval()
    x = torch.randn(2, 5, D)
    right, wrong = forced(("q", "k", "v"), "n1.weight"), forced(("up",), "n2.weight")
    before = bits(model)
    failed = prove(model, [lambda: model(x)], [(r, Fold(model, r.producer)) for r in (right, wrong)])
    assert list(failed) == ["up"]
    assert same_bits(model, before)


def test_folds_that_are_wrong_only_together_are_all_dropped() -> None:
    """Two regions that claim the same gain: each passes alone if the other's readers are multiplied back by it."""

    class Cancel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, 4), nn.Linear(D, 4)
            self.n1, self.n2 = nn.RMSNorm(D), nn.RMSNorm(D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clean = torch.equal(self.n1.weight, torch.ones(D)) or torch.equal(self.n2.weight, torch.ones(D))
            return (self.a(self.n1(x)) + self.b(self.n2(x))) * (1.0 if clean else 2.0)

    model = Cancel().eval()
    x = torch.randn(3, D)
    regions = [forced(("a",), "n1.weight"), forced(("b",), "n2.weight")]
    failed = prove(model, [lambda: model(x)], [(r, Fold(model, r.producer)) for r in regions])
    assert set(failed) == {"a", "b"} and "together" in failed["a"]


def test_a_path_taken_only_by_a_later_batch_is_proved_too() -> None:
    """Data-dependent flow: on the first batch the layer alone reads the norm, on the second a residual does too."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        return m.a(y) if x.sum() > 0 else m.a(y) + y

    model = Trap(body).eval()
    batches = [torch.ones(3, D) + torch.randn(3, D) * 0.1, -torch.ones(3, D) + torch.randn(3, D) * 0.1]
    (region,) = linear_regions(model, batches[0])
    assert region.producer is not None
    assert prove(model, [lambda b=b: model(b) for b in batches], [(region, Fold(model, region.producer))])
    assert not prove(model, [lambda: model(batches[0])], [(region, Fold(model, region.producer))])


def test_nothing_is_proved_on_an_output_that_is_not_repeatable_or_has_no_numbers() -> None:
    noisy = Trap(lambda m, x: m.a(m.norm(x)) + torch.rand(1)).eval()
    classes = Trap(lambda m, x: m.a(m.norm(x)).argmax(-1)).eval()
    broken = Trap(lambda m, x: m.a(m.norm(x)) * float("nan")).eval()
    for model in (noisy, classes, broken):
        region = forced(("a",), "norm.weight", "norm.bias")
        x = torch.randn(3, D)
        failed = prove(model, [lambda m=model, x=x: m(x)], [(region, Fold(model, region.producer))])
        assert "cannot be proved" in failed["a"]


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min, 1e30])
def test_a_mask_in_the_output_neither_hides_an_error_nor_forbids_a_proof(fill: float) -> None:
    """Masked logits hold −3e38 beside the figures: an error relative to the largest entry would always be nothing."""

    def masked(z: torch.Tensor) -> torch.Tensor:
        return z.masked_fill(torch.ones(D, D).triu(1).bool(), fill)

    right = Trap(lambda m, x: masked(m.a(m.norm(x)))).eval()
    wrong = Trap(lambda m, x: (lambda y: masked(m.a(y) + y))(m.norm(x))).eval()
    x = torch.randn(D, D)
    region = forced(("a",), "norm.weight", "norm.bias")
    assert not prove(right, [lambda: right(x)], [(region, Fold(right, region.producer))])
    assert prove(wrong, [lambda: wrong(x)], [(region, Fold(wrong, region.producer))])


def test_a_layer_called_by_keyword_is_proved() -> None:
    model = Trap(lambda m, x: m.a(input=m.norm(x))).eval()
    x = torch.randn(3, D)
    region = forced(("a",), "norm.weight", "norm.bias")
    assert not prove(model, [lambda: model(x)], [(region, Fold(model, region.producer))])
    wrong = forced(("a",), "norm.weight")
    assert prove(model, [lambda: model(x)], [(wrong, Fold(model, wrong.producer))])


def test_a_forward_that_fails_during_the_proof_leaves_parameters_and_hooks_as_they_were() -> None:
    calls = [0]

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("half-way")
        return m.a(m.norm(x))

    model = Trap(body).eval()
    before = bits(model)
    region = forced(("a",), "norm.weight", "norm.bias")
    with pytest.raises(RuntimeError, match="half-way"):
        prove(model, [lambda: model(torch.ones(3, D))], [(region, Fold(model, region.producer))])
    assert same_bits(model, before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_a_type_cannot_hold_is_known_before_it_is_folded() -> None:
    """1 + w in bfloat16 divided by 100 is 0.01, and w = −0.99 has two digits: the gain would be off by a fifth."""
    scale_I = torch.full((D,), 100.0)
    for offset, dtype, loses in (
        (1.0, torch.bfloat16, True),
        (1.0, torch.float16, True),
        (1.0, torch.float32, False),
        (0.0, torch.bfloat16, False),
        (0.0, torch.float16, False),
    ):
        model = nn.Sequential(HandRMSNorm(offset), nn.Linear(D, 4)).to(dtype)
        before = bits(model)
        assert Fold(model, Producer("0.weight", None, offset)).loses(scale_I) is loses, (offset, dtype)
        assert same_bits(model, before)


def test_a_gain_that_overflows_or_vanishes_in_float16_is_known_before_it_is_folded() -> None:
    model = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4)).half()
    model[0].weight.data.fill_(100.0)
    fold = Fold(model, Producer("0.weight", "0.bias", 0.0))
    assert fold.loses(torch.full((D,), 1e-4))
    assert not fold.loses(torch.full((D,), 1.0))
    model[0].weight.data.fill_(1e-4)
    assert fold.loses(torch.full((D,), 1e4))


def test_the_proof_holds_in_half_precision() -> None:
    model = Block(NORMS["RMSNorm"]).to(torch.bfloat16).eval()
    x = torch.randn(2, 5, D).to(torch.bfloat16)
    folds = folds_of(model, linear_regions(model, x))
    before = bits(copy.deepcopy(model))
    with torch.no_grad():
        assert prove(model, [lambda: model(x)], folds) == {}
    assert same_bits(model, before)
