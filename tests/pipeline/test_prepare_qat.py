"""QAT from end to end: a network that rounding hurt learns to live with it, and converts to the same integers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evenbits
from evenbits.demo.model import DigitNet, calibration_digits, evaluation_digits, load_digit_net
from evenbits.errors import EvenbitsError
from evenbits.nn.base import QuantizedLayer
from evenbits.nn.linear import QLinear
from evenbits.nn.qat import FakeQuantizer, QATConv2d, QATLayer, QATLinear
from evenbits.pipeline.qat import convert_qat, prepare_qat

OVP4 = {"weights": "ovp4:row", "input_activations": "ovp4:tensor", "dynamic": False}
NAN = float("nan")


def _scheme(name: str) -> dict[str, Any]:
    weights = f"{name}:row:mse" if name.startswith("int") else f"{name}:row"
    return {"weights": weights, "input_activations": weights.replace("row", "tensor"), "dynamic": False}


def _planted() -> DigitNet:
    """DigitNet with three channels 16 times too large and columns that undo it: the same function, harder to round."""
    model = load_digit_net()
    with torch.no_grad():
        picked = torch.randperm(16, generator=torch.Generator().manual_seed(0))[:3]
        for parameter in (model.bn1.weight, model.bn1.bias):
            parameter[picked] *= 16
        model.conv2.weight[:, picked] /= 16
    return model


@torch.no_grad()
def _accuracy(model: nn.Module) -> float:
    images, labels = evaluation_digits()
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def _train(model: nn.Module, teacher: nn.Module, steps: int, lr: float = 2e-3) -> list[float]:
    """Steps towards the float network's outputs on jittered calibration digits; the loss of each."""
    images, _ = calibration_digits()
    generator = torch.Generator().manual_seed(0)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=lr), []
    for _ in range(steps):
        x = images[torch.randint(len(images), (32,), generator=generator)]
        x = (x + 0.05 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
        with torch.no_grad():
            target = teacher(x).softmax(1)
        loss = F.kl_div(model(x).log_softmax(1), target, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "gain"), [("ovp4", 0.15), ("int3", 0.3), ("flint3", 0.3)])
def test_training_recovers_what_rounding_lost(name: str, gain: float, tmp_path: Path) -> None:
    model = _planted()
    teacher = copy.deepcopy(model)
    rounded = copy.deepcopy(model)
    scheme = _scheme(name)
    evenbits.quantize(rounded, scheme=scheme, method="rtn", data=[calibration_digits()[0]])
    before = _accuracy(rounded)
    names = prepare_qat(model, scheme)
    assert names == ["conv1", "conv2", "depthwise", "pointwise", "fc"]
    model(calibration_digits()[0])
    losses = _train(model, teacher, 80)
    after = _accuracy(model)
    assert after > before + gain
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])

    images, _ = evaluation_digits()
    with torch.no_grad():
        expected = model(images)
        convert_qat(model)
        y = model(images)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)  # the last layer sums in another order
    assert _accuracy(model) == after
    assert not any(isinstance(module, QATLayer) for module in model.modules())
    bits = int(name[-1])
    for layer in (module for module in model.modules() if isinstance(module, QuantizedLayer)):
        columns = layer.qweight().stored_columns
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.shape == (layer.weight_shape[0], -(-columns * bits // 8))
        assert not list(layer.parameters())
    evenbits.save(model, tmp_path / "out")
    again = evenbits.load(tmp_path / "out", model=load_digit_net())
    with torch.no_grad():
        assert again(images).equal(y)


def test_a_twin_starts_as_rounding_leaves_the_layer() -> None:
    model, rounded = load_digit_net(), load_digit_net()
    scheme = {"weights": "ovp4:row"}
    evenbits.quantize(rounded, scheme=scheme, method="rtn")
    prepare_qat(model, scheme)
    images, _ = evaluation_digits()
    with torch.no_grad():
        torch.testing.assert_close(model(images), rounded(images), rtol=1e-5, atol=1e-5)  # sums in another order


@pytest.mark.parametrize(
    "scheme", ["W8A8", "W8A8_STATIC", "W8A16", "W4A16_OVP_G32", "W4A8_OVP", "W4A4_OVP_DYNAMIC", "W4A4_ANT", "W4A16"]
)
def test_every_symmetric_preset_trains_and_converts(scheme: str) -> None:
    model = load_digit_net()
    teacher = copy.deepcopy(model)
    prepare_qat(model, scheme)
    assert isinstance(model.conv1, QATConv2d)
    assert isinstance(model.fc, QATLinear)
    _train(model.train(), teacher, 3)
    images, _ = evaluation_digits()
    with torch.no_grad():
        expected = model.eval()(images)
        convert_qat(model)
        y = model(images)
    assert y.argmax(1).equal(expected.argmax(1))
    miss = (y - expected).abs()
    if any(layer.is_integer for layer in model.modules() if isinstance(layer, QuantizedLayer)):
        # Integer sums round otherwise than float sums, and once in a while the next layer's rounding notices.
        assert float(miss.median()) < 1e-5
        assert float((miss > 1e-3).float().mean()) < 0.02
        assert float(miss.max()) < 0.1
    else:
        assert float(miss.max()) < (1e-4 if isinstance(model.fc, QLinear) and model.fc.is_streamed else 1e-12)


def test_modes_are_kept_and_parameters_taken_over() -> None:
    model = load_digit_net().train()
    before = dict(model.named_parameters())
    prepare_qat(model, OVP4)
    assert all(module.training for module in model.modules())
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    added = set(after) - set(before)
    assert len(added) == 10
    assert all(name.endswith("_quantizer.log_scale") for name in added)
    model(calibration_digits()[0])  # BatchNorm trains along
    assert not model.bn1.running_mean.equal(load_digit_net().bn1.running_mean)


def test_ignored_layers_stay_float_and_names_say_so() -> None:
    model = load_digit_net()
    names = prepare_qat(model, {**OVP4, "ignore": ["conv1", "fc"]})
    assert names == ["conv2", "depthwise", "pointwise"]
    assert type(model.fc) is nn.Linear


def test_a_layer_in_two_places_becomes_one_twin() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 2))
    prepare_qat(model, "W4A16_OVP")
    assert model[0] is model[2]
    convert_qat(model)
    assert model[0] is model[2]
    assert isinstance(model[0], QuantizedLayer)


def test_a_state_dict_resumes_a_training() -> None:
    model, other = _planted(), load_digit_net()
    teacher = copy.deepcopy(model)
    prepare_qat(model, OVP4)
    _train(model, teacher, 3)
    prepare_qat(other, OVP4)
    other.load_state_dict(model.state_dict())
    images, _ = evaluation_digits()
    with torch.no_grad():
        assert other(images).equal(model(images))


def _unchanged(model: nn.Module, kinds: list[type]) -> bool:
    return [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"weights": "int8:row:affine"}, "layer conv1: .*zero point, which cannot be trained"),
        ({"weights": "mxfp4"}, "fixed blocks"),
        ({"weights": "ovp4-mix:g16"}, "a kind for each group"),
        ({"weights": "int8:row", "input_activations": "uint8:row:affine"}, "zero point"),
        ({"weights": "int8:axis1"}, "another axis"),
        ({"weights": "int4:row", "ignore": ["*"]}, "no layer would be trained .*conv1: ignored by the scheme"),
        ("W4A5", "unknown scheme"),
    ],
)
def test_what_cannot_be_prepared_leaves_the_model_alone(scheme: Any, message: str) -> None:
    model = load_digit_net()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(EvenbitsError, match=message):
        prepare_qat(model, scheme)
    assert _unchanged(model, kinds)


def test_wrong_models_are_refused() -> None:
    model = load_digit_net()
    with pytest.raises(EvenbitsError, match="call prepare_qat before"):
        convert_qat(model)
    with pytest.raises(EvenbitsError, match=r"takes a torch\.nn\.Module; given str"):
        prepare_qat("model", OVP4)  # type: ignore[arg-type]
    prepare_qat(model, OVP4)
    with pytest.raises(EvenbitsError, match="layer conv1 is a QATConv2d already"):
        prepare_qat(model, OVP4)
    with pytest.raises(EvenbitsError, match=r"layer conv1: .*run the model on a batch first"):
        convert_qat(model)
    assert isinstance(model.conv1, QATConv2d)
    with pytest.raises(EvenbitsError, match="this single layer"):
        convert_qat(model.fc)
    fused = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    with pytest.raises(EvenbitsError, match="reads its weight directly"):
        prepare_qat(fused, "W4A16_OVP")
    broken = load_digit_net()
    with torch.no_grad():
        broken.fc.weight[0, 0] = NAN
    with pytest.raises(EvenbitsError, match=r"fc\.weight holds NaN"):
        prepare_qat(broken, OVP4)


def test_a_model_that_diverged_is_not_converted() -> None:
    model = load_digit_net()
    prepare_qat(model, OVP4)
    model(calibration_digits()[0])
    with torch.no_grad():
        model.fc.weight[0, 0] = NAN
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(EvenbitsError, match=r"layer fc: .*diverged"):
        convert_qat(model)
    assert _unchanged(model, kinds)


def test_every_scale_gets_a_gradient() -> None:
    model = load_digit_net()
    prepare_qat(model, _scheme("int3"))
    images, labels = calibration_digits()
    F.cross_entropy(model(images), labels).backward()
    found = [module for module in model.modules() if isinstance(module, FakeQuantizer)]
    assert len(found) == 10
    for quantizer in found:
        assert quantizer.log_scale.grad is not None
        assert bool(quantizer.log_scale.grad.any())


def test_hugging_face_conv1d_is_trained_the_right_way_round() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    conv = pytorch_utils.Conv1D(6, 10)
    model = nn.Sequential(conv)
    x = torch.randn(4, 10)
    prepare_qat(model, "W8A16")
    assert torch.allclose(model(x), conv(x), atol=0.02)
    convert_qat(model)
    assert model(x).shape == (4, 6)
