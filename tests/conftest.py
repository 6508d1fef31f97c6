"""Shared fixtures. Tests marked `data` need real models and data sets: EVENBITS_TEST_DATA names their folder.

Without it they do not run, and the last line of the run says how many did not, so that nobody takes the run for whole.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("evenbits", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("evenbits")

_NOT_RUN: list[str] = []


def _data_folder() -> Path | None:
    named = os.environ.get("EVENBITS_TEST_DATA")
    return Path(named) if named else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _data_folder() is not None:
        return
    if os.environ.get("CI"):
        raise pytest.UsageError("EVENBITS_TEST_DATA is not set: in CI the data tests must run.")
    kept = [item for item in items if item.get_closest_marker("data") is None]
    dropped = [item for item in items if item.get_closest_marker("data") is not None]
    _NOT_RUN.extend(item.nodeid for item in dropped)
    items[:] = kept
    if dropped:
        config.hook.pytest_deselected(items=dropped)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _NOT_RUN:
        terminalreporter.write_line("")
        terminalreporter.write_line(
            f"WARNING: {len(_NOT_RUN)} tests on real models and data DID NOT RUN: EVENBITS_TEST_DATA is not set.",
            red=True,
            bold=True,
        )


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real models and data sets."""
    folder = _data_folder()
    if folder is None or not folder.is_dir():
        raise pytest.UsageError(f"EVENBITS_TEST_DATA must name an existing folder; it is {folder}.")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
