"""What the README shows must run, and its first screen must hold what it is, the proof, the install and the command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
DOCS = {
    path.name: block
    for path in sorted((ROOT / "docs").glob("*.md"))
    for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    if "init_process_group" not in block  # takes several processes: tests/comms/test_wire_docs.py
}
SHELL = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_code_to_run() -> None:
    assert PYTHON
    assert SHELL


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "quantized" in done.stdout


@pytest.mark.parametrize("name", DOCS)
def test_python_of_the_documents_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", DOCS[name]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_commands_exist_with_the_options_shown() -> None:
    shown = [line for block in SHELL for line in block.splitlines() if line.startswith("evenbits ")]
    assert {line.split()[1] for line in shown} >= {"demo", "quantize"}
    for line in shown:
        words = line.partition("#")[0].split()
        usage = subprocess.run(
            [sys.executable, "-m", "evenbits", words[1], "--help"], capture_output=True, text=True, check=True
        ).stdout
        for option in (word for word in words if word.startswith("-")):
            assert option in usage, f"{line}: {option} is not an option of {words[1]}"


def test_first_screen() -> None:
    top = "\n".join(README.splitlines()[:30])
    for needed in ("evenbits makes", "| model", "pip install evenbits", "evenbits demo", "make demo", "make test"):
        assert needed in top


def test_every_linked_file_exists() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
