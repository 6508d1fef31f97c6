"""Does α matter on convolutional nets? Accuracy over α for three models under five settings, on the same pictures.

    python benchmarks/vision.py prepare DIR
    python benchmarks/alpha_sweeps.py DIR [--model mobilenet_v2 …] [--setting W8A8 …] [--alpha 0.05:0.95:0.05]

Calibration and the search for `auto` use 100 pictures, accuracy the others (vision.py). Every sweep is resumable: the
same command goes on where it was stopped. Prints one line per sweep and writes DIR/sweeps/MODEL-SETTING/.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import evenbits

SETTINGS: dict[str, dict[str, Any]] = {
    "W8A8": {"weights": "int8:row", "input_activations": "int8:tensor", "dynamic": False},
    "W8-tensor": {"weights": "int8:tensor", "input_activations": "int8:tensor", "dynamic": False},
    "W4A8": {"weights": "int4:row", "input_activations": "int8:tensor", "dynamic": False},
    "W8A6": {"weights": "int8:row", "input_activations": "int6:tensor", "dynamic": False},
    "planted": {"weights": "int8:row", "input_activations": "int8:tensor", "dynamic": False},
}
_ARRAYS = {"mobilenet_v2": "imagenet", "resnet20": "cifar10", "resnet56": "cifar10"}


def run(folder: Path, model: str, setting: str, alpha: str) -> Any:
    """One sweep; also written as JSON."""
    factory = f"{Path(__file__).with_name('vision.py')}:{model}{'_planted' if setting == 'planted' else ''}"
    state = folder / "sweeps" / f"{model}-{setting}"
    found = evenbits.sweep(
        factory,
        task="classification",
        data=folder / f"{_ARRAYS[model]}-evaluation.npz",
        calibration=folder / f"{_ARRAYS[model]}-calibration.npz",
        samples=100,
        batch_size=20,
        alpha=alpha,
        scheme=SETTINGS[setting],
        state=state,
        say=lambda line: print(f"  {line}", flush=True),
    )
    state.with_suffix(".json").write_text(json.dumps(found.to_json(), indent=1), encoding="utf-8")
    return found


def line(model: str, setting: str, found: Any) -> str:
    """A row of the table: scores in percent, and how far best and worst α are apart in paired standard errors."""
    percent = lambda row: f"{100 * row.metric:.2f}"  # noqa: E731
    half = min(found.curve, key=lambda row: abs(row.alpha - 0.5))
    best, worst, auto = (found.row(name) for name in (found.spread.best, found.spread.worst, "auto"))
    apart = found.spread.comparison
    cells = [model, setting, str(found.n), percent(found.row("float")), percent(found.row("none")), percent(half)]
    cells += [percent(auto), f"{percent(best)} ({best.name})", f"{percent(worst)} ({worst.name})"]
    cells.append(f"{100 * apart.difference:.2f} ± {100 * apart.standard_error:.2f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Runs the sweeps that were asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", nargs="+", default=list(_ARRAYS), choices=list(_ARRAYS))
    parser.add_argument("--setting", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--alpha", default="0.05:0.95:0.05")
    given = parser.parse_args()
    heads = "model setting pictures float none 0.5 auto best worst best−worst".split()
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|", flush=True)
    for model in given.model:
        for setting in given.setting:
            print(line(model, setting, run(given.folder, model, setting, given.alpha)), flush=True)


if __name__ == "__main__":
    main()
