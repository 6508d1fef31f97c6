"""The command line is a promise: commands, options and defaults, word for word. A change here is a change for users."""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import Any

import pytest
from typer.main import get_command

from evenbits.cli import app

# command → {option names or ARGUMENT: (default, takes a value)}
FROZEN: dict[str, dict[str, tuple[Any, bool]]] = {
    "quantize": {
        "MODEL": ("required", True),
        "--output/-o": (None, True),
        "--scheme": ("W8A8", True),
        "--method": (None, True),  # by the scheme: smoothquant for W8A8
        "--alpha": (None, True),
        "--criterion": (None, True),
        "--scope": (None, True),
        "--sequential": (False, False),
        "--bias-correction": (False, False),
        "--policy": (None, True),
        "--calibration": (None, True),
        "--samples": (128, True),
        "--sequence-length": (128, True),
        "--batch-size": (8, True),
        "--ignore": (None, True),
        "--head": (False, False),
        "--dtype": ("float32", True),
        "--probe": (False, False),
        "--only-faster": (False, False),
        "--overwrite": (False, False),
        "--detach": (None, True),
        "--json": (False, False),
    },
    "advise": {
        "MODEL": ("required", True),
        "--output/-o": (None, True),
        "--bits": ("4.25", True),
        "--activations": (None, True),
        "--candidate": (None, True),
        "--margin": ("0.1", True),
        "--calibration": (None, True),
        "--samples": (128, True),
        "--sequence-length": (128, True),
        "--batch-size": (8, True),
        "--ignore": (None, True),
        "--dtype": ("float32", True),
        "--overwrite": (False, False),
        "--detach": (None, True),
        "--json": (False, False),
    },
    "evaluate": {
        "MODEL": ("required", True),
        "--task": ("required", True),
        "--data": ("required", True),
        "--model": (None, True),
        "--separator": (None, True),
        "--max-documents": (None, True),
        "--context": (None, True),
        "--stride": (None, True),
        "--batch-size": (None, True),
        "--max-length": (None, True),
        "--dtype": ("float32", True),
        "--fuse": (False, False),
        "--calibration": (None, True),
        "--detach": (None, True),
        "--json": (False, False),
    },
    "bench": {
        "MODEL": ("required", True),
        "--against": (None, True),
        "--model": (None, True),
        "--data/--calibration": (None, True),
        "--tokens": (None, True),
        "--image": (None, True),
        "--batch": ("1", True),
        "--threads": ("1", True),
        "--seconds": ("10.0", True),
        "--device": ("cpu", True),
        "--fuse/--no-fuse": (True, False),
        "--peers/--no-peers": (True, False),
        "--memory/--no-memory": (True, False),
        "--detach": (None, True),
        "--json": (False, False),
    },
    "inspect": {"PATH": ("required", True), "--json": (False, False)},
    "monitor": {
        "COMMAND": (None, True),
        "--pid": (None, True),
        "--interval": ("1.0", True),
        "--output/-o": ("evenbits-monitor", True),
        "--detach": (False, False),
    },
    "table": {
        "RECIPE": ("required", True),
        "--data": (".", True),
        "--model": (None, True),
        "--detach": (None, True),
        "--json": (False, False),
    },
    "sweep": {
        "MODEL": ("required", True),
        "--task": ("required", True),
        "--data": ("required", True),
        "--alpha": ("0.05:0.95:0.05", True),
        "--output/-o": (None, True),
        "--scheme": ("W8A8", True),
        "--method": ("smoothquant", True),
        "--criterion": (None, True),
        "--scope": (None, True),
        "--sequential": (False, False),
        "--bias-correction": (False, False),
        "--policy": (None, True),
        "--auto/--no-auto": (True, False),
        "--calibration": (None, True),
        "--samples": (128, True),
        "--sequence-length": (128, True),
        "--batch-size": (8, True),
        "--ignore": (None, True),
        "--dtype": ("float32", True),
        "--separator": (None, True),
        "--max-documents": (None, True),
        "--context": (None, True),
        "--stride": (None, True),
        "--evaluation-batch-size": (None, True),
        "--max-length": (None, True),
        "--jobs": (1, True),
        "--restart": (False, False),
        "--plot": (None, True),
        "--detach": (None, True),
        "--json": (False, False),
    },
    "diagnose": {
        "MODEL": ("required", True),
        "--output/-o": ("required", True),
        "--scheme": ("W8A8", True),
        "--method": (None, True),
        "--alpha": (None, True),
        "--criterion": (None, True),
        "--scope": (None, True),
        "--sequential": (False, False),
        "--policy": (None, True),
        "--bias-correction": (False, False),
        "--calibration": (None, True),
        "--samples": (None, True),
        "--sequence-length": (128, True),
        "--batch-size": (8, True),
        "--ignore": (None, True),
        "--dtype": ("float32", True),
        "--layer": (None, True),
        "--task": (None, True),
        "--data": (None, True),
        "--sizes": (None, True),
        "--orders": (3, True),
        "--seed": (0, True),
        "--detach": (None, True),
        "--json": (False, False),
    },
    "demo": {"--output/-o": ("evenbits-demo", True), "--json": (False, False)},
    "comms": {},
    "comms plan": {
        "--link": ("required", True),
        "--shape": (None, True),
        "--codec": (None, True),
        "--latency": ("0.0", True),
        "--jitter": ("0.0", True),
        "--stages": (2, True),
        "--microbatches": (8, True),
        "--schedule": ("1f1b", True),
        "--compute": ("0.0", True),
        "--replicas": (1, True),
        "--parameters": (0, True),
        "--stragglers": ("0.0", True),
        "--slowdown": ("2.0", True),
        "--cores": (None, True),
        "--per-machine": (1, True),
        "--tensors": (1, True),
        "--feedback": (False, False),
        "--json": (False, False),
    },
    "comms watch": {
        "LOG": ("required", True),
        "--plot": (None, True),
        "--follow/--once": (True, False),
        "--interval": ("1.0", True),
        "--json": (False, False),
    },
}


def described(command: Any) -> dict[str, tuple[Any, bool]]:
    found = {}
    for parameter in command.params:
        if parameter.name == "help":
            continue
        argument = parameter.param_type_name == "argument"
        name = parameter.name.upper() if argument else "/".join([*parameter.opts, *parameter.secondary_opts])
        default = parameter.default() if callable(parameter.default) else parameter.default
        plain = default if default is None or isinstance(default, (bool, int, str)) else str(default)
        found[name] = ("required" if parameter.required else plain, not getattr(parameter, "is_flag", False))
    return found


def commands() -> dict[str, Any]:
    """Every command by its words: "quantize", "comms", "comms plan", …"""
    found: dict[str, Any] = {}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        found[name] = command
        found.update({f"{name} {inner}": it for inner, it in getattr(command, "commands", {}).items()})
    return found


def test_the_commands_are_these() -> None:
    assert list(commands()) == list(FROZEN)


@pytest.mark.parametrize("name", FROZEN)
def test_the_options_and_defaults_are_these(name: str) -> None:
    command = commands()[name]
    assert described(command) == FROZEN[name]
    assert command.get_short_help_str()
    assert all(getattr(p, "help", "") for p in command.params if p.name != "help")


def test_the_root_has_a_version_and_nothing_else() -> None:
    root = get_command(app)
    assert [parameter.opts for parameter in root.params] == [["--version"]]


def run(code: str) -> tuple[str, float]:
    """What a fresh interpreter prints, and the user and system time it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([*name.split(), "--help"] for name in FROZEN)], ids=" ".join
)
def test_help_is_quick_and_light(arguments: list[str]) -> None:
    """Under 0.8 s of processor time, best of three, and without torch or transformers."""
    code = (
        f"import sys; sys.argv = ['evenbits', *{arguments!r}]\n"
        "from evenbits.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    times = []
    for _ in range(3):
        out, seconds = run(code)
        assert out.strip()
        times.append(seconds)
        if seconds < 0.8:
            break
    assert min(times) < 0.8, times
