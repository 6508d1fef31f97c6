"""Byte chains on tiny convolutional nets: what is fused, what is refused, and that outputs stay close."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evenbits
from evenbits.errors import EvenbitsError
from evenbits.kernels import conv_u8
from evenbits.nn.conv import QConv
from evenbits.nn.conv_u8 import U8Conv2d
from evenbits.pipeline.fuse import Fused, fuse

# torch's own word about its float convolution, once a process.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
AFFINE = {"weights": "int8:row", "input_activations": "int8:tensor:affine", "dynamic": False}
SYMMETRIC = "W8A8_STATIC"


@pytest.fixture(autouse=True, params=["here", "float"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_u8, "_warned", [True])
    if request.param == "float":
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)


def picture(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 12, 12), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Convolutions a (3 → 8), b and c (8 → 8), d (8 → 8, stride 2) and e (3 → 8), joined by a function."""

    def __init__(self, how: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.e = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.b, self.c, self.d = (nn.Conv2d(8, 8, 3, padding=1, stride=stride) for stride in (1, 1, 2))
        self.norm, self.pool, self.relu6 = nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1), nn.ReLU6()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.idle, self.drop, self.in_place = nn.Identity(), nn.Dropout(0.5), nn.ReLU(inplace=True)
        self.position = nn.Parameter(torch.randn(8, 1, 1))
        self.how = how
        with torch.no_grad():
            for conv in (self.a, self.b, self.c, self.d, self.e):
                conv.weight *= 2
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.how(self, x)


def quantized(how: Callable[..., Any], data: Any = None, scheme: Any = AFFINE, **kwargs: Any) -> Net:
    model = Net(how).eval()
    evenbits.quantize(model, scheme=scheme, data=[picture()] if data is None else data, **{"method": "rtn"} | kwargs)
    return model


def checked(model: nn.Module, data: list[Any], least: float) -> Fused:
    """Fuses; the given model is left as it is, every convolution has a row, the figure is the outputs' agreement."""
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    model.train()
    result = fuse(model, data)
    assert all(module.training for module in model.modules() if not isinstance(module, QConv))
    model.eval()
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {row.name for row in result.rows} == {n for n, m in model.named_modules() if isinstance(m, QConv)}
    assert result.backend.startswith(conv_u8.report_conv()[0])
    given = data[0] if isinstance(data[0], tuple) else (data[0],)
    with torch.no_grad():
        reference, found = model(*given), result.model(*given)
    error = 10 * torch.log10(reference.double().square().sum() / (reference.double() - found).square().sum())
    assert float(error) == pytest.approx(result.sqnr_db, abs=0.5) or result.sqnr_db > 90
    assert result.sqnr_db > least
    return result


def rows(result: Fused) -> dict[str, tuple[str, str]]:
    return {row.name: (row.status, row.reason) for row in result.rows}


LEAST = 34.0
NETS: dict[str, tuple[Callable[..., Any], dict[str, tuple[str, str]]]] = {
    "plain": (lambda m, x: m.c(m.b(m.a(x))), {"a": ("u8", ""), "b": ("u8", ""), "c": ("float out", "")}),
    "relu": (lambda m, x: m.b(F.relu(m.a(x))), {"a": ("u8", "relu"), "b": ("float out", "")}),
    "relu in place": (lambda m, x: m.b(m.in_place(m.a(x))), {"a": ("u8", "relu"), "b": ("float out", "")}),
    "relu6": (lambda m, x: m.relu6(m.b(m.relu6(m.a(x)))), {"a": ("u8", "relu6"), "b": ("float out", "relu6")}),
    "max pool": (lambda m, x: m.b(m.pool(m.a(x).relu())), {"a": ("u8", "relu"), "b": ("float out", "")}),
    "pool function": (
        lambda m, x: m.c(F.max_pool2d(m.b(F.max_pool2d(torch.relu(m.a(x)), 2, stride=2)), (3, 2), padding=(1, 0))),
        {"a": ("u8", "relu"), "b": ("u8", ""), "c": ("float out", "")},
    ),
    "zero padding": (
        lambda m, x: m.d(F.pad(m.b(m.pad(F.relu(m.a(x)))), (1, 0))),
        {"a": ("u8", "relu"), "b": ("u8", ""), "d": ("float out", "")},
    ),
    "other padding": (
        lambda m, x: m.c(F.pad(F.relu(m.b(F.relu(m.a(x)))), (1, 0), value=0.5)),
        {"a": ("u8", "relu"), "b": ("float out", "relu"), "c": ("float out", "")},
    ),
    "idle": (lambda m, x: m.b(m.idle(m.drop(F.relu(m.idle(m.a(x)))))), {"a": ("u8", "relu"), "b": ("float out", "")}),
    "norm": (lambda m, x: m.b(F.relu(m.norm(m.a(x)))), {"a": ("u8", "relu"), "b": ("float out", "")}),
    "view": (
        lambda m, x: m.b(F.relu(m.a(x))).view(x.shape[0], -1),
        {"a": ("u8", "relu"), "b": ("float out", "")},
    ),
    "by keyword": (lambda m, x: m.b(input=F.relu(m.a(input=x))), {"a": ("u8", "relu"), "b": ("float out", "")}),
    "twice": (
        lambda m, x: m.b(F.relu(m.b(F.relu(m.a(x))))),
        {"a": ("u8", "relu"), "b": ("float out", "")},  # the last call's row
    ),
    "two readers": (
        lambda m, x: (lambda y: m.b(y) + m.c(y * 1.5) * m.a(x).mean())(F.relu(m.e(x))),
        {"e": ("u8", "relu"), "b": ("float out", "addition"), "c": ("float out", ""), "a": ("float out", "")},
    ),
    "also the output": (
        lambda m, x: (lambda y: torch.cat([y, m.b(y)], 1))(F.relu(m.a(x))),
        {"a": ("u8", "relu"), "b": ("float out", "")},
    ),
    "concat": (
        lambda m, x: m.c(torch.cat([F.relu(m.b(F.relu(m.a(x))))[:, :4], m.e(x)[:, 4:]], 1)),
        {"a": ("u8", "relu"), "b": ("float out", "relu"), "e": ("float out", ""), "c": ("float out", "")},
    ),
    "downsample added": (
        lambda m, x: (lambda y: m.c(F.relu(m.b(m.idle(y)[:, :, ::2, ::2]) + m.d(y))))(F.relu(m.a(x))),
        {"a": ("u8", "relu"), "b": ("u8", "addition and relu"), "d": ("float out", ""), "c": ("float out", "")},
    ),
    "two inputs added": (
        lambda m, x: m.c(F.relu(m.a(x) + m.e(x.flip(2) * 9))),
        {"a": ("u8", "addition and relu"), "e": ("float out", ""), "c": ("float out", "")},
    ),
    "added to itself": (
        lambda m, x: m.c(m.b((lambda y: y + y)(m.a(x)))),
        {"a": ("float out", ""), "b": ("u8", ""), "c": ("float out", "")},
    ),
}


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC], ids=["affine", "symmetric"])
@pytest.mark.parametrize("net", NETS)
def test_what_is_fused(net: str, scheme: Any) -> None:
    how, expected = NETS[net]
    assert rows(checked(quantized(how, scheme=scheme), [picture()], LEAST)) == expected


def test_a_convolution_that_is_not_called_has_a_row() -> None:
    model = quantized(lambda m, x: m.c(m.b(F.relu(m.a(x)))))
    model.how = lambda m, x: m.b(F.relu(m.a(x)))
    assert rows(checked(model, [picture()], LEAST))["c"] == ("apart", "the traced forward does not call it")


ADDITIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "y + x": lambda y, x: y + x,
    "x + y": lambda y, x: x + y,
    "y += x": operator.iadd,
    "torch.add(x, y)": lambda y, x: torch.add(x, y),
    "y.add(x)": lambda y, x: y.add(x),
    "y.add_(x)": lambda y, x: y.add_(x),
}


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC], ids=["affine", "symmetric"])
@pytest.mark.parametrize("add", ADDITIONS)
def test_a_residual_addition(add: str, scheme: Any) -> None:
    def how(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(m.a(x))
        y = F.relu(ADDITIONS[add](m.b(y), y))
        return m.d(F.relu(ADDITIONS[add](m.c(y), y)))

    found = rows(checked(quantized(how, scheme=scheme), [picture()], LEAST))
    assert found["b"] == found["c"] == ("u8", "addition and relu")
    assert found["a"] == ("u8", "relu") and found["d"] == ("float out", "")


OTHER_SUMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "scaled": lambda y, x: torch.add(y, x, alpha=2),
    "number": lambda y, x: y + 1.5,
    "broadcast": lambda y, x: y + x.mean((2, 3), keepdim=True),
    "grows": lambda y, x: y.mean((2, 3), keepdim=True) + x,
}


@pytest.mark.parametrize("kind", OTHER_SUMS)
def test_other_sums_stay_in_float(kind: str) -> None:
    def how(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(m.a(x))
        return m.c(m.b(F.relu(OTHER_SUMS[kind](m.b(y), y))))

    found = rows(checked(quantized(how), [picture()], LEAST))
    assert found["a"] == ("u8", "relu") and found["c"] == ("float out", "")
    assert all("addition" not in reason for _, reason in found.values())


def test_a_convolution_of_one_pixel_is_not_added_to_a_whole_map() -> None:
    """Its output is smaller than the sum: bytes of another shape would be read past their end."""

    def how(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(m.a(x))
        return m.c(m.b(F.relu(m.e(x.mean((2, 3), keepdim=True)) + y)))

    found = rows(checked(quantized(how), [picture()], LEAST))
    assert found["e"] == ("float out", "") and found["b"] == ("u8", "")


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC], ids=["affine", "symmetric"])
def test_an_addend_that_no_convolution_computed_has_a_grid_of_its_own(scheme: Any) -> None:
    """On the grid of the sum after its ReLU everything negative would be lost."""

    def how(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(m.a(x))
        return m.c(F.relu(m.b(y) + torch.tanh(y - 1) * -20))

    found = rows(checked(quantized(how, scheme=scheme), [picture()], LEAST))
    assert found["b"] == ("u8", "addition and relu")


def test_asymmetric_padding_and_geometry() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, (2, 4), padding="same")
            self.b = nn.Conv2d(8, 16, 3, padding=(0, 2), dilation=(1, 2), groups=4, stride=(2, 1))
            self.c, self.d = nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 4, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.d(F.relu(self.c(F.relu6(self.b(F.relu(self.a(x)))))))

    for scheme in (AFFINE, SYMMETRIC):
        model = Same().eval()
        evenbits.quantize(model, scheme=scheme, method="rtn", data=[picture()])
        found = rows(checked(model, [picture()], LEAST))
        assert [found[name][0] for name in "abcd"] == ["u8", "u8", "u8", "float out"]


def test_names_that_differ_by_a_dot_only() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.a_0 = nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 4, 1)
            self.a_0_u8, self.z = nn.Identity(), nn.Conv2d(4, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.z(self.a_0_u8(F.relu(self.a_0(F.relu(self.a[0](x))))))

    model = Names().eval()
    evenbits.quantize(model, scheme=AFFINE, method="rtn", data=[picture()])
    assert set(rows(checked(model, [picture()], LEAST))) == {"a.0", "a_0", "z"}


def loud() -> torch.Tensor:
    """A picture that drives channels beyond 6, by different amounts."""
    return picture() * torch.tensor([8.0, 1.0, 3.0]).view(1, -1, 1, 1)


READ = "added or read by others, and multiplied"
MULTIPLIED: dict[str, tuple[Callable[..., Any], dict[str, tuple[str, str]]]] = {
    "relu6": (
        lambda m, x: m.c(m.relu6(m.b(m.relu6(m.a(x))))),
        {
            "a": ("u8", "relu6 and smoothing multiply"),
            "b": ("u8", "relu6 and smoothing multiply"),
            "c": ("float out", ""),
        },
    ),
    "max pool": (
        lambda m, x: m.b(m.pool(m.relu6(m.a(x)))),
        {"a": ("u8", "relu6 and smoothing multiply"), "b": ("float out", "")},
    ),
    "zero padding": (
        lambda m, x: m.d(m.pad(m.relu6(m.a(x)))),
        {"a": ("u8", "relu6 and smoothing multiply"), "d": ("float out", "")},
    ),
    "read as floats": (
        lambda m, x: (lambda y: m.b(y) * y.mean() + m.d(F.relu(m.e(x))).mean())(m.relu6(m.a(x))),
        {
            "a": ("float out", f"relu6; {READ}"),
            "b": ("float out", ""),
            "d": ("float out", ""),
            "e": ("u8", "relu and smoothing multiply"),
        },
    ),
    "two readers": (
        lambda m, x: (lambda y: m.b(y) + m.c(y))(m.relu6(m.a(x))),
        {"a": ("u8", "relu6 and smoothing multiply"), "b": ("float out", "addition"), "c": ("float out", "")},
    ),
    "added": (
        lambda m, x: (lambda y: m.c(m.relu6(m.b(y) + y)) + m.d(F.relu(m.e(x))).mean())(m.relu6(m.a(x))),
        {
            "a": ("float out", f"relu6; {READ}"),
            "b": ("float out", f"addition and relu6; {READ}"),
            "c": ("float out", ""),
            "d": ("float out", ""),
            "e": ("u8", "relu"),
        },
    ),
    "behind a function": (
        lambda m, x: m.d(F.relu(m.c(F.gelu(m.b(F.relu(m.a(x))))))),
        {"a": ("u8", "relu"), "b": ("float out", ""), "c": ("u8", "relu"), "d": ("float out", "")},
    ),
}


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC], ids=["affine", "symmetric"])
@pytest.mark.parametrize("net", MULTIPLIED)
def test_a_smoothing_multiply_goes_into_the_scales_before_it(net: str, scheme: Any) -> None:
    """Nothing folds through ReLU6 and GELU: their readers multiply, and the bytes they read are multiplied already."""
    how, expected = MULTIPLIED[net]
    model = quantized(how, [loud()], scheme, method="smoothquant")
    readers = [module for module in model.modules() if isinstance(module, QConv)]
    assert any(module.input_multiplier is not None for module in readers)
    found = rows(checked(model, [loud()], LEAST))
    assert {name: row for name, row in found.items() if row[0] != "apart"} == expected


def test_the_bound_of_relu6_is_multiplied_too() -> None:
    """Codes of relu6(y)·m, to the last one, where most channels reach their bound."""
    model = Net(MULTIPLIED["relu6"][0]).eval()
    with torch.no_grad():
        model.b.weight *= 2.0 ** torch.arange(8).view(1, -1, 1, 1)
    evenbits.quantize(model, scheme=SYMMETRIC, method="smoothquant", data=[loud()])
    chain = fuse(model, [loud()]).model
    made = {name: module for name, module in chain.named_modules() if isinstance(module, U8Conv2d)}
    first, reader = made["a_u8"], model.b
    assert first.limit is not None and len(first.limit.unique()) > 4
    seen: dict[str, torch.Tensor] = {}
    first.register_forward_hook(lambda _, x, y: seen.update(codes=y))
    with torch.no_grad():
        y = model.relu6(model.a(loud()))
        chain(loud())
    assert (y == 6).any(dim=(0, 2, 3)).sum() > 4
    exact = (reader.balanced_input(y) / reader.input_scale).round().clamp(0, 255)
    codes, bound = seen["codes"], first.limit.expand_as(exact)
    assert (codes <= bound).all() and (codes[y == 6] == bound[y == 6]).all()
    assert float((codes.float() - exact).abs().max()) <= 1
    assert float((codes.float() != exact).float().mean()) < 1e-3


def test_what_others_read_keeps_the_channels_that_the_reader_hardly_weighs() -> None:
    """On the grid of the evened tensor these channels would have a few codes, and the concatenation needs them."""
    model = Net(lambda m, x: (lambda y: torch.cat([y, m.b(y)], 1) * m.d(F.relu(m.e(x))).mean())(m.relu6(m.a(x)))).eval()
    with torch.no_grad():
        model.b.weight[:, :4] *= 1e-3
    evenbits.quantize(model, scheme=SYMMETRIC, method="smoothquant", data=[loud()])
    found = fuse(model, [loud()])
    assert rows(found)["a"] == ("float out", f"relu6; {READ}") and found.sqnr_db > LEAST


def test_why_nothing_is_chained_is_said() -> None:
    model = quantized(
        lambda m, x: (lambda y: m.c(m.relu6(m.b(y) + y)))(m.relu6(m.a(x))), [loud()], SYMMETRIC, method="smoothquant"
    )
    with pytest.raises(EvenbitsError, match=f"no convolution hands bytes to another one. a: {READ}"):
        fuse(model, [loud()])


VIEWED: dict[str, Callable[..., Any]] = {
    "of another type": lambda m, x: m.b(F.relu(m.a(x))).view(dtype=torch.int32).view(torch.float32),
    "by keyword": lambda m, x: m.b(F.relu(m.a(x))).view(size=(x.shape[0], -1)),
    "as another": lambda m, x: m.b(F.relu(m.a(x))).view_as(m.e(x).flatten(1)),
}


@pytest.mark.parametrize("how", VIEWED.values(), ids=VIEWED)
def test_every_form_of_view(how: Callable[..., Any]) -> None:
    assert rows(checked(quantized(how), [picture()], LEAST))["a"] == ("u8", "relu")


def test_a_write_through_a_view_is_refused() -> None:
    def how(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.b(F.relu(m.a(x)))
        y.view(x.shape[0], -1).mul_(3)
        return y

    with pytest.raises(EvenbitsError, match="writes into the tensor that output reads afterwards"):
        fuse(quantized(how), [picture()])


def test_arguments_by_keyword_end_a_chain() -> None:
    model = quantized(lambda m, x: m.c(F.relu(m.b(m.pad(input=F.relu(m.a(x)))))))
    found = rows(checked(model, [picture()], LEAST))
    assert found["a"] == ("float out", "relu") and found["b"] == ("u8", "relu")


def test_an_empty_batch() -> None:
    model = quantized(NETS["relu"][0])
    chain = fuse(model, [picture()]).model
    with torch.no_grad():
        assert chain(picture()[:0]).shape == model(picture()[:0]).shape


def test_a_multiplier_that_is_not_positive_keeps_its_layer_apart() -> None:
    model = quantized(MULTIPLIED["relu6"][0], [loud()], SYMMETRIC, method="smoothquant")
    model.c.input_multiplier[0] = 0
    found = rows(checked(model, [loud()], LEAST))
    assert found["c"] == ("apart", "its smoothing multiply is not positive everywhere")
    assert found["a"] == ("u8", "relu6 and smoothing multiply") and found["b"] == ("float out", "relu6")


def test_a_chained_model_is_not_saved_and_the_quantized_one_is(tmp_path: Path) -> None:
    """Chains hold no buffers that last: what was written would have no weights."""
    model = quantized(NETS["relu"][0])
    fused = fuse(model, [picture()])
    with pytest.raises(EvenbitsError, match=r"byte chains \(2 convolutions, such as .*fuse it again after loading"):
        evenbits.save(fused.model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    loaded = evenbits.load(evenbits.save(model, tmp_path / "out"), Net(NETS["relu"][0]).eval())
    with torch.no_grad():
        assert torch.equal(fuse(loaded, [picture()]).model(picture()), fused.model(picture()))


def test_a_net_that_would_gain_by_chains_is_told_so() -> None:
    model = Net(NETS["relu"][0]).eval()
    (note,) = evenbits.quantize(model, scheme=AFFINE, method="rtn", data=[picture()]).notes
    count = sum(isinstance(module, QConv) for module in model.modules())
    assert note.startswith(f"{count} static convolutions") and "evaluate --fuse" in note and "apart" not in note
    for options in ({"scheme": "W8A8"}, {"scheme": "W4A16_OVP"}):
        plain = evenbits.quantize(Net(NETS["relu"][0]).eval(), method=None, data=[picture()], **options)
        assert not any("byte chains" in note for note in plain.notes)


def test_two_readers_with_different_grids_get_floats() -> None:
    def how(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)  # pooling raises its smallest value, so the grids differ
        return m.b(y)[:, :, ::2, ::2] * m.d(m.c(m.pool(y))).mean()

    found = rows(checked(quantized(how), [picture()], LEAST))
    assert found["a"] == ("float out", "its readers want different grids") and found["c"] == ("u8", "")


def test_dynamic_activations_have_no_grid() -> None:
    model = quantized(NETS["plain"][0], scheme="W8A8")
    with pytest.raises(
        EvenbitsError, match=r"no convolution hands bytes to another one\. .*activations are not static"
    ):
        fuse(model, [picture()])
    with pytest.raises(EvenbitsError, match="None reads another"):
        fuse(quantized(lambda m, x: m.a(x) * torch.sigmoid(m.e(x))), [picture()])


def test_what_cannot_be_traced() -> None:
    model = quantized(lambda m, x: m.b(m.a(x)) if x.sum() < 1e9 else m.a(x))
    with pytest.raises(EvenbitsError, match=r"cannot be traced symbolically \(TraceError.*works as it is"):
        fuse(model, [picture()])


def test_other_outputs_than_a_tensor() -> None:
    model = quantized(lambda m, x: (m.b(m.a(x)), 1))
    with pytest.raises(EvenbitsError, match="one tensor; this one returns tuple"):
        fuse(model, [picture()])


def test_a_tensor_that_is_read_after_it_was_written_to() -> None:
    def unassigned(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        m.in_place(y)
        return m.b(y)

    def through(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        m.idle(y).relu_()
        return m.b(y)

    for how in (unassigned, through):
        with pytest.raises(EvenbitsError, match="writes into the tensor that b reads afterwards"):
            fuse(quantized(how, scheme=SYMMETRIC), [picture()])


def test_other_types_and_unbatched_inputs_are_refused() -> None:
    model = Net(NETS["relu"][0]).eval().bfloat16()
    evenbits.quantize(model, scheme=AFFINE, method="rtn", data=[picture().bfloat16()])
    with pytest.raises(EvenbitsError, match=r"is torch\.bfloat16\. Use model.float"):
        fuse(model, [picture().bfloat16()])
    assert fuse(model.float(), [picture()]).sqnr_db > LEAST
    single = quantized(NETS["relu"][0], [picture(3, 12, 12)])
    with pytest.raises(EvenbitsError, match=r"its input is not a batch \[N, C, H, W\]"):
        fuse(single, [picture(3, 12, 12)])


def test_arguments_by_position_by_name_and_from_a_generator() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor, gain: float = 2.0) -> torch.Tensor:
            return self.c(F.relu(self.a(x) + self.b(y) * gain))

    x, y = picture(), picture() * 9
    model = Two().eval()
    evenbits.quantize(model, scheme=AFFINE, method="rtn", data=[(x, y)])

    def once() -> Iterator[Any]:
        yield {"y": y, "x": x}

    figures = [fuse(model, data).sqnr_db for data in ([(x, y)], [{"y": y, "x": x}], once())]
    assert figures == pytest.approx([figures[0]] * 3) and figures[0] > LEAST


def test_new_batches_and_the_layers_that_do_the_work() -> None:
    model = quantized(NETS["relu"][0])
    result = fuse(model, [picture()])
    made = [module for module in result.model.modules() if isinstance(module, U8Conv2d)]
    assert len(made) == 2 and not any(isinstance(module, QConv) for module in result.model.modules())
    assert made[0].weight.data_ptr() == model.a.weight.data_ptr()  # codes are shared, not copied
    fresh = torch.randn(5, 3, 9, 14)
    with torch.no_grad():
        reference, found = model(fresh), result.model(fresh)
    assert found.shape == reference.shape
    assert (reference - found).square().mean().sqrt() < 0.02 * reference.square().mean().sqrt()


@pytest.mark.parametrize("other", [lambda net, x: net.pool(x), lambda net, x: net.drop(x), lambda net, x: x.clone()])
def test_floats_that_a_convolution_reads_stay_floats_for_others(other: Callable[..., torch.Tensor]) -> None:
    def how(net: Net, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([net.b(F.relu(net.a(x))).flatten(1), other(net, x).flatten(1)], dim=1)

    model = quantized(how)
    made, x = fuse(model, [picture()]).model(picture()), picture()
    beside = other(model, x).flatten(1)
    assert torch.equal(made[:, -beside.shape[1] :], beside)
