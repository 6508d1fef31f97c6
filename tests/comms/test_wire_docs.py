"""The example of docs/wire.md runs as it stands, under torchrun."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "wire.md").read_text(encoding="utf-8"), re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SHOW": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "int4:g64" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "figures-1.jsonl").read_text().splitlines()]
    assert {(line["edge"], line["direction"]) for line in lines} == {(1, "forward"), (0, "backward")}
