"""The integer operations of the library: declared once (ops.py), exact in every backend.

`report()` says which backend serves this machine and why; `use_backend` forces one (tests, comparisons).
"""

from evenbits.kernels.dispatch import report, use_backend

__all__ = ["report", "use_backend"]
