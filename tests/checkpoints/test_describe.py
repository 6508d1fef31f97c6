"""`describe`: what a checkpoint says about itself, without loading it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import evenbits
from evenbits.checkpoints import describe as module
from evenbits.checkpoints.describe import describe
from evenbits.checkpoints.files import CONFIG, WEIGHTS
from evenbits.errors import CheckpointError
from evenbits.nn.base import QuantizedLayer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(48, 5)
        self.table = nn.Embedding(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(self.norm(x))))


def made(path: Path, scheme: Any = "W8A8", *, with_result: bool = True) -> tuple[nn.Module, Any, dict[str, Any]]:
    model = Net()
    result = evenbits.quantize(model, scheme=scheme, data=[torch.randn(4, 32)])
    evenbits.save(model, path, result=result if with_result else None)
    return model, result, describe(path)


@pytest.mark.parametrize(
    "scheme",
    ["W8A8", "W8A8_STATIC", "W8A16", "W4A16",
     {"weights": "int8:row", "input_activations": "int8:tensor:affine", "dynamic": False}],
    ids=str,
)  # fmt: skip
def test_bytes_and_bits_on_disk_are_those_in_memory(scheme: Any, tmp_path: Path) -> None:
    model, result, found = made(tmp_path / "out", scheme)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    assert found["weight_bytes"] == result.weight_bytes == sum(m.weight_bytes for m in layers.values())
    assert found["float_weight_bytes"] == result.float_weight_bytes == 4 * (32 * 48 + 48 * 5)
    for row in found["layers"]:
        layer = layers[row["name"]]
        assert row["bits_per_weight"] == pytest.approx(layer.bits_per_weight)
        assert row["format"] == str(layer.weight_format) and tuple(row["shape"]) == layer.weight_shape
        assert row["sqnr_db"] == next(r.sqnr_db for r in result.layers if r.name == row["name"])
    folder = tmp_path / "out"
    assert found["file_bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    json.dumps(found, allow_nan=False)


def test_what_it_says(tmp_path: Path) -> None:
    _, _, found = made(tmp_path / "out")
    assert found["source"] == {"kind": "module", "class": "Net"} and found["method"] == "smoothquant"
    assert found["scheme"]["weights"] == "int8:row" and found["evenbits_version"] == evenbits.__version__
    assert {row["name"]: row["smoothing"] for row in found["layers"]} == {"a": "", "b": ""}
    assert [row["name"] for row in found["float_layers"]] == ["table.weight"] and found["float_layers"][0]["reason"]
    assert {row["status"] for row in found["regions"]} == {"folded"}  # into the norm, and through ReLU into a's rows


def test_a_checkpoint_saved_without_its_result_is_described_too(tmp_path: Path) -> None:
    _, _, found = made(tmp_path / "out", with_result=False)
    assert found["scheme"] is None and found["regions"] == [] and len(found["layers"]) == 2


def test_no_tensor_is_loaded_and_no_model_built(tmp_path: Path, monkeypatch: Any) -> None:
    made(tmp_path / "out")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("a tensor was made"))
    monkeypatch.setattr(nn.Module, "__init__", lambda *_, **__: pytest.fail("a module was made"))
    assert describe(tmp_path / "out")["layers"]


def test_odd_types_of_other_tensors_are_counted(tmp_path: Path) -> None:
    model = Net()
    for index, dtype in enumerate((torch.uint16, torch.uint32, torch.float8_e4m3fn, torch.bool, torch.float64)):
        model.register_buffer(f"b{index}", torch.zeros(10).to(dtype))
    evenbits.quantize(model, method="rtn")
    evenbits.save(model, tmp_path / "out")
    total = sum(tensor.nbytes for name, tensor in model.state_dict().items() if name.startswith("b") and name[1] != ".")
    found = describe(tmp_path / "out")
    small = {k: v for k, v in model.state_dict().items() if k.split(".")[0] in ("norm", "table")}
    rest = found["other_bytes"] - total - sum(t.nbytes for t in small.values())
    assert rest == sum(t.nbytes for k, t in model.state_dict().items() if k in ("a.bias", "b.bias"))


def test_a_damaged_one_is_refused(tmp_path: Path) -> None:
    made(tmp_path / "out")
    for name in (CONFIG, WEIGHTS):
        data = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(data[:-10])
        with pytest.raises(CheckpointError):
            describe(tmp_path / "out")
        (tmp_path / "out" / name).write_bytes(data)
    with pytest.raises(CheckpointError):
        describe(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "config",
    [{}, {"layers": {}}, {"layers": {"a": {}}, "source": {}}, {"layers": None}, {"layers": {"a": None}},
     {"layers": {"a": {"shape": [0], "input": None}}}, {"layers": {}, "result": []}, {"layers": {}, "result": 3}],
    ids=repr,
)  # fmt: skip
def test_tables_that_cannot_be_read_are_a_checkpoint_error(
    config: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    for name in ("check_config", "check_files"):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(module, "read_config", lambda _: {"files": {}, **config})
    monkeypatch.setattr(module, "_tensor_bytes", lambda _: {})
    with pytest.raises(CheckpointError, match="cannot be read"):
        describe(tmp_path)


def test_describing_needs_no_transformers(tmp_path: Path) -> None:
    made(tmp_path / "out")
    code = "import sys; from evenbits.checkpoints.describe import describe; describe(sys.argv[1]); "
    code += "print('transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"
