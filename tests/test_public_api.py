"""The public names: all there, all what they say, and still so after they were used."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import evenbits

NAMES = [
    "ALGORITHMS", "EvenbitsError", "Format", "QTensor", "Result", "Scheme", "__version__", "encode", "evaluate",
    "load", "quantize", "save", "sweep",
]  # fmt: skip
FUNCTIONS = ["encode", "evaluate", "load", "quantize", "save", "sweep"]


def test_the_names_are_these() -> None:
    assert sorted(evenbits.__all__) == sorted(NAMES)
    assert set(NAMES) <= set(dir(evenbits))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_had(name: str) -> None:
    value = getattr(evenbits, name)
    assert not isinstance(value, ModuleType)
    assert getattr(evenbits, name) is value


def test_star_import_brings_them_all() -> None:
    space: dict[str, Any] = {}
    exec("from evenbits import *", space)
    assert set(NAMES) <= set(space)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        evenbits.quantise  # noqa: B018
    assert not hasattr(evenbits, "Quantize")


def test_type_checkers_see_the_same_names() -> None:
    source = Path(evenbits.__file__).read_text(encoding="utf-8")
    block = source[source.index("if TYPE_CHECKING") : source.index("_LAZY")]
    for name in set(NAMES) - {"EvenbitsError", "__version__"}:
        assert f" {name}" in block, name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented_and_typed(name: str) -> None:
    function = getattr(evenbits, name)
    assert inspect.isfunction(function) and inspect.getdoc(function)
    hints = typing.get_type_hints(function)
    assert "return" in hints
    assert set(inspect.signature(function).parameters) <= set(hints)


def test_no_room_bears_the_name_of_a_public_function() -> None:
    rooms = {path.stem for path in Path(evenbits.__file__).parent.iterdir()}
    assert not rooms & set(FUNCTIONS)


def test_every_error_is_an_evenbits_error_and_a_value_error() -> None:
    from evenbits import errors

    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert all(issubclass(error, evenbits.EvenbitsError) for error in found)
    assert issubclass(evenbits.EvenbitsError, ValueError)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def test_every_public_function_called_twice_gives_the_same_and_is_still_a_function(tmp_path: Path) -> None:
    """`import evenbits.evaluate` as a package would replace the function on first use; so would a bad lazy import."""
    x = torch.randn(6, 16)
    outcomes: list[list[Any]] = []
    for turn in range(2):
        functions = {name: getattr(evenbits, name) for name in FUNCTIONS}
        assert all(inspect.isfunction(function) for function in functions.values())
        encoded = evenbits.encode(x, "int4:g8")
        model = net()
        result = evenbits.quantize(model, data=[x])
        path = evenbits.save(model, tmp_path / str(turn), result=result)
        loaded = evenbits.load(path, net())
        found = evenbits.evaluate(loaded, task="classification", data=[(x, torch.arange(6) % 3)])
        outcomes.append([encoded.packed, encoded.scale, loaded(x), result.layers, result.regions, found.to_json()])
    for first, second in zip(*outcomes, strict=True):
        same = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
        assert same


def test_the_algorithms_are_named_not_imported() -> None:
    assert {"rtn", "smoothquant"} <= set(evenbits.ALGORITHMS)
    assert all(isinstance(value, str) and value.count(":") == 1 for value in evenbits.ALGORITHMS.values())


def test_python_m_evenbits_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "evenbits", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == f"evenbits {evenbits.__version__}"
