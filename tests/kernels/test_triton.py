"""The GPU backend where there is no GPU: its interpreter run, when it is chosen, what it says when it is not there."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evenbits.errors import EvenbitsError
from evenbits.kernels import dispatch, pair_fp8, use_backend
from evenbits.kernels.triton import loader

HERE = Path(__file__).parent
INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="TRITON IS NOT INSTALLED: no kernel of the GPU was checked")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    caches = (dispatch._choose, loader.status, loader.e4m3_status)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@needs_triton
def test_the_interpreter_agrees_with_the_reference() -> None:
    """interpreted_*.py, in a process whose kernels are defined for the interpreter."""
    options = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, sorted(HERE.glob("interpreted_*.py")))]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "[100%]" in done.stdout


@pytest.mark.skipif(loader.interpreted(), reason="the interpreter was asked for")
def test_on_a_cpu_there_is_no_such_backend() -> None:
    assert not loader.status("cpu").usable
    if not torch.cuda.is_available():
        with pytest.raises(EvenbitsError, match="'triton' is not there: Triton's kernels run on GPUs"):
            with use_backend("triton"):
                pytest.fail("a backend without a GPU was entered")


@needs_triton
def test_a_gpu_is_served_by_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with caplog.at_level(logging.DEBUG, "evenbits.kernels"):
        chosen = dispatch.choice("cuda")
    assert chosen.backend == dispatch.backend("cuda") == "triton" and "Triton" in chosen.reason
    assert "torch._int_mm between them (a guess, not measured)" in chosen.reason
    assert caplog.records == []
    assert dispatch.fused("cuda") is loader.calls()
    with use_backend("reference"):
        assert dispatch.fused("cuda") is None
    with use_backend("triton"):  # there is a GPU: on the CPU nothing changes
        assert dispatch.backend("cuda") == "triton" and dispatch.backend("cpu") != "triton"


@needs_triton
@pytest.mark.parametrize(
    ("capability", "says"), [((8, 0), "8.9, cuda has 8.0"), ((8, 6), "8.9, cuda has 8.6"), ((8, 9), ""), ((9, 0), "")]
)
def test_fp8_products_need_a_newer_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], says: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert pair_fp8.is_served("cuda") == (not says) and not pair_fp8.is_served("cpu")
    assert (f"no FP8 products: they need compute capability {says}" if says else "FP8 activations too") in str(
        dispatch.choice("cuda")
    )
    if not says:
        assert dispatch.e4m3("cuda") is loader.calls() and pair_fp8.served_by("cuda") == "triton"
        return
    assert pair_fp8.served_by("cuda").startswith("torch float64")
    with pytest.raises(EvenbitsError, match=rf"{says}\. On this GPU use activations in int8:row"):
        dispatch.e4m3("cuda")
    with use_backend("reference"):
        assert dispatch.e4m3("cuda") is None


@needs_triton
@pytest.mark.parametrize(("capability", "hip", "says"), [((7, 5), None, "capability 7.5"), ((9, 0), "6.4", "AMD")])
def test_other_gpus_say_why_not(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    hip: str | None,
    says: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    with caplog.at_level(logging.WARNING, "evenbits.kernels"):
        assert dispatch.choice("cuda").backend == "torch_int_mm"
        assert dispatch.choice("cuda").backend == "torch_int_mm"
    assert len(caplog.records) == 1 and says in caplog.text and says in dispatch.choice("cuda").reason


def test_without_triton_a_gpu_runs_torch_and_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with caplog.at_level(logging.WARNING, "evenbits.kernels"):
        chosen = dispatch.choice("cuda")
    assert chosen.backend == "torch_int_mm" and dispatch.fused("cuda") is None
    for text in (chosen.reason, caplog.text):
        assert "No module named 'triton'" in text and "pip install 'evenbits[gpu]'" in text


def test_the_cpu_never_imports_triton() -> None:
    """torch.compile may; nothing of ours does, be it imported or used."""
    code = (
        "import sys, torch, evenbits\n"
        "from evenbits.kernels.ops import linear_pair_float, linear_w8a8\n"
        "linear_w8a8(torch.randn(2, 8), torch.ones(3, 8, dtype=torch.int8), torch.ones(3, 1), None, 'int8:row')\n"
        "linear_pair_float(torch.randn(2, 8), torch.ones(3, 4).byte(), torch.ones(3, 1), 'int4:row', None)\n"
        "assert 'triton' not in sys.modules and 'evenbits.kernels.triton.calls' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_where_int_mm_begins_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, rows, says in (("1024", 1024, "1024 rows"), ("0", 1 << 62, "int8 weights too"), ("7", 7, "from 7 rows")):
        monkeypatch.setenv(loader.VARIABLE, text)
        assert loader.int_mm_from() == rows and says in loader.note()
    monkeypatch.setenv(loader.VARIABLE, "many")
    with pytest.raises(EvenbitsError, match="EVENBITS_INT_MM_ROWS is a number of rows"):
        loader.int_mm_from()
    monkeypatch.delenv(loader.VARIABLE)
    assert loader.int_mm_from() == 1024
