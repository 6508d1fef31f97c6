"""The table of methods: names, outsiders, and the walls between methods."""

from __future__ import annotations

import ast
import importlib.metadata
import pathlib
import sys
import types

import pytest

import evenbits.algorithms
from evenbits.algorithms import ALGORITHMS, get
from evenbits.algorithms.base import balance_method, weight_method
from evenbits.errors import EvenbitsError

FILES = sorted(
    path
    for path in pathlib.Path(evenbits.algorithms.__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "base", "alpha")
)


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_line_leads_to_a_marked_function_with_a_lesson(name: str) -> None:
    function = get(name)
    assert function.kind in ("weight", "balance", "activation")
    assert isinstance(function.needs, frozenset)
    assert get(name) is function
    assert f"{function.__module__}:{function.__name__}" == ALGORITHMS[name]
    assert len(sys.modules[function.__module__].__doc__ or "") > 200


def test_the_two_first_methods() -> None:
    assert (get("rtn").kind, get("rtn").needs) == ("weight", frozenset())
    assert (get("smoothquant").kind, get("smoothquant").needs) == ("balance", frozenset({"absmax"}))


@pytest.mark.parametrize(
    ("name", "near"), [("smothquant", "smoothquant"), ("SmoothQuant", "smoothquant"), ("rnt", "rtn"), ("zzzz", None)]
)
def test_unknown_method(name: str, near: str | None) -> None:
    with pytest.raises(EvenbitsError) as caught:
        get(name)
    assert f"unknown method {name!r}." in str(caught.value)
    assert ("Did you mean" in str(caught.value)) is (near is not None)
    if near:
        assert f"Did you mean {near!r}?" in str(caught.value)
    assert "rtn" in str(caught.value)


@pytest.fixture
def outsider(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("somebodys_methods")

    @weight_method(needs=frozenset({"hessian"}))
    def mine() -> str:
        return "mine"

    module.mine = mine  # type: ignore[attr-defined]
    module.plain = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys_methods", module)
    group = "evenbits.algorithms"
    entries = [
        importlib.metadata.EntryPoint("mine", "somebodys_methods:mine", group),
        importlib.metadata.EntryPoint("plain", "somebodys_methods:plain", group),
        importlib.metadata.EntryPoint("rtn", "somebodys_methods:mine", group),
        importlib.metadata.EntryPoint("gone", "somebodys_methods:gone", group),
    ]

    def entry_points(**query: str) -> list[importlib.metadata.EntryPoint]:
        assert query == {"group": group}
        return entries

    monkeypatch.setattr(evenbits.algorithms, "entry_points", entry_points)
    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return module


def test_outsiders_come_through_entry_points(outsider: types.ModuleType) -> None:
    assert get("mine") is outsider.mine
    assert get("mine")() == "mine"
    assert get("mine").needs == {"hessian"}
    assert get("rtn").__module__ == "evenbits.algorithms.rtn"
    assert "mine" not in ALGORITHMS  # asking does not change the table
    with pytest.raises(EvenbitsError, match="Did you mean 'mine'"):
        get("minee")


def test_an_undecorated_function_is_refused(outsider: types.ModuleType) -> None:
    with pytest.raises(EvenbitsError, match=r"method 'plain' \(somebodys_methods:plain\) is not marked by a decorator"):
        get("plain")


def test_decorators_mark_and_return_the_function_itself() -> None:
    def function() -> int:
        return 7

    assert balance_method()(function) is function
    assert (function.kind, function.needs) == ("balance", frozenset({"absmax"}))  # type: ignore[attr-defined]
    assert function() == 7


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_method_imports_no_other_method(file: pathlib.Path) -> None:
    others = {f"evenbits.algorithms.{path.stem}" for path in FILES} - {f"evenbits.algorithms.{file.stem}"}
    imported: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    assert imported & {"evenbits.algorithms.base"}
    assert not imported & others


def test_the_methods_of_the_table_are_the_files_of_the_room() -> None:
    modules = {target.partition(":")[0].rpartition(".")[2] for target in ALGORITHMS.values()}
    assert modules <= {path.stem for path in FILES}
    assert {"rtn", "smoothquant"} <= modules


def test_an_outsider_cannot_take_our_name_and_must_exist(outsider: types.ModuleType) -> None:
    assert get("rtn") is not outsider.mine
    with pytest.raises(EvenbitsError, match="somebodys_methods:gone"):
        get("gone")
