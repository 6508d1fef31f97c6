"""Does α matter on convolutional nets? Accuracy over α for three models under eight settings, on the same pictures.

    python benchmarks/vision.py prepare DIR
    python benchmarks/alpha_sweeps.py DIR [--model mobilenet_v2 …] [--setting W8A8 …] [--alpha 0.05:0.95:0.05]
    python benchmarks/alpha_sweeps.py DIR --model resnet20 --setting W8A6 --confirm

Calibration and the search for `auto` use 100 pictures, accuracy the others (vision.py). Every sweep is resumable: the
same command goes on where it was stopped. Prints one line per sweep and writes DIR/sweeps/MODEL-SETTING.json and .svg.

--confirm scores no smoothing, auto, 0.5 and the best α of the finished sweep once more on the 8000 test pictures of
CIFAR-10 that no sweep has seen: there the best α has no luck left.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import evenbits
from evenbits.reporting.sweep import difference, plot

# Those named -bias are run with --bias-correction.
SETTINGS: dict[str, dict[str, Any]] = {
    "W8A8": {"weights": "int8:row", "input_activations": "int8:tensor", "dynamic": False},
    "W8-tensor": {"weights": "int8:tensor", "input_activations": "int8:tensor", "dynamic": False},
    "W4A8": {"weights": "int4:row", "input_activations": "int8:tensor", "dynamic": False},
    "W8A6": {"weights": "int8:row", "input_activations": "int6:tensor", "dynamic": False},
    "planted": {"weights": "int8:row", "input_activations": "int8:tensor", "dynamic": False},
    "W4A8-bias": {"weights": "int4:row", "input_activations": "int8:tensor", "dynamic": False},
    "W4A8-mse": {"weights": "int4:row:mse", "input_activations": "int8:tensor", "dynamic": False},
    "W4A8-mse-bias": {"weights": "int4:row:mse", "input_activations": "int8:tensor", "dynamic": False},
}
_ARRAYS = {"mobilenet_v2": "imagenet", "resnet20": "cifar10", "resnet56": "cifar10"}
_HEADS = (
    "model", "setting", "pictures", "float", "none", "0.5", "auto", "best", "worst", "best − worst", "auto − best",
    "auto − picked elsewhere",
)  # fmt: skip


def run(folder: Path, model: str, setting: str, alpha: str, *, auto: bool = True, part: str = "evaluation") -> Any:
    """One sweep, also written as JSON and as a picture. part: which pictures are scored."""
    factory = f"vision.py:{model}{'_planted' if setting == 'planted' else ''}"
    state = folder / "sweeps" / f"{model}-{setting}{'' if part == 'evaluation' else f'-{part}'}"
    found = evenbits.sweep(
        str(Path(__file__).with_name(factory)),
        task="classification",
        data=folder / f"{_ARRAYS[model]}-{part}.npz",
        calibration=folder / f"{_ARRAYS[model]}-calibration.npz",
        samples=100,
        batch_size=20,
        alpha=alpha,
        scheme=SETTINGS[setting],
        **({"bias_correction": True} if setting.endswith("-bias") else {}),
        state=state,
        auto=auto,
        say=lambda line: print(f"  {line}", flush=True),
    )
    found = replace(found, model=factory, calibration=found.calibration.replace(str(folder), "DIR"))
    state.with_suffix(".json").write_text(json.dumps(found.to_json(), indent=1), encoding="utf-8")
    plot(found, state.with_suffix(".svg"))
    return found


def confirm(folder: Path, model: str, setting: str, *, auto: bool = True) -> Any:
    """The sweep of 0.5 and the best α on pictures that the finished sweep has not seen."""
    kept = folder / "sweeps" / f"{model}-{setting}.json"
    if not kept.is_file():
        raise SystemExit(f"{kept} is not there: run this sweep first, without --confirm.")
    best = json.loads(kept.read_text(encoding="utf-8"))["spread"]["best"]
    alphas = ",".join(dict.fromkeys(("0.5", best)))
    return run(folder, model, setting, alphas, auto=auto, part="confirmation")


def line(model: str, setting: str, found: Any) -> str:
    """A row of the table: scores in percent, and differences with one paired standard error, in points."""
    percent = lambda row: f"{100 * row.metric:.2f}"  # noqa: E731
    half = min(found.curve, key=lambda row: abs(row.alpha - 0.5))
    cells = [model, setting, str(found.n), *(percent(row) for row in (found.row("float"), found.row("none"), half))]
    cells.append(percent(found.row("auto")) if found.search else "")
    if found.spread is None or found.spread.best == found.spread.worst:
        cells += [f"all α: {percent(found.curve[0])}", "", ""]
    else:
        best, worst = found.row(found.spread.best), found.row(found.spread.worst)
        apart = difference(found, found.spread.comparison)
        cells += [f"{percent(best)} ({best.name})", f"{percent(worst)} ({worst.name})", apart]
    for compared in (found.search.against_best, found.search.against_picked) if found.search else (None, None):
        cells.append("" if compared is None else difference(found, compared))
    return "| " + " | ".join(cells).replace(" points", "") + " |"


def main() -> None:
    """Runs the sweeps that were asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", nargs="+", default=list(_ARRAYS), choices=list(_ARRAYS))
    parser.add_argument("--setting", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--alpha", default="0.05:0.95:0.05")
    parser.add_argument("--no-auto", action="store_true", help="leave the search out: on MobileNetV2 it takes longest")
    parser.add_argument("--confirm", action="store_true")
    given = parser.parse_args()
    if given.confirm and "mobilenet_v2" in given.model:
        parser.error("--confirm is for --model resnet20 resnet56: there are no further ImageNet pictures.")
    print("| " + " | ".join(_HEADS) + " |\n" + "|---" * len(_HEADS) + "|", flush=True)
    for model in given.model:
        for setting in given.setting:
            if given.confirm:
                found = confirm(given.folder, model, setting, auto=not given.no_auto)
            else:
                found = run(given.folder, model, setting, given.alpha, auto=not given.no_auto)
            print(line(model, setting, found), flush=True)


if __name__ == "__main__":
    main()
