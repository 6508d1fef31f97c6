"""From a name to a verified checkpoint: nothing is reported that was not read back, nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evenbits.checkpoints import native
from evenbits.errors import EvenbitsError
from evenbits.pipeline import run as run_module
from evenbits.pipeline.run import Run, quantize_to_folder

FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

def linears():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

def forgetful():
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 4), nn.Dropout())

def batches():
    for _ in range(3):
        yield torch.randn(5, 16)

def empty():
    return []
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(FACTORY)
    return str(path)


def go(model: str, output: Path | None, **changes: Any) -> Run:
    said: list[str] = []
    options: dict[str, Any] = {
        "scheme": "W8A8", "method": "smoothquant", "options": {}, "calibration": None, "samples": 8, "length": 16,
        "batch_size": 4, "ignore": (), "dtype": "float32", "overwrite": False, "say": said.append,
    }  # fmt: skip
    return quantize_to_folder(model, output, **{**options, **changes})


@pytest.mark.parametrize("name", ["build", "linears"])
def test_a_factory_model_with_its_batches(name: str, factory: str, tmp_path: Path) -> None:
    run = go(f"{factory}:{name}", tmp_path / "out", calibration=f"{factory}:batches")
    assert run.path == tmp_path / "out" and run.result.calibration_batches == 3
    assert "output of a calibration batch" in run.compared
    assert run.weight_bytes_on_disk == run.result.weight_bytes
    assert run.file_bytes == sum(file.stat().st_size for file in run.path.iterdir())
    json.dumps(run.to_json(), allow_nan=False)


def test_without_data_rtn_says_that_nothing_was_measured(factory: str, tmp_path: Path) -> None:
    said: list[str] = []
    run = go(f"{factory}:build", tmp_path / "out", method="rtn", say=said.append)
    assert "nothing is measured" in said[0] and run.calibration == "none" and run.result.calibration_batches == 0


def test_the_default_output_is_named_after_model_and_scheme(factory: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert go(f"{factory}:build", None, method="rtn").path == Path("build-W8A8")
    (tmp_path / "mine.yaml").write_text("weights: int8:row\n")
    assert go(f"{factory}:build", None, method="rtn", scheme="mine.yaml").path == Path("build-mine")
    assert (tmp_path / "build-mine" / "evenbits.json").exists()


@pytest.mark.parametrize(("model", "name"), [("a/b", "b-W8A8"), ("a/b/", "b-W8A8"), ("x.py:make", "make-W8A8")])
def test_default_names(model: str, name: str) -> None:
    assert run_module._default_output(model, "W8A8") == Path(name)


def test_the_default_name_of_the_current_folder_is_its_own(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "bert").mkdir()
    monkeypatch.chdir(tmp_path / "bert")
    assert run_module._default_output(".", "W8A8") == Path("bert-W8A8")


def test_an_existing_output_is_refused_before_anything_is_opened(
    factory: str, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    monkeypatch.setattr(run_module, "open_model", lambda *_, **__: pytest.fail("the model was opened"))
    for overwrite in (False, True):
        with pytest.raises(EvenbitsError, match=r"exists|other than"):
            go(f"{factory}:build", tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "wrong",
    [
        {"scheme": "W8A9"},
        {"method": "rtnn"},
        {"options": {"alfa": 1}},
        {"dtype": "float31"},
        {"calibration": "nowhere.txt"},
        {"calibration": "nowhere.py:x"},
        {"samples": 0},
        {"ignore": ("*",)},
    ],
    ids=repr,
)
def test_whatever_is_wrong_nothing_is_written(wrong: dict[str, Any], factory: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    given = {"calibration": f"{factory}:batches", **wrong}
    with pytest.raises(EvenbitsError):
        go(f"{factory}:build", tmp_path / "out", **given)
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before


def test_empty_batches_of_a_python_file_are_refused(factory: str, tmp_path: Path) -> None:
    with pytest.raises(EvenbitsError, match="empty"):
        go(f"{factory}:build", tmp_path / "out", calibration=f"{factory}:empty")


def test_a_checkpoint_is_not_quantized_again(factory: str, tmp_path: Path) -> None:
    go(f"{factory}:build", tmp_path / "out", method="rtn")
    with pytest.raises(EvenbitsError):
        go(str(tmp_path / "out"), tmp_path / "again", method="rtn")
    assert not (tmp_path / "again").exists()


def test_a_model_that_reads_back_differently_is_not_written(factory: str, tmp_path: Path, monkeypatch: Any) -> None:
    original = native.load

    def altered(path: Path, model: nn.Module | None = None) -> nn.Module:
        loaded = original(path, model)
        loaded[1].weight[0, 0] += 1
        return loaded

    monkeypatch.setattr(run_module.native, "load", altered)
    with pytest.raises(EvenbitsError, match=r"'1.weight' differs after reading"):
        go(f"{factory}:build", tmp_path / "out", method="rtn")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("net.py", "__pycache__")]


def test_a_model_that_computes_differently_after_reading_back_is_not_written(
    factory: str, tmp_path: Path, monkeypatch: Any
) -> None:
    original = native.load

    def altered(path: Path, model: nn.Module | None = None) -> nn.Module:
        loaded = original(path, model)
        loaded.register_forward_hook(lambda *a: a[-1] + 1e-3)
        return loaded

    monkeypatch.setattr(run_module.native, "load", altered)
    with pytest.raises(EvenbitsError, match="output differs"):
        go(f"{factory}:build", tmp_path / "out", calibration=f"{factory}:batches")
    assert not (tmp_path / "out").exists()


def test_the_first_batch_of_a_stream_is_not_lost() -> None:
    first, batches = run_module._peek(iter([torch.zeros(1), torch.ones(1)]))
    assert torch.equal(first, torch.zeros(1)) and len(list(batches)) == 2
    assert run_module._peek(iter([]))[0] is None and run_module._peek([])[0] is None


def test_the_head_is_taken_off_the_list_on_request(factory: str, tmp_path: Path) -> None:
    run = go(f"{factory}:build", tmp_path / "out", method="rtn", ignore=("3",), head=True)
    assert run.result.scheme["ignore"] == ["3"] and run.result.scheme["tied"] is True


def test_ignored_names_are_added_to_the_schemes(factory: str, tmp_path: Path) -> None:
    run = go(f"{factory}:build", tmp_path / "out", method="rtn", ignore=("3",))
    assert [row.name for row in run.result.quantized] == ["1"]
    assert "lm_head" in run.result.scheme["ignore"]


def test_overwriting_replaces_our_own_folder_whole(factory: str, tmp_path: Path) -> None:
    go(f"{factory}:build", tmp_path / "out", method="rtn")
    (tmp_path / "out" / "stale.txt").write_text("old")
    run = go(f"{factory}:build", tmp_path / "out", method="rtn", overwrite=True, scheme="W8A16")
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert run.result.scheme["input_activations"] is None
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "net.py", "__pycache__"}
