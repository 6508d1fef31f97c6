"""The errors a user can meet. Every message says what was given, what is allowed and what to do.

EvenbitsError(ValueError)      anything the caller can mend: input, options, files, the machine's limits
├── CheckpointError            a folder that is not, or is no longer, what evenbits wrote
└── MissingExtraError          an optional package is not installed; names the extra
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EvenbitsError(ValueError):
    """Base of every error evenbits raises for something the caller can mend."""


class CheckpointError(EvenbitsError):
    """A checkpoint that is missing a part, was altered, or was written by something else."""


class MissingExtraError(EvenbitsError):
    """An optional package is needed and absent."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; run: pip install 'evenbits[{extra}]'"
        )


def unknown_name(kind: str, given: str, allowed: Iterable[str]) -> EvenbitsError:
    """The error for a name that is not in a table, with the nearest allowed one."""
    names = sorted(allowed)
    by_lower = {name.lower(): name for name in names}  # "w8a9" is near "W8A8"
    near = difflib.get_close_matches(given.lower(), by_lower, n=1, cutoff=0.5)
    hint = f" Did you mean {by_lower[near[0]]!r}?" if near else ""
    return EvenbitsError(f"unknown {kind} {given!r}.{hint} Allowed: {', '.join(names)}.")
