"""What is installed, with a C compiler and without one: tags, contents, and that it runs from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from evenbits.kernels.cpu import build

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import torch, evenbits
from evenbits.kernels import report
layer = torch.nn.Sequential(torch.nn.Linear(64, 8))
evenbits.quantize(layer, scheme="W4A8_OVP", method="rtn")
layer(torch.randn(2, 64))
print(evenbits.__file__)
print(report()[0].backend, report()[0].reason)
"""


def wheel(tmp_path: Path, cc: str | None) -> Path:
    """The wheel of a copy of this tree (the hook removes a library that lies about). cc: the compiler's name."""
    tree = tmp_path / "tree"
    tree.mkdir()
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.so", "*.dylib", "__pycache__"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree / name)
    environment = {name: value for name, value in os.environ.items() if name != "CC"}
    environment |= {} if cc is None else {"CC": cc}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert cc is None or "install a C compiler and reinstall" in done.stdout + done.stderr
    (found,) = (tmp_path / "out").iterdir()
    return found


def ran(tmp_path: Path, found: Path) -> list[str]:
    """What a program prints that finds evenbits in an unpacked wheel and nowhere else."""
    site = tmp_path / "site"
    with zipfile.ZipFile(found) as archive:
        archive.extractall(site)
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    lines = done.stdout.splitlines()
    assert Path(lines[0]).is_relative_to(site)
    return [lines[1], done.stderr]


@pytest.mark.slow
def test_with_a_compiler_one_wheel_serves_every_python_and_torch_of_a_platform(tmp_path: Path) -> None:
    try:
        build.compiler()
    except build.BuildError:
        pytest.skip("no C compiler here")
    found = wheel(tmp_path, None)
    assert found.name.endswith(f"-{build.platform_tag()}.whl") and "-py3-none-" in found.name
    with zipfile.ZipFile(found) as archive:
        libraries = [name for name in archive.namelist() if name.endswith((".so", ".dylib"))]
    assert libraries == [f"evenbits/kernels/cpu/{build.library_name()}"]
    line, errors = ran(tmp_path, found)
    assert line.startswith("c evenbits' own kernels, variant ") and errors == ""


@pytest.mark.slow
def test_without_a_compiler_it_installs_runs_and_says_what_is_missing(tmp_path: Path) -> None:
    found = wheel(tmp_path, "/nowhere/cc")
    assert found.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(found) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".dylib"))]
    line, errors = ran(tmp_path, found)
    assert line.startswith(("torch_int_mm ", "torch_fp32 ")) and "was not built" in line
    assert "slower" in errors or "no speed-up" in errors


def test_a_python_for_two_processors_names_the_one_it_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.sysconfig, "get_platform", lambda: "macosx-11.0-universal2")
    monkeypatch.setattr(build.platform, "machine", lambda: "arm64")
    assert build.platform_tag() == "py3-none-macosx_11_0_arm64"
