"""From a model's name to a checkpoint: open, calibrate, quantize, write, read back, compare. For the command line."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from evenbits.checkpoints import native
from evenbits.checkpoints.describe import describe
from evenbits.checkpoints.files import check_output
from evenbits.checkpoints.sources import Source, is_python, open_model
from evenbits.errors import EvenbitsError
from evenbits.pipeline.batches import Batches
from evenbits.pipeline.calibration import Calibration
from evenbits.pipeline.calibration import calibration as open_calibration
from evenbits.pipeline.methods import Methods, default_method
from evenbits.pipeline.quantize import quantize
from evenbits.pipeline.result import Result
from evenbits.schemes.scheme import Scheme, resolve


@dataclass(frozen=True)
class Run:
    """A finished run: the result, where it was written, and what it takes on disk."""

    result: Result
    path: Path
    calibration: str
    compared: str
    weight_bytes_on_disk: int
    file_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The result's keys, with the output's."""
        return {
            **self.result.to_json(),
            "output": str(self.path),
            "calibration": self.calibration,
            "compared": self.compared,
            "weight_bytes_on_disk": self.weight_bytes_on_disk,
            "file_bytes": self.file_bytes,
        }


def quantize_to_folder(
    model: str,
    output: Path | None,
    *,
    scheme: str,
    method: str | None,
    options: dict[str, Any],
    calibration: str | None,
    samples: int,
    length: int,
    batch_size: int,
    ignore: tuple[str, ...],
    head: bool = False,
    dtype: str,
    overwrite: bool,
    probe: bool = False,
    only_faster: bool = False,
    say: Callable[[str], None],
) -> Run:
    """Quantizes what `model` names and writes it to `output` (default: ./NAME-SCHEME). `say` receives progress lines.

    The checkpoint is read back into a fresh model before it gets its name; the tensors and the outputs on a calibration
    batch must be equal bit for bit. Raises EvenbitsError, with nothing written, for whatever goes wrong.
    """
    resolved = resolve(scheme).with_head() if head else resolve(scheme)
    resolved = replace(resolved, ignore=(*resolved.ignore, *ignore))
    method = default_method(resolved) if method is None else method
    methods = Methods.parse(method, options, resolved)
    path = output if output is not None else _default_output(model, scheme)
    check_output(path, overwrite=overwrite)
    source = open_model(model, dtype=dtype)
    if source.quantized:
        raise EvenbitsError(f"{model} is quantized already; quantize the float model it came from.")
    opened = _calibration(source, resolved, methods, calibration, samples, length, batch_size)
    if opened is None:
        say("No calibration data: weights are rounded, nothing is measured.")
    elif opened.builtin:
        say(f"Calibrating on {opened.description}. For your own data: --calibration FILE.")
    else:
        say(f"Calibrating on {opened.description}.")
    first, batches = (None, None) if opened is None else _peek(opened.batches)
    asked = {"probe": probe, "only_faster": only_faster}
    result = quantize(source.model, scheme=resolved, method=method, data=batches, progress=True, **asked, **options)
    check = _Verify(source.model, model if is_python(model) else None, first)
    native.save(source.model, path, tokenizer=source.tokenizer, result=result, overwrite=overwrite, verify=check)
    found = describe(path)
    described = "none" if opened is None else opened.description
    return Run(result, path, described, check.compared, found["weight_bytes"], found["file_bytes"])


def _default_output(model: str, scheme: str) -> Path:
    stem = model.rpartition(":")[2] if is_python(model) else Path(model).name or Path(model).resolve().name
    return Path(f"{stem}-{Path(scheme).stem}")


def _calibration(
    source: Source,
    scheme: Scheme,
    methods: Methods,
    spec: str | None,
    samples: int,
    length: int,
    batch_size: int,
) -> Calibration | None:
    static = any(formats.static for formats in scheme.formats)
    if spec is None and source.tokenizer is None and methods.balance is None and not static:
        return None
    return open_calibration(spec, source.model, source.tokenizer, samples=samples, length=length, batch_size=batch_size)


def _peek(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and the batches with it still in front."""
    if hasattr(batches, "__len__"):
        return next(iter(batches), None), batches
    iterator = iter(batches)
    first = next(iterator, None)
    return first, itertools.chain([] if first is None else [first], iterator)


class _Verify:
    """Reads a checkpoint back into a fresh model and compares it with the one in memory."""

    def __init__(self, model: nn.Module, factory: str | None, batch: Any) -> None:
        self._model, self._factory, self._batch = model, factory, batch
        self.compared = ""

    def __call__(self, folder: Path) -> None:
        fresh = native.load(folder, None if self._factory is None else open_model(self._factory).model)
        expected, loaded = self._model.state_dict(), fresh.state_dict()
        for name, tensor in expected.items():
            if name not in loaded or loaded[name].dtype != tensor.dtype or not torch.equal(loaded[name], tensor):
                raise EvenbitsError(f"tensor {name!r} differs after reading {folder.name} back; nothing was written.")
        self.compared = f"{len(expected)} tensors"
        if self._batch is None:
            return
        self._model.eval()
        ours = _outputs(self._model, self._batch)
        theirs = _outputs(fresh, self._batch)
        if len(ours) != len(theirs) or not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            raise EvenbitsError("the reloaded model's output differs from the model in memory; nothing was written.")
        self.compared += " and the output of a calibration batch"


def _outputs(model: nn.Module, batch: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(Batches(model, [batch], progress=False).run(batch))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
