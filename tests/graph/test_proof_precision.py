"""How sharp the proof is: masks, branches of a millionth, models that repeat themselves only within rounding, types."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_nets import HandRMSNorm, Trap, bits, forced, proved, regions, same_bits
from torch import nn

D = 16


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min, 1e30])
def test_a_mask_in_the_output_neither_hides_an_error_nor_forbids_a_proof(fill: float) -> None:
    """Masked logits hold −3e38 beside the figures: an error relative to the largest entry would always be nothing."""

    def masked(z: torch.Tensor) -> torch.Tensor:
        return z.masked_fill(torch.ones(D, D).triu(1).bool(), fill)

    right = Trap(lambda m, x: masked(m.a(m.norm(x)))).eval()
    wrong = Trap(lambda m, x: (lambda y: masked(m.a(y) + y))(m.norm(x))).eval()
    x = torch.randn(D, D)
    assert not proved(right, [right.forced()], x)
    assert proved(wrong, [wrong.forced()], x)


def test_an_error_in_a_branch_of_a_millionth_is_refuted_in_float32() -> None:
    """LayerScale begins at 1e-6. A legal fold is exact to the last bit, so no tolerance need hide such a branch."""
    right = Trap(lambda m, x: x + 1e-6 * m.a(m.norm(x))).eval()
    wrong = Trap(lambda m, x: x + 1e-6 * (lambda y: m.a(y) + torch.from_numpy(y.numpy().copy()))(m.norm(x))).eval()
    x = torch.randn(4, D)
    assert proved(right, [right.forced()], x) == {}
    assert proved(wrong, [wrong.forced()], x)


def test_a_model_that_repeats_itself_only_within_rounding_is_proved_within_rounding() -> None:
    calls = [0]

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return m.a(m.norm(x)) * (1 + 1e-6 * (calls[0] % 2))

    model = Trap(body).eval()
    assert proved(model, [model.forced()], torch.randn(4, D)) == {}
    assert proved(model, [forced(model, ["a"], "norm.weight")], torch.randn(4, D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_legal_folds_are_proved_in_every_type_and_wrong_ones_are_not(offset: float, dtype: torch.dtype) -> None:
    """Norms with 1 + w have rounding of their own; beside them the others are still held to the last bit."""
    parts = {"n2": HandRMSNorm(offset, width=D), "c": nn.Linear(D, D)}
    model = Trap(lambda m, x: (m.a(m.norm(x)), m.c(m.b(m.n2(x)).relu())), **parts).to(dtype).eval()
    x = torch.randn(4, D).to(dtype)
    found, before = regions(model, x), bits(model)
    assert [region.into for region in found] == ["norm", "n2", "the rows of b"]
    assert proved(model, found, x) == {}
    wrong = forced(model, ["c"], "n2.weight", offset=offset)
    assert list(proved(model, [found[0], wrong], x)) == ["c"]
    assert same_bits(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2e-3, 1e-1])
def test_a_hidden_reader_is_refuted_in_every_type(size: float, dtype: torch.dtype) -> None:
    """numpy hides it from the trace. In float16 a tolerance of a hundredth of the output would let the smaller pass."""
    hidden = lambda y: torch.from_numpy(y.float().numpy().copy()).to(y.dtype)  # noqa: E731
    wrong = Trap(lambda m, x: m.a(m.norm(x)) + size * hidden(m.norm.weight) * hidden(x)).to(dtype).eval()
    right = Trap(lambda m, x: m.a(m.norm(x)) + size * hidden(x)).to(dtype).eval()
    x = torch.randn(8, D).to(dtype)
    before = bits(wrong)
    assert proved(wrong, [wrong.forced()], x) == {"a": "the fold changed the output when tried"}
    assert proved(right, [right.forced()], x) == {}
    assert same_bits(wrong, before) and not wrong._forward_pre_hooks


def test_in_float16_small_numbers_are_judged_in_float32() -> None:
    """Half of a weight of 2e-7 is rounded in float16: what is the same in real numbers is not to the last bit."""
    model = Trap(lambda m, x: m.a(m.norm(x)) + 1000.0 * m.b(m.norm(x))).half().eval()
    model.b.weight.data.fill_(3 * 2.0**-24), model.b.bias.data.zero_()
    found = regions(model, torch.randn(3, D).half(), layers=["a"])
    assert list(found[0].compensated) == ["b"]
    before = bits(model)
    assert proved(model, found, torch.randn(3, D).half()) == {}
    assert same_bits(model, before)


def test_a_model_with_a_type_in_its_code_is_refused_by_name() -> None:
    model = Trap(lambda m, x: m.a(m.norm(x)) + 1000.0 * m.b(m.norm(x).half())).half().eval()
    model.b.weight.data.fill_(3 * 2.0**-24), model.b.bias.data.zero_()
    found = regions(model, torch.randn(3, D).half(), layers=["a"])
    (reason,) = proved(model, found, torch.randn(3, D).half()).values()
    assert reason == "cannot be proved: float16 is too coarse, and the model does not run in float32"
