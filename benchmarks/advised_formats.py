"""The tables of docs/advisor.md: what the advisor says of a real model, and what its advice is worth.

    python benchmarks/advised_formats.py --data DIR [--case NAME …] [--json]

For each case the model is advised, then quantized with every candidate everywhere and with the advised mix, and scored.
DIR holds the models and data sets that the tests use (EVENBITS_TEST_DATA by default). Differences, to float and to the
mix, are paired: accuracy on the same sentences; loss in nats per token, its error over documents.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from machine import fingerprint

from evenbits.checkpoints.sources import open_model
from evenbits.evaluation.paired import paired
from evenbits.evaluation.result import Evaluation
from evenbits.evaluation.tasks import evaluate
from evenbits.pipeline.advice import Advice
from evenbits.pipeline.advise import advise
from evenbits.pipeline.calibration import calibration
from evenbits.pipeline.quantize import quantize

INTEGER_PRODUCTS = ("int4:row:7.5:mse", "ovp4-i8:row")  # with int8 inputs
INTEGERS = ("int4:g*:7.5:mse", "ovp4:g*")


@dataclass(frozen=True)
class Case:
    """A model, what it is advised for, and how it is scored. Names are below the data folder."""

    model: str
    calibration: str | None
    task: str
    evaluation: str
    activations: str | None = None
    bits: float = 4.25
    candidates: tuple[str, ...] | None = None
    options: tuple[tuple[str, int], ...] = ()


def _sst2(**given: Any) -> Case:
    return Case("minilm_glue/sst2", "sst2/train.tsv", "classification", "sst2/dev.tsv", **given)


def _stories(**given: Any) -> Case:
    options = (("max_documents", 100),)
    return Case("stories260k_llama", None, "perplexity", "caltext/tiny.utf8", options=options, **given)


CASES = {
    "sst2-w4a16": _sst2(),
    "sst2-w4a8": _sst2(activations="int8:row"),
    "sst2-w4a8-integer-products": _sst2(activations="int8:row", candidates=INTEGER_PRODUCTS),
    "sst2-w4a16-integers-4.125": _sst2(bits=4.125, candidates=INTEGERS),
    "stories-w4a16": _stories(),
    "stories-w4a16-integers": _stories(candidates=INTEGERS),
}


def run(case: Case, data: Path) -> dict[str, Any]:
    """The advice, and a row for float, the mix and every candidate everywhere."""
    advice = _advise(case, data)
    source = open_model(str(data / case.model))
    baseline = _score(case, source, data)
    rows: list[dict[str, Any]] = [{"name": "float", "bits": 32.0, **_metric(baseline)}]
    mix: Evaluation | None = None
    for total in advice.totals:
        row: dict[str, Any] = {"name": total.name, "bits": total.bits, "mean_error": total.mean_error}
        if total.bits is None:
            row["layers"] = total.layers
        else:
            source = open_model(str(data / case.model))
            scheme = advice.scheme(None if total.name == "advised" else total.name)
            batches = _batches(case, source, data)
            result = quantize(source.model, scheme=scheme, method=advice.method, data=batches)
            row |= {"bits": 32 * result.weight_bytes / result.float_weight_bytes}
            scored = _score(case, source, data)
            row |= _metric(scored) | {"float": _difference(baseline, scored)}
            row |= {} if mix is None else {"mix": _difference(mix, scored)}
            mix = mix or scored
        rows.append(row)
    chosen = Counter(layer.chosen.candidate for layer in advice.advised if layer.chosen)
    return {"chosen": dict(chosen.most_common()), "seconds": round(advice.seconds, 1), "rows": rows}


def _batches(case: Case, source: Any, data: Path) -> Any:
    given = None if case.calibration is None else str(data / case.calibration)
    return calibration(given, source.model, source.tokenizer).batches


def _advise(case: Case, data: Path) -> Advice:
    source = open_model(str(data / case.model))
    return advise(
        source.model,
        bits=case.bits,
        activations=case.activations,
        candidates=case.candidates,
        data=_batches(case, source, data),
    )


def _score(case: Case, source: Any, data: Path) -> Evaluation:
    options: dict[str, Any] = dict(case.options)
    return evaluate(
        source.model, task=case.task, data=str(data / case.evaluation), tokenizer=source.tokenizer, **options
    )


def _metric(scored: Evaluation) -> dict[str, Any]:
    metric, value = next(iter(scored.metrics.items()))
    return {"metric": metric, "value": value, "n": scored.n}


def _difference(first: Evaluation, second: Evaluation) -> dict[str, float]:
    """The second's figure minus the first's, and the standard error of that."""
    if "accuracy" in first.metrics:
        found = paired(first.items, second.items)
        return {"mean": found.difference, "error": found.standard_error, "p": found.p}
    pairs = [(theirs[0] - ours[0], ours[1]) for ours, theirs in zip(first.items, second.items, strict=True)]
    tokens = sum(count for _, count in pairs)
    mean = sum(loss for loss, _ in pairs) / tokens
    return {"mean": mean, "error": sqrt(sum((loss - mean * count) ** 2 for loss, count in pairs)) / tokens}


def show(name: str, found: dict[str, Any]) -> None:
    """A case as a Markdown table."""
    first = found["rows"][0]
    chosen = ", ".join(f"{count} × `{candidate}`" for candidate, count in found["chosen"].items())
    print(f"\n### {name}, n = {first['n']:,}\n\nAdvised in {found['seconds']} s: {chosen}.\n")
    print(f"| weights | true bits | mean output error | {first['metric']} | against float | against the mix |")
    print("|---|---|---|---|---|---|")
    for row in found["rows"]:
        keys = (("bits", ".3f"), ("mean_error", ".5f"), ("value", ".4f"))
        cells = [format(row[key], spec) if row.get(key) is not None else "" for key, spec in keys]
        print(f"| {row['name']} | {' | '.join(cells)} | {_cell(row.get('float'))} | {_cell(row.get('mix'))} |")


def _cell(difference: dict[str, float] | None) -> str:
    if difference is None:
        return ""
    p = f", p = {difference['p']:.2f}" if "p" in difference else ""
    return f"{difference['mean']:+.4f} ± {difference['error']:.4f}{p}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("EVENBITS_TEST_DATA"))
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.data is None:
        raise SystemExit("--data names the folder of models and data sets (or set EVENBITS_TEST_DATA).")
    print(json.dumps(fingerprint()))
    for name in given.case or CASES:
        found = run(CASES[name], Path(given.data))
        if given.json:
            print(json.dumps({"case": name, **found}), flush=True)
        else:
            show(name, found)


if __name__ == "__main__":
    main()
