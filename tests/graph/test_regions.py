"""Who feeds whom, on nets made to mislead: every region that must not be folded says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_nets import D, HandLayerNorm, Handmade, HandRMSNorm, conv, lin, proved, regions
from torch import nn
from torch.nn import functional as F

from evenbits.graph.regions import Region


def only(model: nn.Module, x: torch.Tensor | None = None, layers: list[str] | None = None) -> Region:
    (region,) = regions(model, torch.randn(2, 3, D) if x is None else x, layers=layers)
    return region


def scaled(gain: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A norm whose gain is made of a parameter."""
    return Handmade(lambda m, x: F.normalize(x, dim=-1) * gain(m.weight), weight=nn.Parameter(torch.rand(D) + 0.5))


def sources(region: Region) -> list[tuple[str, float]]:
    return [(part.source.name, part.source.offset) for part in region.parts]


@pytest.mark.parametrize(
    ("norm", "gain", "shift", "offset"),
    [
        (nn.LayerNorm(D), "norm.weight", "norm.bias", 0.0),
        (nn.LayerNorm(D, bias=False), "norm.weight", None, 0.0),
        (nn.RMSNorm(D), "norm.weight", None, 0.0),
        (HandLayerNorm(), "norm.weight", "norm.bias", 0.0),
        (HandRMSNorm(), "norm.weight", None, 0.0),
        (HandRMSNorm(swap=True), "norm.weight", None, 0.0),
        (HandRMSNorm(offset=1.0), "norm.weight", None, 1.0),
        (HandRMSNorm(offset=0.5, swap=True), "norm.weight", None, 0.5),
        (scaled(lambda w: w - 3), "norm.weight", None, -3.0),
        (scaled(lambda w: torch.add(w, 1, alpha=2)), "norm.weight", None, 2.0),
        (scaled(lambda w: 1 + w.double().float().view(1, 1, -1)), "norm.weight", None, 1.0),
    ],
    ids=[
        "LayerNorm",
        "LayerNorm-no-bias",
        "RMSNorm",
        "LayerNorm-hand",
        "hand",
        "hand-swapped",
        "1+w",
        "0.5+w",
        "w-3",
        "w+2·1",
        "1+w viewed",
    ],
)
def test_a_norm_is_folded_into_its_gain_and_bias(norm: nn.Module, gain: str, shift: str, offset: float) -> None:
    model = Handmade(lambda m, x: m.proj(m.norm(x)), norm=norm, proj=lin())
    region = only(model)
    assert sources(region) == [(gain, offset), *([(shift, 0.0)] if shift else [])], region.reason
    assert region.reason == "" and region.width == D and region.into == "norm"
    assert proved(model, [region], torch.randn(2, 3, D)) == {}


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.LayerNorm(D, elementwise_affine=False), "computed by native_layer_norm, through which no factor passes"),
        (nn.RMSNorm(D, elementwise_affine=False), "computed by rsqrt, through which no factor passes"),
        (nn.Identity(), "its tensor comes from outside the model"),
        (nn.GELU(), "computed by gelu, through which no factor passes"),
    ],
)
def test_without_a_gain_there_is_nothing_to_fold_into(norm: nn.Module, reason: str) -> None:
    region = only(Handmade(lambda m, x: m.proj(m.norm(x) * 2.0), norm=norm, proj=lin()))
    assert not region.parts
    assert region.reason == reason


def test_a_layer_norm_over_two_dimensions_is_no_per_channel_gain() -> None:
    norm = nn.LayerNorm([3, D])
    region = only(Handmade(lambda m, x: m.proj(m.norm(x)), norm=norm, proj=lin()))
    assert not region.parts and region.reason


def test_readers_of_one_tensor_share_a_region_in_order_of_use() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        return m.v(y) + m.q(y.reshape(-1, D)).view_as(x) + m.k(y.clone())

    region = only(Handmade(body, norm=nn.LayerNorm(D), q=lin(), k=lin(), v=lin()))
    assert region.layers == ("v", "q", "k")
    assert region.name == "{v,q,k}" and region.into == "norm"


def test_the_name_of_a_region_shows_the_common_parent() -> None:
    for layers, name in ((("a.b.q", "a.b.k"), "a.b.{q,k}"), (("a.q", "b.k"), "a.q,b.k"), (("a.q",), "a.q")):
        assert Region(layers, D, {}, {}).name == name


READERS: dict[str, tuple[Callable[..., Any], str]] = {
    "residual, returned": (lambda m, x: (lambda y: y + m.proj(y))(m.norm(x)), "its tensor is an output of the model"),
    "residual, squashed": (lambda m, x: (lambda y: y + m.proj(y))(m.norm(x)).tanh(), "is also read by tanh"),
    "residual of the input": (
        lambda m, x: (lambda y: x + y + m.proj(y))(m.norm(x)),
        "is also read by add in the model",
    ),
    "behind a view": (lambda m, x: (lambda y: m.proj(y) + y[:, :1].tanh())(m.norm(x)), "also read by tanh"),
    "the model returns it": (lambda m, x: (lambda y: {"o": m.proj(y), "h": [y]})(m.norm(x)), "an output of the model"),
    "it returns a view": (lambda m, x: (lambda y: (m.proj(y), y[:, 0]))(m.norm(x)), "an output of the model"),
    "it returns half": (lambda m, x: (lambda y: (m.proj(y), y[..., :4]))(m.norm(x)), "an output of the model"),
    "written after": (lambda m, x: (lambda y: (m.proj(y), y.add_(1.0))[0])(m.norm(x)), "also read by add in the model"),
    "written before": (lambda m, x: m.proj(m.norm(x).add_(1.0)), "computed by add, through which no factor passes"),
    "a number is added": (lambda m, x: m.proj(m.norm(x) + 1.0), "computed by add, through which no factor passes"),
    "zeroed in part": (lambda m, x: (lambda y: (m.proj(y), y[:, 0].zero_())[0])(m.norm(x)), "also read by"),
    "gain read elsewhere": (lambda m, x: m.proj(m.norm(x)) + (m.norm.weight * 3).mean(), "also read by mean"),
    "gain summed before": (lambda m, x: m.norm.weight.sum() + m.proj(m.norm(x)), "in more than one way"),
    "shift read elsewhere": (lambda m, x: m.proj(m.norm(x)) + m.norm.bias.sum(), "also read by sum"),
    "the gain is computed": (lambda m, x: m.proj(x * m.norm.weight.exp()), "through which no factor passes"),
    "cast to integers": (lambda m, x: (lambda y: m.proj(y) + y.long().float())(m.norm(x)), "also read by _to_copy"),
}


@pytest.mark.parametrize("case", READERS)
def test_another_reader_blocks_the_fold_and_is_named(case: str) -> None:
    body, reason = READERS[case]
    region = only(Handmade(body, norm=nn.LayerNorm(D), proj=lin()))
    assert not region.parts and reason in region.reason, region.reason


def test_a_reader_inside_another_module_is_named_with_its_module() -> None:
    class Scale(nn.Module):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return y.sigmoid()

    body = lambda m, x: (lambda y: m.proj(y) * m.gate(y))(m.norm(x))  # noqa: E731
    region = only(Handmade(body, norm=nn.LayerNorm(D), proj=lin(), gate=Scale()))
    assert region.reason == "its tensor is also read by sigmoid in gate"


def test_a_layer_left_in_float_is_compensated_and_blocks_nothing() -> None:
    body = lambda m, x: (lambda y: m.proj(y) + m.other(y))(m.norm(x))  # noqa: E731
    region = only(Handmade(body, norm=nn.LayerNorm(D), proj=lin(), other=lin()), layers=["proj"])
    assert region.layers == ("proj",) and list(region.compensated) == ["other"] and region.into == "norm"


def test_a_layer_left_in_float_that_reads_half_of_the_channels_is_compensated_there() -> None:
    body = lambda m, x: (lambda y: m.proj(y) + m.part(y[..., 4:]))(m.norm(x))  # noqa: E731
    model = Handmade(body, norm=nn.LayerNorm(D), proj=lin(), part=lin(width=4))
    region = only(model, layers=["proj"])
    assert region.compensated["part"].tolist() == [4, 5, 6, 7]
    assert not proved(model, [region], torch.randn(2, 3, D))


def test_a_sum_over_some_channels_elsewhere_blocks_the_fold() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        a, _ = y.chunk(2, dim=-1)
        return m.proj(y).sum() + a.sum()

    region = only(Handmade(body, norm=nn.LayerNorm(D), proj=lin()))
    assert not region.parts and "also read by sum" in region.reason


def test_a_norm_used_twice_joins_the_regions_of_its_readers() -> None:
    body = lambda m, x: m.a(m.norm(x)) + m.b(m.norm(x * 2))  # noqa: E731
    region = only(Handmade(body, norm=nn.LayerNorm(D), a=lin(), b=lin()))
    assert region.layers == ("a", "b") and region.into == "norm"


def shared_gain(body: Callable[..., Any], make: Callable[[int], nn.Module]) -> Handmade:
    model = Handmade(body, n1=make(D), n2=make(D), a=lin(), b=lin())
    for name, _ in list(model.n2.named_parameters()):
        setattr(model.n2, name, getattr(model.n1, name))
    return model


def test_norms_that_share_gain_and_bias_are_one_source() -> None:
    model = shared_gain(lambda m, x: m.a(m.n1(x)) + m.b(m.n2(x * 2)), nn.LayerNorm)
    region = only(model)
    assert region.layers == ("a", "b") and region.into == "n1"
    assert not proved(model, [region], torch.randn(2, 3, D))


def test_norms_that_share_their_gain_but_not_their_bias_are_folded_into_all_three() -> None:
    body = lambda m, x: m.a(m.n1(x)) + m.b(m.n2(x))  # noqa: E731
    model = Handmade(body, n1=nn.LayerNorm(D), n2=nn.LayerNorm(D), a=lin(), b=lin())
    model.n2.weight = model.n1.weight
    region = only(model)
    assert {name for name, _ in sources(region)} == {"n1.weight", "n1.bias", "n2.bias"}


def test_a_gain_shared_with_a_norm_that_another_reader_needs_is_not_folded() -> None:
    model = shared_gain(lambda m, x: m.a(m.n1(x)) + m.n2(x).sigmoid(), nn.RMSNorm)
    assert "also read by sigmoid" in only(model).reason


def test_a_gain_shared_with_a_norm_that_does_not_run_is_free() -> None:
    """Its own readers could not have been followed; but nothing that runs reads it."""
    model = shared_gain(lambda m, x: m.a(m.n1(x)), nn.RMSNorm)
    region = only(model)
    assert not region.parts and region.reason == "b, which did not run, may read it"


def test_a_layer_that_reads_two_tensors_makes_their_factors_equal() -> None:
    body = lambda m, x: m.proj(m.n1(x)) + m.proj(m.n2(x))  # noqa: E731
    region = only(Handmade(body, n1=nn.LayerNorm(D), n2=nn.LayerNorm(D), proj=lin()))
    assert region.into == "{n1,n2}" and region.width == D


def test_a_layer_that_reads_two_tensors_of_which_one_is_fixed_is_not_folded() -> None:
    body = lambda m, x: m.proj(m.n1(x)) + m.proj(x)  # noqa: E731
    region = only(Handmade(body, n1=nn.LayerNorm(D), proj=lin()))
    assert not region.parts and region.reason


def test_a_layer_that_reads_one_tensor_twice_is_folded() -> None:
    body = lambda m, x: (lambda y: m.proj(y) + m.proj(y))(m.norm(x))  # noqa: E731
    assert only(Handmade(body, norm=nn.LayerNorm(D), proj=lin())).into == "norm"


def test_a_layer_that_reads_two_tensors_joins_their_regions() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        u, v = m.n1(x), m.n2(x)
        return m.a(u) + m.b(v) + m.both(u) + m.both(v)

    region = only(Handmade(body, n1=nn.LayerNorm(D), n2=nn.LayerNorm(D), a=lin(), b=lin(), both=lin()))
    assert set(region.layers) == {"a", "b", "both"} and region.into == "{n1,n2}"


def test_an_unused_layer_is_in_no_region_but_may_read_what_is_near_it() -> None:
    model = Handmade(lambda m, x: m.proj(m.norm(x)), norm=nn.LayerNorm(D), proj=lin(), idle=lin())
    region = only(model)
    assert region.layers == ("proj",) and region.reason == "idle, which did not run, may read it"


def test_a_layer_that_reads_the_input_has_no_source() -> None:
    region = only(Handmade(lambda m, x: m.proj(x), proj=lin()))
    assert region.reason == "its tensor comes from outside the model"


def test_a_buffer_is_no_gain() -> None:
    model = Handmade(lambda m, x: m.proj(x * m.gain), proj=lin())
    model.register_buffer("gain", torch.rand(D) + 0.5)
    assert only(model).reason == "its tensor comes from outside the model"


def test_a_half_precision_norm_cast_back_is_followed() -> None:
    norm = nn.LayerNorm(D, dtype=torch.float64)
    region = only(Handmade(lambda m, x: m.proj(m.norm(x.double()).float()), norm=norm, proj=lin()))
    assert region.into == "norm"


@pytest.mark.parametrize("shape", [(), (1,), (3, D), (3, 1)])
def test_a_scalar_or_broadcast_parameter_is_no_per_channel_gain(shape: tuple[int, ...]) -> None:
    gain = nn.Parameter(torch.rand(shape) + 0.5)
    assert not only(Handmade(lambda m, x: m.proj(x * m.gain), gain=gain, proj=lin())).parts


def test_layers_of_other_dimensions_that_read_one_tensor_are_regions_of_their_own() -> None:
    """An unbatched picture [4, 8, 10] is four channels to Conv2d; to Conv1d it is four sequences of eight channels."""
    model = Handmade(lambda m, x: (m.flat(x), m.line(x)), flat=nn.Conv2d(4, 2, 3), line=nn.Conv1d(8, 2, 3))
    found = regions(model, torch.randn(4, 8, 10))
    assert [(region.layers, region.width) for region in found] == [(("flat",), 4), (("line",), 8)]


def test_a_map_read_by_a_convolution_and_its_mean_by_a_layer_are_one_region() -> None:
    body = lambda m, x: m.second(m.first(x).relu()) + m.squeeze(m.first(x).relu().mean((2, 3)))[..., None, None]  # noqa: E731
    model = Handmade(body, first=conv(), second=conv(), squeeze=lin())
    first, region = regions(model, torch.randn(1, D, 5, 5))
    assert first.reason == "its tensor comes from outside the model"
    assert region.layers == ("second", "squeeze") and region.into == "the rows of first"
