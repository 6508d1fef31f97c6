"""One family of errors; unknown names come with the nearest known one."""

from __future__ import annotations

import pytest

from evenbits.errors import CheckpointError, EvenbitsError, MissingExtraError, unknown_name


def test_one_family_that_is_also_a_value_error() -> None:
    assert issubclass(EvenbitsError, ValueError)
    assert issubclass(CheckpointError, EvenbitsError)
    assert issubclass(MissingExtraError, EvenbitsError)


def test_a_missing_extra_says_what_to_run() -> None:
    error = MissingExtraError("matplotlib", "report", "drawing the report")
    message = "drawing the report needs the package 'matplotlib', which is not installed; run: pip install "
    assert str(error) == message + "'evenbits[report]'"


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("wieghts", "weights"),
        ("WEIGHTS", "weights"),
        ("dynamc", "dynamic"),
        ("w8a9", "W8A8"),
        ("zzz", None),
        ("", None),
    ],
)
def test_nearest_name(given: str, near: str | None) -> None:
    error = unknown_name("key", given, ["weights", "dynamic", "W8A8"])
    hint = f" Did you mean {near!r}?" if near else ""
    assert str(error) == f"unknown key {given!r}.{hint} Allowed: W8A8, dynamic, weights."
    assert type(error) is EvenbitsError


def test_names_may_come_from_any_iterable_and_may_be_none() -> None:
    assert "Did you mean 'b1'?" in str(unknown_name("backend", "b2", (name for name in ("a", "b1"))))
    assert str(unknown_name("backend", "b2", {})).startswith("unknown backend 'b2'. Allowed: ")
