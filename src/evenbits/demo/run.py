"""`evenbits demo`: float → naive INT8 → SmoothQuant INT8 → saved → loaded → text, on the built-in models.

Small models grow no outlier channels, so a few are planted first, without changing what the model computes: three
channels of each norm are multiplied by 64 and the columns that read them divided by 64. Powers of two make that exact.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenbits.checkpoints.files import check_output
from evenbits.checkpoints.native import load, save
from evenbits.data.arrays import Arrays
from evenbits.demo import model as built_in
from evenbits.errors import EvenbitsError
from evenbits.evaluation.classification import classification
from evenbits.evaluation.perplexity import perplexity
from evenbits.observers.calibrate import channel_ranges
from evenbits.pipeline.quantize import quantize
from evenbits.pipeline.result import Result
from evenbits.reporting.svg import channel_ranges as channel_ranges_svg

_CONTEXT = 256
_PICTURED = "layers.0.attention.q_proj"
_PROMPT = b"The return statement "
_TIMED_ROUNDS = 15


@dataclass(frozen=True)
class Row:
    """One language model of the table. milliseconds: one forward of 256 bytes, minimum of 15, models taking turns."""

    name: str
    perplexity: float
    bits_per_weight: float
    weight_bytes: int
    milliseconds: float


@dataclass(frozen=True)
class DigitRow:
    """One convolutional network of the table."""

    name: str
    accuracy: float
    bits_per_weight: float
    weight_bytes: int


@dataclass(frozen=True)
class Demo:
    """Everything the demo found and wrote."""

    rows: tuple[Row, ...]
    digits: tuple[DigitRow, ...]
    planted: tuple[str, ...]
    checkpoint: str
    picture: str
    prompt: str
    text: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_demo(output: Path) -> Demo:
    """Runs the demo and writes OUTPUT/checkpoint and OUTPUT/channel-ranges.svg.

    Raises EvenbitsError if the folder cannot be written or the reloaded model is not the one that was saved.
    """
    start = time.perf_counter()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvenbitsError(f"the demo's folder cannot be made: {error}") from error
    check_output(output / "checkpoint", overwrite=True)
    planted = built_in.plant_outliers(built_in.load_byte_lm())
    batches = _calibration_batches()
    models: dict[str, nn.Module] = {"float": _planted_model()}
    results: dict[str, Result] = {}
    for name, scheme, method in (
        ("w8a8_naive", "W8A8_STATIC", "rtn"),
        ("w8a8_smoothquant", "W8A8_STATIC", "smoothquant"),
        ("w8a8_dynamic", "W8A8", "smoothquant"),
    ):
        models[name] = _planted_model()
        results[name] = quantize(models[name], scheme=scheme, method=method, data=batches)
    checkpoint = save(
        models["w8a8_smoothquant"], output / "checkpoint", result=results["w8a8_smoothquant"], overwrite=True
    )
    reloaded = load(checkpoint, built_in.ByteLM())
    _check_equal(models["w8a8_smoothquant"], reloaded, batches[0])
    picture = output / "channel-ranges.svg"
    picture.write_text(_picture(models["float"], models["w8a8_smoothquant"], batches), encoding="utf-8")
    times = _milliseconds(models)
    text = (
        built_in.generate(reloaded, _PROMPT, 200, temperature=0.6, seed=2)
        if isinstance(reloaded, built_in.ByteLM)
        else b""
    )
    return Demo(
        rows=tuple(_row(name, model, results.get(name), times[name]) for name, model in models.items()),
        digits=_digits(),
        planted=tuple(planted),
        checkpoint=str(checkpoint),
        picture=str(picture),
        prompt=_PROMPT.decode(),
        text=text.decode("utf-8", errors="replace"),
        seconds=time.perf_counter() - start,
    )


def _planted_model() -> built_in.ByteLM:
    model = built_in.load_byte_lm()
    built_in.plant_outliers(model)
    return model


def _ids(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def _calibration_batches() -> list[torch.Tensor]:
    ids_T = _ids(built_in.calibration_text())
    blocks_BT = ids_T[: len(ids_T) // _CONTEXT * _CONTEXT].view(-1, _CONTEXT)
    return list(blocks_BT.split(8))


def _check_equal(model: nn.Module, reloaded: nn.Module, batch: torch.Tensor) -> None:
    with torch.inference_mode():
        if not torch.equal(model(batch), reloaded(batch)):
            raise EvenbitsError("the reloaded model differs from the one that was saved; the disk may be faulty.")


def _row(name: str, model: nn.Module, result: Result | None, milliseconds: float) -> Row:
    scored = perplexity(model, [_ids(built_in.evaluation_text())], context=_CONTEXT, truncate=False, progress=False)
    bits, nbytes = _weights(model, result)
    return Row(name, scored.metrics["perplexity"], bits, nbytes, milliseconds)


def _weights(model: nn.Module, result: Result | None) -> tuple[float, int]:
    """True bits per weight and bytes of the layers that are (in a float model: would be) quantized."""
    if result is not None:
        return 32 * result.weight_bytes / result.float_weight_bytes, result.weight_bytes
    layers = [m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n != "lm_head"]
    return 32.0, sum(layer.weight.nbytes for layer in layers)


def _milliseconds(models: dict[str, nn.Module]) -> dict[str, float]:
    ids = _ids(built_in.evaluation_text())[:_CONTEXT].unsqueeze(0)
    best = dict.fromkeys(models, float("inf"))
    with torch.inference_mode():
        for turn in range(_TIMED_ROUNDS + 2):
            for name, model in models.items():
                start = time.perf_counter()
                model(ids)
                elapsed = 1000 * (time.perf_counter() - start)
                best[name] = best[name] if turn < 2 else min(best[name], elapsed)
    return best


def _picture(before: nn.Module, after: nn.Module, batches: Sequence[torch.Tensor]) -> str:
    panels = []
    for heading, model in (("before", before), ("after SmoothQuant", after)):
        panels.append((f"{heading}: what q, k and v of the first block read", _absmax(model, batches)))
    return channel_ranges_svg(panels, title="Largest value of each channel, max |x| over the calibration text")


def _absmax(model: nn.Module, batches: Sequence[torch.Tensor]) -> list[float]:
    def run_all() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    ranges = channel_ranges(model, {_PICTURED: -1}, run_all)
    values: list[float] = ranges[_PICTURED].absmax.tolist()
    return values


def _digits() -> tuple[DigitRow, ...]:
    """The convolutional network in float and in W8A8 (batch norms stay as they are; convolutions run in integers)."""
    images, labels = built_in.evaluation_digits()
    calibration = list(built_in.calibration_digits()[0].split(64))
    rows = []
    for name, scheme in (("float", None), ("w8a8_static", "W8A8_STATIC"), ("w8a8_dynamic", "W8A8")):
        model = built_in.load_digit_net()
        result = None if scheme is None else quantize(model, scheme=scheme, method="rtn", data=calibration)
        scored = classification(model, Arrays(images, labels), progress=False)
        rows.append(DigitRow(name, scored.metrics["accuracy"], *_weights(model, result)))
    return tuple(rows)


__all__ = ["Demo", "DigitRow", "Row", "run_demo"]
