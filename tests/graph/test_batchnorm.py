"""Which BatchNorms may be folded into the layer before them, and that a fold is exact and can be taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_nets import Handmade
from torch import nn

from evenbits.graph.batchnorm import NormAfter, fold_norms, norms_after_layers
from evenbits.graph.trace import trace
from evenbits.nn.folded import FoldedNorm
from evenbits.nn.layout import layout_of


def lively(model: nn.Module) -> nn.Module:
    """Statistics as after training, in float64, in evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and module.running_var is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.1, 4, generator=generator)
            if module.weight is not None:
                nn.init.normal_(module.weight, generator=generator)
                nn.init.normal_(module.bias, generator=generator)
    return model.double().eval()


def pairs(model: nn.Module, *inputs: torch.Tensor) -> list[NormAfter]:
    layouts = {name: found for name, m in model.named_modules() if (found := layout_of(m)) is not None}
    return norms_after_layers(model, trace(model, lambda: model(*inputs), layouts))


def names(model: nn.Module, *inputs: torch.Tensor) -> list[tuple[str, str]]:
    return [(pair.layer, pair.norm) for pair in pairs(model, *inputs)]


FOLDABLE: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "conv2d": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    "no bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8), (2, 4, 7, 7)),
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 7)),
    "conv3d": (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (2, 4, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed, one dimension": (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 5)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
    "linear, no bias": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, eps=0.1), (5, 4)),
    "not affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 7, 7)),
}


@pytest.mark.parametrize("case", FOLDABLE)
@pytest.mark.parametrize("behind", [nn.Identity(), nn.ReLU(inplace=True)], ids=["nothing", "ReLU in place"])
def test_a_fold_is_equal_and_comes_back_bit_for_bit(case: str, behind: nn.Module) -> None:
    layer, norm, shape = FOLDABLE[case]
    model = lively(nn.Sequential(layer, norm, behind))
    x = torch.randn(shape, dtype=torch.float64)
    assert names(model, x) == [("0", "1")]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = {name: id(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(x).clone()
        undo = fold_norms(model, pairs(model, x), {"0": layout_of(layer)})
        assert isinstance(model[1], FoldedNorm)
        assert (model(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
        undo()
        assert model[1] is norm
        assert model(x).equal(expected)
    assert list(model.state_dict()) == list(before)
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in before.items())
    assert {name: id(p) for name, p in model.named_parameters()} == objects


def conv(inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def net(body: Any, **parts: Any) -> nn.Module:
    made = {"a": conv(), "b": conv(), "n": nn.BatchNorm2d(4), "m": nn.BatchNorm2d(4)}
    return lively(Handmade(body, **{**made, **parts}))


def kept(model: Any, y: torch.Tensor) -> torch.Tensor:
    model.seen = y
    return y


NOT: dict[str, nn.Module] = {
    "before the layer": net(lambda m, x: m.a(m.n(x))),
    "two readers": net(lambda m, x: (lambda y: m.n(y) + y)(m.a(x))),
    "two norms read it": net(lambda m, x: (lambda y: m.n(y) + m.m(y))(m.a(x))),
    "also an output": net(lambda m, x: (lambda y: (m.n(y), y))(m.a(x))),
    "kept by the model": net(lambda m, x: m.n(kept(m, m.a(x)))),
    "a norm of two layers": net(lambda m, x: m.n(m.a(x)) + m.n(m.b(x))),
    "a layer that ran twice": net(lambda m, x: m.n(m.a(m.a(x)))),
    "something between": net(lambda m, x: m.n(m.a(x).relu())),
    "written to between": net(lambda m, x: m.n(m.a(x).mul_(2))),
    "no running statistics": net(lambda m, x: m.n(m.a(x)), n=nn.BatchNorm2d(4, track_running_stats=False)),
    "another norm": net(lambda m, x: m.n(m.a(x)), n=nn.InstanceNorm2d(4)),
    "a subclass": net(lambda m, x: m.n(m.a(x)), n=type("Own", (nn.BatchNorm2d,), {})(4)),
    "a weight of two layers": net(lambda m, x: m.n(m.a(x)) + m.b(x)),
}
NOT["a weight of two layers"].b.weight = NOT["a weight of two layers"].a.weight


@pytest.mark.parametrize("case", NOT)
def test_what_is_not_folded(case: str) -> None:
    assert names(NOT[case], torch.randn(2, 4, 5, 5, dtype=torch.float64)) == []


def test_in_training_mode_nothing_is_folded() -> None:
    model, x = net(lambda m, x: m.m(m.b(m.n(m.a(x))))), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert names(model, x) == [("a", "n"), ("b", "m")]
    model.n.train()
    assert names(model, x) == [("b", "m")]


def test_a_norm_with_hooks_is_left_alone() -> None:
    model, x = net(lambda m, x: m.n(m.a(x))), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    handle = model.n.register_forward_hook(lambda *_: None)
    assert names(model, x) == []
    handle.remove()
    assert names(model, x) == [("a", "n")]


@pytest.mark.parametrize("length", [5, 6])
def test_a_norm_over_another_dimension_than_the_layers_channels(length: int) -> None:
    """Linear gives [N, L, O]; the norm's channels are L, also where L = O makes every shape fit."""
    model = lively(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(length)))
    assert names(model, torch.randn(3, length, 4, dtype=torch.float64)) == []


def test_an_error_in_the_middle_takes_the_first_folds_back() -> None:
    model, x = net(lambda m, x: m.m(m.b(m.n(m.a(x))))), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    found, before = pairs(model, x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyError):
        fold_norms(model, found, {"a": layout_of(model.a)})  # b's is missing
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in before.items())
    assert type(model.n) is nn.BatchNorm2d
