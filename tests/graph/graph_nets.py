"""Small nets and short cuts for the tests of the graph floor: a forward given as a function, regions found and forced,
and a smoothing carried out on the float model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from evenbits.graph.folding import Fold, float_outputs, prove
from evenbits.graph.regions import Part, Region, find_regions
from evenbits.graph.trace import Trace, trace
from evenbits.graph.variables import Source
from evenbits.nn.layout import Layout, layout_of

D = 8


class Handmade(nn.Module):
    """Modules (and parameters) by name, and the forward as a function of them and the inputs."""

    def __init__(self, body: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._body = body

    def forward(self, *args: Any) -> Any:
        return self._body(self, *args)


class HandLayerNorm(nn.Module):
    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * self.weight + self.bias


class HandRMSNorm(nn.Module):
    """The gain is weight, or offset + weight; swap: the gain stands left of the product."""

    def __init__(self, offset: float = 0.0, swap: bool = False, width: int = D) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.1 + (1.0 - offset))
        self.offset, self.swap = offset, swap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        gain = self.offset + self.weight if self.offset else self.weight
        return gain * x if self.swap else x * gain


def lin(out: int = D, width: int = D, bias: bool = True) -> nn.Linear:
    return nn.Linear(width, out, bias=bias)


def conv(out: int = D, width: int = D, kernel: int = 3, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(width, out, kernel, padding=kwargs.pop("padding", kernel // 2), **kwargs)


def affine(norm: nn.Module) -> nn.Module:
    """Gives a norm, or all norms of a net, a gain and a bias (and statistics) that are not those of the first day."""
    for tensor in norm.parameters():
        if tensor.ndim == 1:
            tensor.data.uniform_(0.5, 1.5)
    for name, tensor in norm.named_buffers():
        if name.startswith("running_"):
            tensor.uniform_(0.5, 1.5)
    return norm


def layouts(model: nn.Module) -> dict[str, Layout]:
    found = {name: layout_of(module) for name, module in model.named_modules()}
    return {name: layout for name, layout in found.items() if layout is not None}


def flow_of(model: nn.Module, *inputs: Any) -> Trace:
    model.eval()
    return trace(model, lambda: model(*inputs), layouts(model))


def regions(model: nn.Module, *inputs: Any, layers: Iterable[str] | None = None) -> list[Region]:
    """layers: those that are to be smoothed, if not all are."""
    widths = {name: layout.in_channels for name, layout in layouts(model).items()}
    widths = {name: width for name, width in widths.items() if layers is None or name in layers}
    return find_regions(flow_of(model, *inputs), widths)


def report(found: Iterable[Region], failed: Mapping[str, str] | None = None) -> dict[str, str]:
    """Region → what it is folded into, or × and why it is multiplied."""
    failed = failed or {}
    return {r.name: f"× {failed.get(r.name) or r.reason}" if failed.get(r.name) or r.reason else r.into for r in found}


def forced(model: nn.Module, layers: Sequence[str], *sources: str, offset: float = 0.0) -> Region:
    """A region as the rules would never have it: `layers` are said to be fed by `sources` and by nothing else."""
    known = layouts(model)
    width = known[layers[0]].in_channels
    every = torch.arange(width)
    parts = [Part(Source(name, name in known, offset, 1, width), every) for name in sources]
    return Region(tuple(layers), width, dict.fromkeys(layers, every), known, tuple(parts))


def proved(model: nn.Module, found: Sequence[Region], *inputs: Any) -> dict[str, str]:
    """What the proof refutes, on one batch."""
    narrowest = min((tensor.dtype for tensor in model.parameters()), key=lambda dtype: dtype.itemsize)
    with torch.no_grad():
        return prove(model, [lambda: model(*inputs)], found, narrowest=narrowest)


class Trap(nn.Module):
    """A norm, layers a and b, and a forward given as a function."""

    def __init__(self, body: Callable[[Any, torch.Tensor], Any], width: int = 16, **parts: nn.Module) -> None:
        super().__init__()
        self.norm, self.a, self.b = affine(nn.LayerNorm(width)), nn.Linear(width, width), nn.Linear(width, width)
        for name, part in parts.items():
            self.add_module(name, part)
        self.body = body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)

    def forced(self) -> Region:
        """a is said to read the norm's output, and nothing else is."""
        return forced(self, ["a"], "norm.weight", "norm.bias")


def random_scale(width: int) -> torch.Tensor:
    """s between 1/5 and 5, none of them a power of two."""
    return torch.exp((torch.rand(width, dtype=torch.float64) - 0.5) * 3.2)


def smooth(model: nn.Module, found: Sequence[Region], failed: Mapping[str, str]) -> None:
    """Carries a smoothing with random s out on the float model: folds, and an explicit division where there is none."""
    for region in found:
        scale_S = random_scale(region.width)
        if region.reason or region.name in failed:
            for name, index_I in region.index.items():
                layout = region.layouts[name]
                model.get_submodule(name).register_forward_pre_hook(_divide(scale_S[index_I], layout), with_kwargs=True)
        else:
            Fold(model, region).apply(scale_S)
        for name, index_I in region.index.items():
            weight = model.get_submodule(name).get_parameter("weight")
            weight.data.mul_(region.layouts[name].mount_inputs(scale_S[index_I], weight.ndim))


def _divide(scale_I: torch.Tensor, layout: Layout) -> Callable[..., Any]:
    def divided(value: Any) -> Any:
        tensor = isinstance(value, torch.Tensor)
        return value / layout.on_activation(scale_I, value.ndim).to(value.dtype) if tensor else value

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(divided(arg) for arg in args), {name: divided(value) for name, value in kwargs.items()}

    return hook


def relative_error(before: Any, after: Any) -> float:
    """The largest error of any output, relative to that output's size."""
    pairs = zip(float_outputs(before), float_outputs(after), strict=True)
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


def check_smoothing(
    model: nn.Module, inputs: Sequence[Any], expected: Mapping[str, str], layers: Iterable[str] | None = None
) -> None:
    """In float64: the regions are as expected, the proof finds nothing against the folds, and smoothing with random s
    leaves the output as it was. Expected reasons (×) may be cut short."""
    model.double().eval()
    inputs = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        found = regions(model, *inputs, layers=layers)
        seen = report(found)
        cut = {name: seen[name][: len(text)] if text[:1] == "×" else seen[name] for name, text in expected.items()}
        assert {**seen, **cut} == expected
        check_found(model, lambda: model(*inputs), found)


def check_found(model: nn.Module, run: Callable[[], Any], found: Sequence[Region], limit: float = 1e-12) -> None:
    """The proof finds nothing against the folds, and smoothing with random s leaves the output as it was."""
    before, state = run(), bits(model)
    assert prove(model, [run], found) == {}
    assert same_bits(model, state)
    smooth(model, found, {})
    assert not same_bits(model, state)
    error = relative_error(before, run())
    assert error < limit


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(model: nn.Module, before: Mapping[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(
        now[name].dtype == tensor.dtype and torch.equal(now[name], tensor) for name, tensor in before.items()
    )
