"""The bench of a sweep: a fresh float model for every point, one set of calibration batches, one set of samples.

Each process opens its own. What it opened has an identity of hashes; two benches of one sweep must have the same, and
so must the bench of a sweep that is continued.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenbits._version import __version__
from evenbits.checkpoints.files import sha256
from evenbits.checkpoints.sources import Source, is_python, load_object, open_model
from evenbits.data.arrays import ARRAY_SUFFIXES, read_arrays
from evenbits.data.text import read_text
from evenbits.errors import EvenbitsError
from evenbits.evaluation.result import finite
from evenbits.evaluation.tasks import evaluate, task_function
from evenbits.nn.base import QuantizedLayer
from evenbits.pipeline.calibration import calibration
from evenbits.pipeline.points import Point
from evenbits.pipeline.quantize import quantize
from evenbits.pipeline.result import Result
from evenbits.schemes.scheme import Scheme


@dataclass(frozen=True)
class Experiment:
    """Everything but the points: what to open, how to quantize, how to score. Plain data where the model is named by a
    string, so that it can be sent to another process."""

    model: Any
    task: str
    data: Any
    scheme: Scheme
    method: str
    options: Mapping[str, Any]
    calibration: Any = None
    samples: int = 128
    length: int = 128
    batch_size: int = 8
    dtype: str = "float32"
    tokenizer: Any = None
    separator: str | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)


class Bench:
    """An opened experiment. Raises EvenbitsError for what cannot be opened; `identity`: name → hash or words."""

    def __init__(self, experiment: Experiment) -> None:
        task_function(experiment.task)  # an unknown task is refused before a model is loaded
        self._experiment = experiment
        source = self._fresh()
        quantized = source.quantized or any(isinstance(module, QuantizedLayer) for module in source.model.modules())
        if quantized:
            raise EvenbitsError("the model is quantized already; sweep the float model it came from.")
        self._weights = weights_hash(source.model)
        self.data = _evaluation_data(experiment)
        self._batches, self.calibrated_on = _calibration(experiment, source)
        self.identity = self._identity(source)

    def run(self, point: Point) -> dict[str, Any]:
        """Makes and scores one point. Returns plain data: the evaluation with its items, and what quantizing said."""
        experiment, start = self._experiment, time.perf_counter()
        source = self._fresh()
        if weights_hash(source.model) != self._weights:
            raise EvenbitsError(
                "the model source gave other weights than the first time; it must give the same each time (fix the "
                "seed in the factory)."
            )
        result = None
        if point.method is not None:
            result = quantize(
                source.model,
                scheme=experiment.scheme,
                method=point.method,
                data=self._batches,
                **point.options,
            )
        middle = time.perf_counter()
        scored = evaluate(
            source.model,
            task=experiment.task,
            data=self.data,
            tokenizer=source.tokenizer,
            **{"progress": False, **experiment.evaluation},
        )
        seconds = {"quantize": middle - start, "evaluate": time.perf_counter() - middle}
        made = {"name": point.name, "alpha": point.alpha, "method": point.method, "seconds": seconds}
        return {**made, "evaluation": {**scored.to_json(), "items": finite(scored.items)}, **_told(result)}

    def _fresh(self) -> Source:
        experiment = self._experiment
        if isinstance(experiment.model, (str, os.PathLike)):
            source = open_model(str(experiment.model), dtype=experiment.dtype)
            return replace(source, tokenizer=experiment.tokenizer or source.tokenizer)
        model = experiment.model
        model = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
        if not isinstance(model, nn.Module):
            raise EvenbitsError(f"the factory gave a {type(model).__name__}; it must give a torch.nn.Module.")
        return Source(model.eval(), experiment.tokenizer, False)

    def _identity(self, source: Source) -> dict[str, str]:
        experiment = self._experiment
        scored = {"task": experiment.task, "options": dict(experiment.evaluation), "separator": experiment.separator}
        return {
            "model": _model_name(experiment.model, source.model),
            "weights": self._weights,
            "tokenizer": _tokenizer_hash(source.tokenizer),
            "scheme": json.dumps(experiment.scheme.to_json(), sort_keys=True),
            "method": json.dumps([experiment.method, dict(experiment.options)], sort_keys=True, default=str),
            "calibration data": values_hash(self._batches),
            "evaluation data": sha256(Path(self.data)) if isinstance(self.data, str) else values_hash(self.data),
            "evaluation": json.dumps(scored, sort_keys=True, default=str),
            "evenbits version": __version__,
            "torch version": str(torch.__version__),
        }


def _told(result: Result | None) -> dict[str, Any]:
    """What of a quantization a sweep keeps."""
    if result is None:
        return {"regions": {}, "region_alphas": {}, "mean_output_sqnr_db": None, "weight_bytes": None, "notes": []}
    statuses = [region.status for region in result.regions]
    found = [row.output_sqnr_db for row in result.quantized if row.output_sqnr_db is not None]
    ratios = [value for value in found if abs(value) != float("inf")]
    return {
        "regions": {status: statuses.count(status) for status in sorted(set(statuses))},
        "region_alphas": {region.name: region.alpha for region in result.regions},
        "mean_output_sqnr_db": sum(ratios) / len(ratios) if ratios else None,
        "weight_bytes": result.weight_bytes,
        "notes": list(result.notes),
    }


def _calibration(experiment: Experiment, source: Source) -> tuple[list[Any], str]:
    """The batches, all of them in memory: every point sees the same."""
    given = experiment.calibration
    if given is not None and not isinstance(given, (str, os.PathLike)):
        batches = list(_walkable(given, "calibration"))
        return batches, f"{len(batches)} batches"
    opened = calibration(
        None if given is None else str(given),
        source.model,
        source.tokenizer,
        samples=experiment.samples,
        length=experiment.length,
        batch_size=experiment.batch_size,
    )
    return list(opened.batches), opened.description


def _evaluation_data(experiment: Experiment) -> Any:
    """The samples to score, read once: a path stays a path only where the task reads text or tables from it."""
    given = experiment.data
    if isinstance(given, (str, os.PathLike)):
        given = str(given)
        if is_python(given):
            made = load_object(given)
            return list(_walkable(made() if callable(made) else made, "data"))
        if Path(given).suffix in ARRAY_SUFFIXES:
            return read_arrays(given)
        if not Path(given).is_file():
            raise EvenbitsError(f"the evaluation data {given} is not a file.")
        return given if experiment.separator is None else read_text(given, separator=experiment.separator)
    return list(given) if isinstance(given, Iterable) and not isinstance(given, torch.Tensor) else given


def _walkable(made: Any, what: str) -> Iterable[Any]:
    if isinstance(made, (str, bytes, Mapping, torch.Tensor)) or not isinstance(made, Iterable):
        raise EvenbitsError(f"{what} must be an iterable of batches; given a {type(made).__name__}.")
    return made


def _model_name(given: Any, model: nn.Module) -> str:
    """The source without its folder, the file's hash where code makes the model, and the module's own words."""
    words = hashlib.sha256(repr(model).encode()).hexdigest()[:16]
    if isinstance(given, (str, os.PathLike)):
        spec = str(given)
        code = sha256(Path(spec.rpartition(":")[0])) if is_python(spec) else ""
        return " ".join([Path(spec).name, code, words])
    return f"{type(model).__qualname__} {words}"


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(name.encode())
        _add(digest, tensor)
    return digest.hexdigest()


def values_hash(values: Any) -> str:
    """SHA-256 of nested data: every tensor's bytes, everything else by its words."""
    digest = hashlib.sha256()
    _walk(digest, values)
    return digest.hexdigest()


def _walk(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        _add(digest, value)
    elif is_dataclass(value) and not isinstance(value, type):
        _walk(digest, vars(value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(f"{key}=".encode())
            _walk(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)}:".encode())
        for item in value:
            _walk(digest, item)
    else:
        digest.update(f"{value!r};".encode())


def _add(digest: Any, tensor: torch.Tensor) -> None:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(plain.view(torch.uint8).numpy())


def _tokenizer_hash(tokenizer: Any) -> str:
    if tokenizer is None:
        return "none"
    words = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
    return hashlib.sha256(repr((type(tokenizer).__qualname__, words)).encode()).hexdigest()
