"""`import evenbits` stays light, and each room brings only what it needs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "safetensors", "yaml", "matplotlib", "rich", "typer", "tqdm", "onnx")


def imported(code: str) -> set[str]:
    code += f"\nimport sys, json; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported("import evenbits; evenbits.__version__; dir(evenbits); evenbits.EvenbitsError") == set()


def test_importing_the_command_line_does_not_import_torch() -> None:
    assert imported("import evenbits.cli") <= {"typer", "rich"}


def test_the_whole_api_does_without_transformers_and_matplotlib() -> None:
    found = imported("import evenbits\nfor name in evenbits.__all__: getattr(evenbits, name)")
    assert "torch" in found and not found & {"transformers", "matplotlib", "onnx", "typer", "rich"}


@pytest.mark.parametrize("module", ["evenbits.numerics.qtensor", "evenbits.schemes.scheme", "evenbits.kernels.ops"])
def test_the_lower_floors_do_without_extras(module: str) -> None:
    assert not imported(f"import {module}") & {"transformers", "matplotlib", "typer", "rich", "yaml", "safetensors"}


def test_quantizing_saving_and_loading_a_module_does_without_transformers() -> None:
    code = """
import sys, tempfile, pathlib
sys.modules["transformers"] = None
import torch, evenbits
from torch import nn
def net(): return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4))
model = net()
evenbits.quantize(model, data=[torch.randn(3, 16)])
with tempfile.TemporaryDirectory() as folder:
    evenbits.save(model, pathlib.Path(folder) / "out")
    evenbits.load(pathlib.Path(folder) / "out", net())
del sys.modules["transformers"]
"""
    assert "transformers" not in imported(code)
