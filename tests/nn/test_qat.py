"""Fake-quantized twins: values as encoded, gradients as the formulas say, and the same output after conversion."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.errors import EvenbitsError
from evenbits.nn.conv import QConv2d
from evenbits.nn.qat import FakeQuantizer, QATConv2d, QATLayer, QATLinear, fake_quant_ste, members, passes
from evenbits.numerics import elements
from evenbits.numerics.encode import encode
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.format import Format
from evenbits.numerics.ovp import pair_kind

NAN = float("nan")
FORMATS = [
    "int8:row",
    "int4:row",
    "int3:tensor:mse",
    "int2:g4",
    "int4:g5",
    "int8:row:127.5",
    "flint3:row",
    "flint4:g16",
]
FORMATS += ["pot4:row", "fp4:g16", "nf4:g6", "fp8:tensor", "ovp4-int:row", "ovp4-flint:tensor", "ovp4-flint_i8:g8"]
FORMATS += ["ovp4-int:g16:paper", "ovp4-flint:row:reference", "ovp8:row"]
REFUSED = ["uint8:row:affine", "int8:tensor:affine:free", "ovp4-mix:g16", "mxfp4", "nvfp4"]


def _sample(rows: int = 6, columns: int = 24) -> torch.Tensor:
    """Bulk with outliers: some pairs have one, some two."""
    x = torch.randn(rows, columns)
    x[:, ::7] *= 12
    x[0, 1], x[1, 3] = 30.0, -200.0
    return x


@pytest.mark.parametrize("spelling", FORMATS)
@pytest.mark.parametrize("columns", [24, 17, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_are_those_of_the_codes(spelling: str, columns: int, dtype: torch.dtype) -> None:
    x = _sample(columns=max(columns, 4))[:, :columns].to(dtype)
    encoded = encode(x, spelling)
    y = fake_quant_ste(x, encoded.scales(), encoded.format)
    assert y.dtype == dtype
    assert y.equal(encoded.dequantize())
    x3 = x.reshape(2, 3, columns)
    assert fake_quant_ste(x3, encoded.scales(), encoded.format).equal(y.reshape(x3.shape))


def test_integers_pass_the_gradient_inside_their_range() -> None:
    x = torch.tensor([[-8.1, -7.0, -6.9, 0.2, 0.5, 6.9, 7.0, 7.3]], requires_grad=True)
    fake_quant_ste(x, torch.ones(1), "int4:tensor").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 1, 1, 1, 1, 1, 0]]
    unsigned = torch.tensor([[-0.1, 0.0, 3.0, 15.5]], requires_grad=True)
    fake_quant_ste(unsigned, torch.ones(1), "uint4:tensor").sum().backward()
    assert unsigned.grad is not None
    assert unsigned.grad.tolist() == [[0, 1, 1, 0]]


def test_tables_pass_the_gradient_inside_their_range() -> None:
    x = torch.tensor([[-5.0, -4.0, 3.1, 4.0, 4.5]], requires_grad=True)
    assert elements.largest(Format.parse("flint3:tensor").dtype) == 4
    fake_quant_ste(x, torch.ones(1), "flint3:tensor").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 1, 1, 0]]


@pytest.mark.parametrize("victims", [True, False])
def test_pairs_pass_the_gradient_of_what_is_written(victims: bool) -> None:
    # (outlier, victim) (normal, normal) (outlier beyond its codes, victim) (both clipped) (victim, outlier)
    x = torch.tensor([[30.0, 0.4, 6.6, 2.0, 100.0, 3.0, 8.0, 8.0, 40.0, 45.0]], requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    y = fake_quant_ste(x, scale, "ovp4-int:tensor", victim_gradient=victims, count=7)
    assert y.tolist() == [[32, 0, 7, 2, 96, 0, 7, 7, 0, 48]]
    y.sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    v = float(victims)
    assert x.grad.tolist() == [[1, v, 1, 1, 0, v, 0, 0, v, 1]]
    # q − u of what is written, q of what is clipped, nothing of victims; LSQ's factor is 1 / √(7 · 7).
    by_hand = (32 - 30) + 0 + (7 - 6.6) + 0 + 96 + 0 + 7 + 7 + 0 + (48 - 45)
    assert float(scale.grad) == pytest.approx(by_hand / 7, rel=1e-5)


@pytest.mark.parametrize("spelling", ["int4:tensor", "int4:row", "int4:g4", "flint4:g3", "nf4:row", "ovp4-int:g4"])
def test_scale_gradient_is_the_derivative_of_the_surrogate(spelling: str) -> None:
    """With the rounding error frozen, y = x + s · c inside and s · q outside; its central difference is LSQ's rule."""
    fmt, x = Format.parse(spelling), _sample(3, 10).double()
    scale = (encode(x, fmt).scales() * 0.8).requires_grad_()
    weight = torch.randn_like(x)
    (fake_quant_ste(x, scale, fmt) * weight).sum().backward()
    assert scale.grad is not None
    spread = fmt.granularity.spread(scale.detach().double(), 10)
    u = (x / spread).float()
    q = elements.snap(u, fmt.dtype)
    moves, victim = passes(u, q, fmt)
    assert 0 < int(moves.sum()) < moves.numel()
    assert bool(victim.any()) == spelling.startswith("ovp")

    def surrogate(s: torch.Tensor) -> torch.Tensor:
        s = fmt.granularity.spread(s, 10)
        return (torch.where(moves, x + s * (q.double() - x / spread), s * q) * weight).sum()

    count = x.numel() // scale.numel()
    factor = (count * elements.largest(fmt.dtype)) ** -0.5
    for index in range(scale.numel()):
        step = torch.zeros(scale.numel(), dtype=torch.float64)
        step[index] = 1e-4
        step = step.view(scale.shape)
        base = scale.detach().double()
        slope = (surrogate(base + step) - surrogate(base - step)) / 2e-4
        assert float(scale.grad.flatten()[index]) == pytest.approx(float(slope) * factor, rel=1e-4, abs=1e-5)


def test_a_saturated_number_pulls_the_scale_by_its_true_derivative() -> None:
    x, scale = torch.tensor([[50.0, -50.0, 50.0]]), torch.ones(1, requires_grad=True)
    fake_quant_ste(x, scale, "int4:tensor", count=1)[0, 0].backward()
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(7 / 7**0.5)
    low = torch.ones(1, requires_grad=True)
    fake_quant_ste(x, low, "int4:tensor:7.5", count=1)[0, 1].backward()
    assert low.grad is not None
    assert float(low.grad) == pytest.approx(-8 / 7**0.5)


def test_a_broken_row_comes_out_as_nan_and_the_others_do_not() -> None:
    x = _sample(3, 8)
    clean = fake_quant_ste(x, torch.ones(3, 1), "ovp4-int:row")
    x[1, 2] = NAN
    y = fake_quant_ste(x, torch.ones(3, 1), "ovp4-int:row")
    assert y[1].isnan().all()
    assert y[[0, 2]].equal(clean[[0, 2]])
    static = fake_quantize(x, Format.parse("int4:tensor"), scale=torch.ones(1))
    assert fake_quant_ste(x, torch.ones(1), "int4:tensor").equal(static) is False  # NaN is not equal to itself
    assert fake_quant_ste(x, torch.ones(1), "int4:tensor").nan_to_num(9).equal(static.nan_to_num(9))


@pytest.mark.parametrize("spelling", REFUSED)
def test_what_cannot_be_trained_says_what_can(spelling: str) -> None:
    for call in (
        lambda: fake_quant_ste(torch.ones(2, 32), torch.ones(1), spelling),
        lambda: QATLinear(nn.Parameter(torch.ones(2, 32)), None, spelling),
        lambda: FakeQuantizer(Format.parse(spelling)),
        lambda: QATLinear(
            nn.Parameter(torch.ones(2, 32)), None, "int8:row", ActivationQuantizer(Format.parse(spelling)), dynamic=True
        ),
    ):
        with pytest.raises(EvenbitsError, match=r"cannot be trained\. Allowed: symmetric"):
            call()


def test_misfits_are_named() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(EvenbitsError, match=r"still a choice; name one of ovp4-int:row, ovp4-flint:row"):
        fake_quant_ste(x, torch.ones(2, 1), "ovp4:row")
    with pytest.raises(EvenbitsError, match=r"has scales \[2, 1\]; given \[1\]"):
        fake_quant_ste(x, torch.ones(1), "int4:row")
    with pytest.raises(EvenbitsError, match="one per tensor"):
        QATLinear(nn.Parameter(x), None, "int4:row", ActivationQuantizer(Format.parse("int8:row")))
    with pytest.raises(EvenbitsError, match="does not fit"):
        FakeQuantizer(Format.parse("int8:tensor")).start(Format.parse("int8:tensor"), torch.ones(2))
    assert fake_quant_ste(torch.zeros(0, 4), torch.ones(1), "int8:tensor").shape == (0, 4)


@pytest.mark.parametrize("spelling", [*FORMATS, "ovp4:row", "ovp4:g16", "ovp4-i8:row", "ant4:row", "ant3:g16"])
def test_a_quantizer_starts_as_encode_leaves_it(spelling: str) -> None:
    x = _sample(6, 34)
    quantizer = FakeQuantizer(Format.parse(spelling), (6, 34))
    quantizer.start_from(x)
    encoded = encode(x, spelling)
    assert quantizer.format == encoded.format
    assert quantizer.format in members(Format.parse(spelling).fitted((6, 34)))
    assert quantizer(x).equal(encoded.dequantize())
    stored, factor = quantizer.stored()
    assert stored.view(torch.uint8).equal(encoded.scale.view(torch.uint8))
    assert (factor is None) == (encoded.global_scale is None)


@pytest.mark.parametrize("spelling", ["int4:row", "ovp4-int:g8", "int8:tensor"])
def test_scales_stay_positive_and_as_they_are_stored(spelling: str) -> None:
    x = _sample(4, 16)
    quantizer = FakeQuantizer(Format.parse(spelling), (4, 16))
    quantizer.start_from(x)
    for shift in (-300.0, -5.0, 0.3, 2.0, 20.0):
        with torch.no_grad():
            quantizer.log_scale.fill_(shift)
        scale = quantizer.scale()
        assert bool((scale > 0).all() and scale.isfinite().all())
        stored, factor = quantizer.stored()
        real = stored.float() if factor is None else stored.float() * factor
        assert scale.equal(real)
        assert bool(quantizer(x).isfinite().all())


def test_e4m3_scales_grow_beyond_their_first_factor() -> None:
    quantizer = FakeQuantizer(Format.parse("ovp4-int:g8"), (4, 16))
    quantizer.start_from(_sample(4, 16))
    before = quantizer.scale()
    with torch.no_grad():
        quantizer.log_scale.fill_(1.0)
    assert torch.allclose(quantizer.scale(), before * torch.e, rtol=1 / 16 + 1e-3)


def test_a_row_of_zeros_takes_its_neighbours_scale() -> None:
    x = torch.randn(5, 16) * 0.01
    x[2] = 0
    quantizer = FakeQuantizer(Format.parse("int4:row"), (5, 16))
    quantizer.start_from(x)
    assert quantizer(x)[2].eq(0).all()
    assert float(quantizer.scale().detach()[2]) < 0.01
    quantizer.start_from(torch.zeros(5, 16))
    assert quantizer.scale().eq(1).all()


def test_half_precision_leaves_the_scales_alone() -> None:
    quantizer = FakeQuantizer(Format.parse("int4:tensor"), (4, 16))
    quantizer.start_from(torch.randn(4, 16))
    before = quantizer.scale()
    assert quantizer.to(torch.bfloat16).scale().equal(before)
    assert quantizer.start_scale.dtype == torch.float32


@pytest.mark.parametrize("spelling", ["int3:tensor", "int4:row", "flint3:g8", "ovp4-int:row", "ovp4-flint:g16"])
@pytest.mark.parametrize("off", [3.0, 1 / 3])
def test_a_loss_falls_when_only_scales_train(spelling: str, off: float) -> None:
    x = torch.randn(8, 32) * torch.linspace(0.5, 2, 8).unsqueeze(1)
    quantizer = FakeQuantizer(Format.parse(spelling), (8, 32))
    quantizer.start_from(x)
    with torch.no_grad():
        quantizer.start_scale *= off
        quantizer.start_factor *= off
    optimizer = torch.optim.Adam([quantizer.log_scale], lr=0.05)
    losses = []
    for _ in range(60):
        loss = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def _trained(layer: QATLayer, x: torch.Tensor, steps: int = 15) -> QATLayer:
    """A few steps towards a random target, so that neither weights nor scales are where they started."""
    target = torch.randn_like(layer(x))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    return layer


@pytest.mark.parametrize("weight", [*FORMATS, "ovp4:row", "ovp4:g16", "ant4:row"])
@pytest.mark.parametrize("activation", [None, "int8:tensor", "ovp4:tensor", "ant4:tensor", "int8:row", "ovp4:row"])
@pytest.mark.parametrize("columns", [24, 17])
def test_a_linear_twin_becomes_the_layer_it_was(weight: str, activation: str | None, columns: int) -> None:
    quantizer = None if activation is None else ActivationQuantizer(Format.parse(activation))
    dynamic = activation is not None and activation.endswith("row")
    parameter, bias = nn.Parameter(_sample(6, columns)), nn.Parameter(torch.randn(6))
    x = _sample(9, columns).view(3, 3, columns)
    twin = _trained(QATLinear(parameter, bias, weight, quantizer, dynamic=dynamic), x)
    assert twin.weight is parameter
    layer = twin.eval().to_quantized()
    assert layer.qweight().dequantize().equal(twin.fake_weight())
    expected = twin(x).detach()
    if layer.is_integer or layer.is_streamed:
        assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    else:
        assert layer(x).equal(expected)


@pytest.mark.parametrize("activation", [None, "int8:tensor", "ovp4:tensor", "int8:row"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": "same", "dilation": 2, "bias": False},
        {"padding": 1, "padding_mode": "reflect", "stride": 2},
        {"groups": 4},
    ],
)
def test_a_convolution_twin_becomes_the_layer_it_was(activation: str | None, options: dict[str, object]) -> None:
    conv = nn.Conv2d(4, 8, 3, **options)  # type: ignore[arg-type]
    quantizer = None if activation is None else ActivationQuantizer(Format.parse(activation))
    geometry = QConv2d.geometry_of(conv)
    dynamic = activation == "int8:row"
    twin = QATConv2d(conv.weight, conv.bias, "ovp4:row", quantizer, dynamic=dynamic, geometry=geometry)
    x = torch.randn(3, 4, 7, 7)
    layer = _trained(twin, x).eval().to_quantized()
    assert torch.allclose(layer(x), twin(x), rtol=1e-5, atol=1e-5)
    assert torch.allclose(twin(x[0]), twin(x)[0], atol=1e-5)
    assert layer.weight.shape == (8, (conv.weight[0].numel() + 1) // 2)


def test_training_changes_which_pairs_are_written() -> None:
    fmt, kind = Format.parse("ovp4-int:row"), pair_kind("int")
    start, teacher = torch.randn(16, 32), torch.randn(16, 32)
    start[:, 9] *= 12
    teacher[:, 5] *= 12  # its outliers are elsewhere
    twin = QATLinear(nn.Parameter(start), None, fmt)

    def outliers() -> torch.Tensor:
        return twin.qweight().values().abs() > kind.normal_max

    before = outliers()
    assert 0 < int(before.sum()) < before.numel() // 4
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.2)
    losses = []
    for _ in range(150):
        x = torch.randn(64, 32)
        loss = (twin(x) - x @ teacher.t()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = outliers()
    assert losses[-1] < 0.2 * losses[0]
    assert int(after[:, 5].sum()) >= int(before[:, 5].sum()) + 6
    assert int(after[:, 9].sum()) <= int(before[:, 9].sum()) - 6


def test_training_and_evaluation_compute_the_same_and_only_the_first_batch_sets_the_scale() -> None:
    quantizer = ActivationQuantizer(Format.parse("int8:tensor"))
    twin = QATLinear(nn.Parameter(torch.randn(3, 8)), None, "int4:row", quantizer)
    assert twin.input_quantizer is not None
    with pytest.raises(EvenbitsError, match="run the model on a batch first"):
        twin.to_quantized()
    assert twin(torch.zeros(2, 8)).eq(0).all()
    assert twin(torch.zeros(0, 8)).shape == (0, 3)
    assert int(twin.input_quantizer.choice) == -1
    x = torch.randn(5, 8)
    in_training = twin.train()(x)
    scale = twin.input_quantizer.scale()
    assert twin.eval()(x).equal(in_training)
    twin(x * 100)
    assert twin.input_quantizer.scale().equal(scale)
    with torch.inference_mode():
        assert twin(x).equal(in_training)


def test_a_calibrated_input_scale_is_where_training_starts() -> None:
    calibrated = ActivationQuantizer(Format.parse("int8:tensor"), torch.tensor([0.03]))
    twin = QATLinear(nn.Parameter(torch.randn(3, 8)), None, "int8:row", calibrated)
    x = torch.randn(5, 8)
    assert twin.fake_input(x).equal(fake_quantize(x, calibrated.format, scale=calibrated.scale))


def test_a_first_batch_that_is_not_finite_is_refused_and_later_ones_poison_their_rows() -> None:
    twin = QATLinear(
        nn.Parameter(torch.randn(3, 8)), None, "int8:row", ActivationQuantizer(Format.parse("int8:tensor"))
    )
    x = torch.randn(4, 8)
    broken = x.clone()
    broken[2, 1] = NAN
    with pytest.raises(EvenbitsError, match="NaN"):
        twin(broken)
    clean = twin(x)
    y = twin(broken)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].equal(clean[[0, 1, 3]])
    with pytest.raises(EvenbitsError, match="NaN"):
        QATLinear(nn.Parameter(broken), None, "int8:row")


@pytest.mark.parametrize("part", ["weight", "weight_quantizer.log_scale", "input_quantizer.log_scale"])
def test_what_diverged_is_not_converted(part: str) -> None:
    twin = QATLinear(
        nn.Parameter(torch.randn(3, 8)), None, "ovp4:row", ActivationQuantizer(Format.parse("int8:tensor"))
    )
    x = torch.randn(4, 8)
    twin(x)
    with torch.no_grad():
        twin.get_parameter(part).flatten()[0] = NAN
    assert bool(twin(x).isnan().any())
    with pytest.raises(EvenbitsError, match="diverged"):
        twin.to_quantized()


def test_a_state_dict_carries_scales_and_choices() -> None:
    def twin(seed: int) -> QATLinear:
        torch.manual_seed(seed)
        weight = nn.Parameter(torch.randn(6, 16) if seed else _sample(6, 16))
        return QATLinear(weight, None, "ovp4:g8", ActivationQuantizer(Format.parse("ovp4:tensor")))

    first, second = twin(0), twin(1)
    x = _sample(9, 16)
    _trained(first, x)
    second.load_state_dict(first.state_dict())
    assert second(x).equal(first(x))
    assert copy.deepcopy(first)(x).equal(first(x))
    assert all(isinstance(value, torch.Tensor) for value in first.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_layers_train(dtype: torch.dtype) -> None:
    twin = QATLinear(
        nn.Parameter(torch.randn(6, 16).to(dtype)), None, "ovp4:row", ActivationQuantizer(Format.parse("int8:tensor"))
    )
    x = torch.randn(4, 16).to(dtype)
    y = twin(x)
    assert y.dtype == dtype
    y.float().square().mean().backward()
    assert twin.weight.grad is not None
    assert twin.weight.grad.dtype == dtype
    assert "ovp4:row" in repr(twin)
