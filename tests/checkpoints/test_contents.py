"""Numbers that another program may have written, in folders with right hashes: `load` and `describe` refuse them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import evenbits
from evenbits.checkpoints.describe import describe
from evenbits.checkpoints.files import CONFIG, WEIGHTS, write_config
from evenbits.cli import app
from evenbits.errors import CheckpointError

K = 33


class Net(nn.Module):
    """first's columns have two pairs of hot channels, which re-pairing parts by an index."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(K), nn.Linear(K, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.norm.weight[[4, 5, 16, 17]] *= 60
            self.first.weight[:, [4, 5, 16, 17]] /= 60

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(torch.tanh(self.first(self.norm(x))))
        return y


def folder_of(path: Path, scheme: object = "W4A8_OVP", method: str = "repair+olive") -> tuple[Net, Path]:
    model = Net().eval()
    result = evenbits.quantize(model, scheme=scheme, method=method, data=[torch.randn(16, K)])  # type: ignore[arg-type]
    return model, evenbits.save(model, path / "out", result=result)


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Other tensors in the folder, and a config with their lengths, hashes and checksum."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).unlink()
    write_config(folder, {key: value for key, value in config.items() if key not in ("files", "checksum")})


@pytest.mark.parametrize("byte", [0x88, 0x08, 0x80])
@pytest.mark.parametrize("weights", ["ovp4:row", "ovp4-flint_i8:row", "ovp4-mix:g16"])
def test_an_illegal_byte_is_named(weights: str, byte: int, tmp_path: Path) -> None:
    _, folder = folder_of(tmp_path, {"weights": weights}, "olive")
    rewrite(folder, lambda tensors: tensors["first.weight"][3, 5:7].fill_(byte))
    words = f"layer 'first' .*row 3 .*byte 0x{byte:02x} at offset 5"
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        evenbits.load(folder, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match=words):
        describe(folder)
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert shown.exit_code != 0
    assert "intact" not in shown.output


@pytest.mark.parametrize("pair", [(0x80, 0x80), (0x80, 0x00), (0x00, 0x80), (0x80, 0x41), (0xFF, 0x80)])
def test_an_illegal_pair_of_8_bits_is_named(pair: tuple[int, int], tmp_path: Path) -> None:
    _, folder = folder_of(tmp_path, {"weights": "ovp8:row"}, "olive")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["last.weight"][2, 4:6] = torch.tensor(pair, dtype=torch.uint8)

    rewrite(folder, edit)
    words = f"layer 'last' .*row 2 .*bytes 0x{pair[0]:02x} 0x{pair[1]:02x} at offset 4"
    with pytest.raises(CheckpointError, match=words):
        evenbits.load(folder, Net())
    with pytest.raises(CheckpointError, match=words):
        describe(folder)


def test_legal_bytes_of_another_writer_load(tmp_path: Path) -> None:
    """0x18 is legal and rare: a victim beside the smallest outlier."""
    _, folder = folder_of(tmp_path, "W4A16_OVP", "olive")
    rewrite(folder, lambda tensors: tensors["last.weight"].fill_(0x18))
    loaded = evenbits.load(folder, Net())
    assert set(loaded.last.qweight().values().flatten().tolist()) in ({0.0, 12.0}, {0.0, 24.0})
    assert len(describe(folder)["layers"]) == 2


def test_bytes_of_another_shape_are_refused_by_both(tmp_path: Path) -> None:
    _, folder = folder_of(tmp_path, "W4A16_OVP", "olive")
    rewrite(folder, lambda tensors: tensors.update({"last.weight": tensors["last.weight"][:, :3].contiguous()}))
    for refuse in (lambda: evenbits.load(folder, Net()), lambda: describe(folder)):
        with pytest.raises(CheckpointError, match="shape"):
            refuse()


def test_an_odd_row_is_padded_and_said_so(tmp_path: Path) -> None:
    model = Net().eval()
    result = evenbits.quantize(model, scheme="W4A16_OVP", method="olive", data=[torch.randn(16, K)])
    reasons = {row.name: row.reason for row in result.quantized}
    assert reasons == {"first": "33 columns stored as 34", "last": ""}
    assert model.first.qweight().note == "33 columns stored as 34"
    folder = evenbits.save(model, tmp_path / "out", result=result)
    assert {row["name"]: row["note"] for row in describe(folder)["layers"]} == reasons
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert "33 columns stored as 34: first." in shown.output


def test_an_order_of_channels_counts_and_is_two_bytes_a_channel(tmp_path: Path) -> None:
    model, folder = folder_of(tmp_path)
    order = model.first.input_permutation
    assert order is not None and order.dtype == torch.int16 and order.nbytes == 2 * K
    parts = [tensor.nbytes for name, tensor in model.first.named_buffers() if name.startswith(("weight", "input_p"))]
    assert model.first.weight_bytes == sum(parts)
    assert model.first.bits_per_weight == 8 * sum(parts) / (8 * K)
    row = next(layer for layer in describe(folder)["layers"] if layer["name"] == "first")
    assert row["smoothing"] == "indexed"
    assert row["weight_bytes"] == model.first.weight_bytes


def test_an_order_stored_as_int32_is_read(tmp_path: Path) -> None:
    model, folder = folder_of(tmp_path)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors["first.input_permutation"] = tensors["first.input_permutation"].int()

    rewrite(folder, widen)
    loaded, x = evenbits.load(folder, Net()), torch.randn(5, K)
    assert loaded.first.input_permutation.dtype == torch.int16
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("value", [-1, 0, K, 32000])
def test_what_is_no_order_of_channels_is_refused(value: int, dtype: torch.dtype, tmp_path: Path) -> None:
    _, folder = folder_of(tmp_path)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        order = tensors["first.input_permutation"].to(dtype)
        order[int((order == 7).nonzero())] = value
        tensors["first.input_permutation"] = order

    rewrite(folder, edit)
    with pytest.raises(CheckpointError, match=r"'first' .*no order of the channels 0 to 32"):
        evenbits.load(folder, Net())


def test_an_order_of_another_length_is_refused(tmp_path: Path) -> None:
    _, folder = folder_of(tmp_path)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["layers"]["first"]["permutation"] = 8
    (folder / CONFIG).unlink()
    write_config(folder, {key: value for key, value in config.items() if key not in ("files", "checksum")})
    with pytest.raises(CheckpointError, match="an order of 8 for 33 channels"):
        evenbits.load(folder, Net())
