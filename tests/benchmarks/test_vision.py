"""The models of benchmarks/vision.py: planting outliers changes no output, and real weights score what is noted."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vision.py"


@pytest.fixture(scope="module")
def vision() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vision", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def absmax(model: torch.nn.Module, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().amax(dim=(0, 2, 3))))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_planted_channels_stand_out_and_change_nothing(vision: ModuleType, name: str) -> None:
    torch.manual_seed(0)
    make: Any = {"resnet": lambda: vision.ResNet(1), "mobilenet": vision.MobileNetV2}[name]
    plant = {"resnet": vision.plant_resnet, "mobilenet": vision.plant_mobilenet}[name]
    model = make().eval()
    twin = make().eval()
    twin.load_state_dict(model.state_dict())
    assert plant(twin) is twin
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))  # powers of two: not one bit
    reader = {"resnet": lambda m: m.layer1[0].conv2, "mobilenet": lambda m: m.stages[3][1].layers[0]}[name]
    ratio = absmax(twin, reader(twin), x) / absmax(model, reader(model), x)
    assert 8 <= ratio.max() <= 64 and (ratio > 1.5).sum() >= 1 and (ratio < 1.5).sum() > 0.9 * len(ratio)


def test_two_plantings_are_the_same(vision: ModuleType) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(vision.plant_resnet(vision.ResNet(1)).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(models[0].values(), models[1].values(), strict=True))


@pytest.mark.slow
@pytest.mark.data
def test_prepared_arrays_are_apart_and_float_accuracy_is_the_noted_one(test_data: Path, tmp_path: Path) -> None:
    for words in (["prepare", str(tmp_path)], ["check"]):
        done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    sizes = {
        "imagenet-calibration": 100,
        "imagenet-evaluation": 400,
        "cifar10-calibration": 100,
        "cifar10-evaluation": 2000,
        "cifar10-confirmation": 8000,
    }
    arrays = {name: np.load(tmp_path / f"{name}.npz") for name in sizes}
    assert {name: len(found["labels"]) for name, found in arrays.items()} == sizes
    assert not set(arrays["imagenet-calibration"]["labels"]) & set(arrays["imagenet-evaluation"]["labels"])
