"""`save` and `load`: the same bits, the same outputs, and nothing left behind by a save that failed or was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import evenbits
from evenbits.checkpoints import files, native
from evenbits.checkpoints.files import CONFIG, WEIGHTS, read_config
from evenbits.errors import CheckpointError, EvenbitsError

D = 32


class Net(nn.Module):
    """Everything a checkpoint must carry: linears, a convolution, buffers, a tie, a narrow tensor, odd types."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, D, 3, stride=2, padding="valid", padding_mode="reflect", dilation=2)
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D, bias=False)
        self.table = nn.Embedding(50, D)
        self.head = nn.Linear(D, 50)
        self.head.weight = self.table.weight
        self.table.weight.data = self.table.weight.data.half().float()
        self.register_buffer("count", torch.tensor([7], dtype=torch.int64))
        self.register_buffer("mask", torch.eye(4, dtype=torch.bool))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).mean((2, 3))
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(5))


def quantized(
    scheme: str = "W8A8", method: str = "smoothquant", change: Callable[[nn.Module], Any] | None = None
) -> Net:
    model = Net().eval()
    x = X
    if change is not None:
        change(model)
        x = X.to(next(model.parameters()).dtype)
    evenbits.quantize(model, scheme=scheme, method=method, data=[x])
    return model


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype and torch.equal(bits(theirs[name]), bits(tensor)), name
    assert [type(m) for m in left.modules()] == [type(m) for m in right.modules()]
    x = X.to(left.table.weight.dtype)
    assert torch.equal(left.eval()(x), right(x))


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC", "W8A16", "W4A16"])
@pytest.mark.parametrize("method", ["rtn", "smoothquant"])
def test_a_round_trip_is_bit_exact(scheme: str, method: str, tmp_path: Path) -> None:
    model = quantized(scheme, method)
    assert evenbits.save(model, tmp_path / "out") == tmp_path / "out"
    loaded = evenbits.load(tmp_path / "out", Net())
    assert_same(model, loaded)
    assert not any(module.training for module in loaded.modules())
    assert loaded.head.weight is loaded.table.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_comes_back_in_its_type(dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized(change=lambda m: m.to(dtype))
    evenbits.save(model, tmp_path / "out")
    loaded = evenbits.load(tmp_path / "out", Net())
    assert loaded.norm.weight.dtype == dtype and loaded.up.weight_scale.dtype == torch.float32
    assert_same(model, loaded)


def test_affine_activations_and_grouped_weights_come_back(tmp_path: Path) -> None:
    scheme: dict[str, Any] = {"weights": "int8:row", "input_activations": "int8:tensor:affine", "dynamic": False}
    models = []
    for given in (scheme, {"weights": "int4:g16:affine"}, {"weights": "int3:row:mse"}, {"weights": "uint5:g7:affine"}):
        model = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 9))
        evenbits.quantize(model, scheme=given, method="rtn", data=[torch.randn(4, D)])
        path = evenbits.save(model, tmp_path / str(len(models)))
        loaded = evenbits.load(path, nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 9)))
        x = torch.randn(5, D)
        assert torch.equal(model(x), loaded(x)), given
        models.append(model)
    assert models[0][1].weight_sum is not None


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = quantized()
    evenbits.save(model, tmp_path / "a")
    evenbits.save(model, tmp_path / "b")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_loaded_model_can_be_saved_again_to_the_same_tensors(tmp_path: Path) -> None:
    model = quantized()
    evenbits.save(model, tmp_path / "a")
    evenbits.save(evenbits.load(tmp_path / "a", Net()), tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_the_folder_is_small_and_readable(tmp_path: Path) -> None:
    model = Net().eval()
    result = evenbits.quantize(model, data=[X])
    evenbits.save(model, tmp_path / "out", result=result)
    config = read_config(tmp_path / "out")
    assert sorted(config["layers"]) == ["conv", "down", "up"]
    assert config["aliases"] == {"head.weight": "table.weight"} and config["widened"] == {"table.weight": "float32"}
    assert config["source"] == {"kind": "module", "class": "Net"}
    assert [row["name"] for row in config["result"]["layers"] if row["status"] == "quantized"] == ["conv", "up", "down"]
    assert (tmp_path / "out" / WEIGHTS).stat().st_size < 0.45 * sum(p.nbytes for p in Net().parameters()) + 4096
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_shared_layer_comes_back_shared(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(D, D)
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    model, x = Shared(), torch.randn(3, D)
    evenbits.quantize(model, data=[x])
    loaded = evenbits.load(evenbits.save(model, tmp_path / "out"), Shared())
    assert loaded.a is loaded.b and torch.equal(loaded(x), model(x))


def test_loading_does_not_depend_on_the_float_weights_given(tmp_path: Path) -> None:
    model = quantized()
    evenbits.save(model, tmp_path / "out")
    given = Net()
    for parameter in given.parameters():
        parameter.data.fill_(float("nan"))
    loaded = evenbits.load(tmp_path / "out", given)
    assert loaded is given
    assert_same(model, loaded)


def test_loaded_parameters_can_be_written_without_touching_the_file(tmp_path: Path) -> None:
    evenbits.save(quantized(), tmp_path / "out")
    loaded = evenbits.load(tmp_path / "out", Net())
    with torch.no_grad():
        for tensor in loaded.state_dict().values():
            tensor.zero_()
    evenbits.load(tmp_path / "out", Net())


def test_without_a_model_the_error_says_what_to_pass(tmp_path: Path) -> None:
    evenbits.save(quantized(), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"weights of a Net.*model=.*--model FILE.py:factory"):
        evenbits.load(tmp_path / "out")


def test_a_float_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(EvenbitsError, match=r"no quantized layer; call evenbits.quantize"):
        evenbits.save(Net(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(3 * D, D, bias=False)


class Lacking(Net):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Identity()


class Biased(Net):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(2 * D, D, bias=True)
        self.extra = nn.Parameter(torch.ones(3))


class Strided(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, D, 3, stride=1, padding="valid", padding_mode="reflect", dilation=2)


class Counted(Net):
    def __init__(self) -> None:
        super().__init__()
        self.count = torch.tensor([7], dtype=torch.int32)


@pytest.mark.parametrize("other", [Wider, Lacking, Biased, Strided, Counted])
def test_another_model_is_refused_and_left_alone(other: type[Net], tmp_path: Path) -> None:
    evenbits.save(quantized(), tmp_path / "out")
    given = other().train()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    modules = list(given.modules())
    with pytest.raises(CheckpointError):
        evenbits.load(tmp_path / "out", given)
    assert all(a is b for a, b in zip(modules, given.modules(), strict=True)) and given.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())


# ------------------------------------------------------------------------------------------- failures while saving


def test_an_existing_folder_is_kept_unless_it_is_ours_and_overwriting_is_asked_for(tmp_path: Path) -> None:
    model = quantized()
    evenbits.save(model, tmp_path / "out")
    stamp = (tmp_path / "out" / CONFIG).stat().st_mtime_ns
    with pytest.raises(EvenbitsError, match="exists"):
        evenbits.save(model, tmp_path / "out")
    assert (tmp_path / "out" / CONFIG).stat().st_mtime_ns == stamp
    evenbits.save(model, tmp_path / "out", overwrite=True)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").write_bytes(b"hours of training")
    with pytest.raises(EvenbitsError, match="something other than an evenbits checkpoint"):
        evenbits.save(model, tmp_path / "foreign", overwrite=True)
    assert (tmp_path / "foreign" / "model.safetensors").read_bytes() == b"hours of training"


class _Tokenizer:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("half of")
        raise self.error


@pytest.mark.parametrize(
    "error", [Exception("No space left on device (os error 28)"), OSError(28, "No space left"), TypeError("odd")]
)
def test_a_tokenizer_that_cannot_be_written_leaves_nothing(error: Exception, tmp_path: Path) -> None:
    """The tokenizers library raises a plain Exception for a full disk."""
    with pytest.raises(EvenbitsError, match="nothing was written"):
        evenbits.save(quantized(), tmp_path / "out", tokenizer=_Tokenizer(error))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("point", ["save_file", "write_config", "_compare", "_read_state"])
@pytest.mark.parametrize("error", [OSError(5, "broken disk"), KeyboardInterrupt("stop")], ids=repr)
def test_a_failure_at_any_step_leaves_nothing(
    point: str, error: BaseException, tmp_path: Path, monkeypatch: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    model = quantized()
    monkeypatch.setattr(native, point, fail)
    with pytest.raises((EvenbitsError, KeyboardInterrupt)):
        evenbits.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_that_reads_back_differently_is_not_kept(tmp_path: Path, monkeypatch: Any) -> None:
    original = native._read_state

    def faulty(*args: Any) -> Any:
        state = original(*args)
        state.tensors["up.weight"][0, 0] ^= 1
        return state

    monkeypatch.setattr(native, "_read_state", faulty)
    with pytest.raises(EvenbitsError, match=r"'up.weight' did not read back"):
        evenbits.save(quantized(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_refusal_of_verify_leaves_nothing(tmp_path: Path) -> None:
    seen: list[bool] = []

    def verify(folder: Path) -> None:
        evenbits.load(folder, Net())
        seen.append((tmp_path / "out").exists())
        raise EvenbitsError("no")

    with pytest.raises(EvenbitsError, match="no"):
        evenbits.save(quantized(), tmp_path / "out", verify=verify)
    assert seen == [False] and not list(tmp_path.iterdir())


def test_a_full_disk_is_known_before_writing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(EvenbitsError, match=r"10,000 free; nothing was written"):
        evenbits.save(quantized(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


_CHILD = """
import pathlib, resource, signal, sys
import torch
from torch import nn
import evenbits
out, limit = pathlib.Path(sys.argv[1]), int(sys.argv[2])

class Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_bytes(b"x" * 400_000)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256))
evenbits.quantize(model, method="rtn")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    evenbits.save(model, out, tokenizer=Tokenizer())
except evenbits.EvenbitsError as error:
    print("REFUSED", type(error).__name__, str(error).replace(chr(10), " "))
else:
    print("WRITTEN")
"""


def child(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("limit", [0, 1000, 200_000, 300_000])
def test_a_disk_that_fills_while_writing_leaves_nothing(limit: int, tmp_path: Path) -> None:
    """A real one: the operating system refuses to let a file grow. The weights have 268 kB, the tokenizer 400 kB."""
    done = child(_CHILD, str(tmp_path / "out"), str(limit))
    assert done.stdout.startswith("REFUSED EvenbitsError"), done.stdout + done.stderr
    assert "nothing was written" in done.stdout
    assert not list(tmp_path.iterdir())


def test_without_the_limit_the_same_program_writes(tmp_path: Path) -> None:
    assert child(_CHILD, str(tmp_path / "out"), str(1 << 24)).stdout.strip() == "WRITTEN"


_KILLED = """
import pathlib, sys, time
from torch import nn
import evenbits
from evenbits.checkpoints import native
out, stage = pathlib.Path(sys.argv[1]), sys.argv[2]
model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
evenbits.quantize(model, method="rtn")
original = getattr(native, stage)

def waiting(*args, **kwargs):
    original(*args, **kwargs)
    print("reached", flush=True)
    time.sleep(60)

setattr(native, stage, waiting)
evenbits.save(model, out, overwrite=True)
"""


@pytest.mark.parametrize("stage", ["save_file", "_compare"])
def test_a_killed_save_leaves_no_folder_of_that_name_and_the_old_one_whole(stage: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    evenbits.quantize(model, method="rtn")
    evenbits.save(model, tmp_path / "old")
    old = (tmp_path / "old" / WEIGHTS).read_bytes()
    for name in ("new", "old"):
        command = [sys.executable, "-W", "ignore", "-c", _KILLED, str(tmp_path / name), stage]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "reached"
            os.kill(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError, match="not an evenbits checkpoint"):
        evenbits.load(tmp_path / "new", nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    assert (tmp_path / "old" / WEIGHTS).read_bytes() == old
    evenbits.load(tmp_path / "old", nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    evenbits.save(model, tmp_path / "new")  # what the killed one left is in nobody's way


def test_a_save_is_quick_for_a_small_model(tmp_path: Path) -> None:
    model = quantized()
    start = time.perf_counter()
    evenbits.save(model, tmp_path / "out")
    assert time.perf_counter() - start < 5
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["format"] == "evenbits"
