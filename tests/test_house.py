"""The house rules that a machine can check: floors, sizes, no pickle, no foreign code, no paths of one machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import evenbits

SOURCE = Path(evenbits.__file__).parent
ROOT = SOURCE.parents[1]
FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_there_is_a_house_to_check() -> None:
    assert len(FILES) > 40


def test_imports_go_down_only() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* kept, 0 broken", done.stdout)


def test_every_room_stands_on_a_floor() -> None:
    """import-linter says so too; this names the room."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    floors = set(re.findall(r"\w+", " ".join(re.findall(r"^  \"([^\"]+)\",$", text, re.MULTILINE))))
    rooms = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= floors


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
    for function in functions(parsed(path)):
        assert function.end_lineno is not None
        body = function.body
        documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        first = body[1] if documented and len(body) > 1 else body[0]
        # The signature and the body; a long docstring costs nothing.
        head = body[0].lineno - function.lineno
        length = head + function.end_lineno - first.lineno + 1
        assert length <= 60, f"{function.name}: {length} lines"
        assert function.end_lineno - first.lineno + 1 <= 40, f"{function.name}: body"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_public_functions_and_classes_are_documented(path: Path) -> None:
    tree = parsed(path)
    assert ast.get_docstring(tree) or path.name == "_version.py"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name_of(path)}: {node.name}"


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_pickle_and_no_code_from_files(path: Path) -> None:
    tree = parsed(path)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.partition(".")[0] not in {
                "pickle",
                "cPickle",
                "dill",
                "cloudpickle",
                "joblib",
                "marshal",
                "shelve",
            }
    for name, call in calls(tree):
        assert name not in {"torch.load", "torch.save", "eval", "exec", "yaml.load", "os.system", "__import__"}, name
        if name.endswith(("np.load", "numpy.load")):
            allowed = [k for k in call.keywords if k.arg == "allow_pickle"]
            assert all(isinstance(k.value, ast.Constant) and k.value.value is False for k in allowed)
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code":
                assert isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in ("shell", "weights_only"):
                assert not (keyword.arg == "shell" and ast.unparse(keyword.value) == "True")
        if name.endswith(".from_pretrained") and "GenerationConfig" not in name:
            assert any(keyword.arg == "trust_remote_code" for keyword in call.keywords), f"{name_of(path)}: {name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_path_of_one_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"""["'\s](/work|/home|/root|/Users|/tmp|/mnt|/opt|[A-Z]:\\\\)[/"'\s]""", text)
    assert "shared/data" not in text


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_exception_is_swallowed_bare_and_nothing_is_printed_by_the_way(path: Path) -> None:
    tree = parsed(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if broad:
                raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                assert raises, f"{name_of(path)}:{node.lineno} swallows everything"
    if path.parent.name not in ("cli", "reporting"):
        assert all(name != "print" for name, _ in calls(tree)), name_of(path)


def test_no_leftovers() -> None:
    for path in FILES:
        with tokenize.open(path) as handle:
            for token in tokenize.generate_tokens(handle.readline):
                if token.type == tokenize.COMMENT:
                    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string), f"{name_of(path)}: {token.string}"


def test_test_files_have_unique_names_and_mirror_the_rooms() -> None:
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    names = [path.name for path in tests]
    assert len(names) == len(set(names))
    assert not list((ROOT / "tests").rglob("__init__.py"))
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir()} | {"tests", "parity", "tools", "benchmarks"}
    assert {path.parent.name for path in tests} <= rooms
