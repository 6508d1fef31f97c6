"""evenbits: neural networks on few, evenly used bits, on weights, on activations and on the wire, with proof of the
cost.

Public names are imported when first used, so that `import evenbits` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evenbits._version import __version__
from evenbits.errors import EvenbitsError

if TYPE_CHECKING:
    from evenbits.algorithms import ALGORITHMS
    from evenbits.checkpoints.native import load, save
    from evenbits.evaluation.tasks import evaluate
    from evenbits.numerics.encode import encode
    from evenbits.numerics.format import Format
    from evenbits.numerics.qtensor import QTensor
    from evenbits.pipeline.quantize import quantize
    from evenbits.pipeline.result import Result
    from evenbits.pipeline.sweep import sweep
    from evenbits.schemes.scheme import Scheme

_LAZY = {
    "ALGORITHMS": "evenbits.algorithms",
    "Format": "evenbits.numerics.format",
    "QTensor": "evenbits.numerics.qtensor",
    "Result": "evenbits.pipeline.result",
    "Scheme": "evenbits.schemes.scheme",
    "encode": "evenbits.numerics.encode",
    "evaluate": "evenbits.evaluation.tasks",
    "load": "evenbits.checkpoints.native",
    "quantize": "evenbits.pipeline.quantize",
    "save": "evenbits.checkpoints.native",
    "sweep": "evenbits.pipeline.sweep",
}

__all__ = [
    "ALGORITHMS",
    "EvenbitsError",
    "Format",
    "QTensor",
    "Result",
    "Scheme",
    "__version__",
    "encode",
    "evaluate",
    "load",
    "quantize",
    "save",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'evenbits' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
