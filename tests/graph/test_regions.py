"""Who feeds whom, on nets made to mislead: every region that must not be folded says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from evenbits.graph.regions import Region, find_regions
from evenbits.graph.trace import trace

D = 8


class Handmade(nn.Module):
    """Modules by name, and the forward as a function."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._body = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self._body(self, x)


class HandLayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.randn(D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * self.weight + self.bias


class HandRMSNorm(nn.Module):
    def __init__(self, offset: float = 0.0, swap: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D) + 0.5)
        self.offset, self.swap = offset, swap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        gain = self.weight if not self.offset else self.offset + self.weight
        return gain * x if self.swap else x * gain


def lin(out: int = D) -> nn.Linear:
    return nn.Linear(D, out)


def regions(model: nn.Module, x: torch.Tensor | None = None, layers: list[str] | None = None) -> list[Region]:
    model.eval()
    x = torch.randn(2, 3, D) if x is None else x
    widths = {n: m.in_features for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    widths = {n: w for n, w in widths.items() if layers is None or n in layers}
    return find_regions(trace(model, lambda: model(x), widths), widths)


def only(model: nn.Module, **kwargs: Any) -> Region:
    (region,) = regions(model, **kwargs)
    return region


@pytest.mark.parametrize(
    ("norm", "gain", "shift", "offset"),
    [
        (nn.LayerNorm(D), "norm.weight", "norm.bias", 0.0),
        (nn.LayerNorm(D, bias=False), "norm.weight", None, 0.0),
        (nn.RMSNorm(D), "norm.weight", None, 0.0),
        (HandRMSNorm(), "norm.weight", None, 0.0),
        (HandRMSNorm(swap=True), "norm.weight", None, 0.0),
        (HandRMSNorm(offset=1.0), "norm.weight", None, 1.0),
        (HandRMSNorm(offset=0.5, swap=True), "norm.weight", None, 0.5),
    ],
    ids=["LayerNorm", "LayerNorm-no-bias", "RMSNorm", "hand", "hand-swapped", "1+w", "0.5+w"],
)
def test_a_norm_with_a_gain_is_a_producer(norm: nn.Module, gain: str, shift: str | None, offset: float) -> None:
    region = only(Handmade(lambda m, x: m.proj(m.norm(x)), norm=norm, proj=lin()))
    assert region.producer is not None, region.reason
    assert (region.producer.gain, region.producer.shift, region.producer.offset) == (gain, shift, offset)
    assert region.reason == "" and region.width == D


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(D, elementwise_affine=False), nn.RMSNorm(D, elementwise_affine=False), nn.Identity(), nn.GELU()],
)
def test_without_a_gain_there_is_nothing_to_fold_into(norm: nn.Module) -> None:
    region = only(Handmade(lambda m, x: m.proj(m.norm(x) * 2.0), norm=norm, proj=lin()))
    assert region.producer is None
    assert "no per-channel gain" in region.reason


def test_a_layer_norm_over_two_dimensions_is_no_per_channel_gain() -> None:
    norm = nn.LayerNorm([3, D])
    region = only(Handmade(lambda m, x: m.proj(m.norm(x)), norm=norm, proj=lin()))
    assert region.producer is None


def test_a_layer_norm_by_hand_ends_in_an_addition_and_is_not_folded() -> None:
    """y = x·g + b by hand would need both parameters; the value is computed by the addition."""
    region = only(Handmade(lambda m, x: m.proj(m.norm(x)), norm=HandLayerNorm(), proj=lin()))
    assert region.producer is None
    assert "computed by add" in region.reason


def test_readers_of_one_tensor_share_a_region_in_order_of_use() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        return m.v(y) + m.q(y.reshape(-1, D)).view_as(x) + m.k(y.clone())

    region = only(Handmade(body, norm=nn.LayerNorm(D), q=lin(), k=lin(), v=lin()))
    assert set(region.layers) == {"q", "k", "v"}
    assert region.name == "{q,k,v}" and region.producer is not None


def test_the_name_of_a_region_shows_the_common_parent() -> None:
    assert Region(("a.b.q", "a.b.k"), D, None, "").name == "a.b.{q,k}"
    assert Region(("a.q", "b.k"), D, None, "").name == "a.q,b.k"
    assert Region(("a.q",), D, None, "").name == "a.q"


def test_a_residual_reader_blocks_the_fold_and_is_named() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        return y + m.proj(y)

    region = only(Handmade(body, norm=nn.LayerNorm(D), proj=lin()))
    assert region.producer is None
    assert region.reason == "its tensor is also read by add in the model"


def test_a_reader_inside_another_module_is_named_with_its_module() -> None:
    class Scale(nn.Module):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return y.sigmoid()

    body = lambda m, x: (lambda y: m.proj(y) * m.gate(y))(m.norm(x))  # noqa: E731
    region = only(Handmade(body, norm=nn.LayerNorm(D), proj=lin(), gate=Scale()))
    assert region.reason == "its tensor is also read by sigmoid in gate"


def test_a_layer_left_in_float_is_a_foreign_reader() -> None:
    body = lambda m, x: (lambda y: m.proj(y) + m.other(y))(m.norm(x))  # noqa: E731
    region = only(Handmade(body, norm=nn.LayerNorm(D), proj=lin(), other=lin()), layers=["proj"])
    assert region.producer is None
    assert "in other" in region.reason


def test_a_reader_behind_a_view_is_found() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        first = y[:, 0].unsqueeze(1)
        return m.proj(y) + first.tanh()

    region = only(Handmade(body, norm=nn.LayerNorm(D), proj=lin()))
    assert "read by tanh" in region.reason


def test_half_of_the_channels_read_elsewhere_blocks_the_fold() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        a, _ = y.chunk(2, dim=-1)
        return m.proj(y).sum() + a.sum()

    region = only(Handmade(body, norm=nn.LayerNorm(D), proj=lin()))
    assert region.producer is None and "also read by" in region.reason


def test_a_value_that_the_model_returns_is_not_folded() -> None:
    body = lambda m, x: (lambda y: {"out": m.proj(y), "hidden": [y]})(m.norm(x))  # noqa: E731
    region = only(Handmade(body, norm=nn.LayerNorm(D), proj=lin()))
    assert region.reason == "its tensor is an output of the model"


def test_a_view_of_the_value_that_the_model_returns_is_not_folded() -> None:
    body = lambda m, x: (lambda y: (m.proj(y), y[:, 0]))(m.norm(x))  # noqa: E731
    region = only(Handmade(body, norm=nn.LayerNorm(D), proj=lin()))
    assert region.reason == "its tensor is an output of the model"


def test_a_write_in_place_after_the_read_blocks_the_fold() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        z = m.proj(y)
        y += 1.0
        return z

    region = only(Handmade(body, norm=nn.LayerNorm(D), proj=lin()))
    assert region.reason == "its tensor is written in place"


def test_a_write_in_place_before_the_read_blocks_the_fold() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        y.add_(1.0)
        return m.proj(y)

    assert only(Handmade(body, norm=nn.LayerNorm(D), proj=lin())).producer is None


def test_a_norm_used_twice_has_a_gain_that_is_not_free() -> None:
    body = lambda m, x: m.a(m.norm(x)) + m.b(m.norm(x * 2))  # noqa: E731
    found = regions(Handmade(body, norm=nn.LayerNorm(D), a=lin(), b=lin()))
    assert len(found) == 2
    assert all(region.producer is None for region in found)


def test_norms_that_share_their_weight_are_not_folded() -> None:
    model = Handmade(lambda m, x: m.a(m.n1(x)) + m.b(m.n2(x)), n1=nn.LayerNorm(D), n2=nn.LayerNorm(D), a=lin(), b=lin())
    model.n2.weight = model.n1.weight
    assert all(region.producer is None for region in regions(model))


def test_a_tied_gain_is_not_folded_even_if_only_one_norm_runs() -> None:
    model = Handmade(lambda m, x: m.a(m.n1(x)), n1=nn.RMSNorm(D), n2=nn.RMSNorm(D), a=lin())
    model.n2.weight = model.n1.weight
    assert only(model).producer is None


def test_a_gain_read_functionally_elsewhere_is_not_folded() -> None:
    body = lambda m, x: m.proj(m.norm(x)) + (m.norm.weight * 3).sum()  # noqa: E731
    assert only(Handmade(body, norm=nn.LayerNorm(D), proj=lin())).producer is None


def test_a_shift_read_elsewhere_is_not_folded() -> None:
    body = lambda m, x: m.proj(m.norm(x)) + m.norm.bias.sum()  # noqa: E731
    assert only(Handmade(body, norm=nn.LayerNorm(D), proj=lin())).producer is None


def test_a_layer_that_reads_two_tensors_is_not_folded() -> None:
    body = lambda m, x: m.proj(m.n1(x)) + m.proj(m.n2(x))  # noqa: E731
    region = only(Handmade(body, n1=nn.LayerNorm(D), n2=nn.LayerNorm(D), proj=lin()))
    assert region.producer is None and "runs more than once" in region.reason


def test_a_layer_that_reads_one_tensor_twice_is_folded() -> None:
    body = lambda m, x: (lambda y: m.proj(y) + m.proj(y))(m.norm(x))  # noqa: E731
    assert only(Handmade(body, norm=nn.LayerNorm(D), proj=lin())).producer is not None


def test_a_layer_that_reads_two_tensors_joins_their_regions() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        u, v = m.n1(x), m.n2(x)
        return m.a(u) + m.b(v) + m.both(u) + m.both(v)

    region = only(Handmade(body, n1=nn.LayerNorm(D), n2=nn.LayerNorm(D), a=lin(), b=lin(), both=lin()))
    assert set(region.layers) == {"a", "b", "both"} and region.producer is None


def test_an_unused_layer_is_in_no_region() -> None:
    found = regions(Handmade(lambda m, x: m.proj(m.norm(x)), norm=nn.LayerNorm(D), proj=lin(), idle=lin()))
    assert [region.layers for region in found] == [("proj",)]


def test_a_layer_that_reads_the_input_has_no_producer() -> None:
    region = only(Handmade(lambda m, x: m.proj(x), proj=lin()))
    assert region.reason == "its tensor comes from outside the model"


def test_the_weight_of_a_multiplication_with_a_buffer_is_not_a_parameter() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gain", torch.rand(D) + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.gain

    assert only(Handmade(lambda m, x: m.proj(m.scale(x)), scale=Buffered(), proj=lin())).producer is None


def test_a_half_precision_norm_cast_back_is_followed() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.proj(m.norm(x.double()).float())

    region = only(Handmade(body, norm=nn.LayerNorm(D, dtype=torch.float64), proj=lin()))
    assert region.producer is not None


def test_a_scalar_or_broadcast_parameter_is_no_per_channel_gain() -> None:
    class Scalar(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(shape) + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    for shape in ((), (1,), (3, D), (3, 1)):
        assert only(Handmade(lambda m, x: m.proj(m.s(x)), s=Scalar(*shape), proj=lin())).producer is None, shape


def test_a_gain_that_is_computed_is_not_folded() -> None:
    class Softplus(HandRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight.exp()

    assert only(Handmade(lambda m, x: m.proj(m.norm(x)), norm=Softplus(), proj=lin())).producer is None
