"""The README's INT8 accuracy table: float against W8A8, rounded and smoothed, on real models, by the command line.

    python benchmarks/accuracy_int8.py --data DIR [--json]

DIR holds the models and data sets that the tests use (EVENBITS_TEST_DATA by default). Every figure comes from
`evenbits quantize … --json` and `evenbits evaluate … --json`; the JSON lines start with a machine fingerprint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import fingerprint

RUNS = [("W8A8", "rtn"), ("W8A8", "smoothquant"), ("W8A8_STATIC", "rtn"), ("W8A8_STATIC", "smoothquant")]


def evenbits(*words: str) -> dict[str, Any]:
    """One command with --json; its object."""
    done = subprocess.run(
        [sys.executable, "-m", "evenbits", *words, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"evenbits {' '.join(words)} failed: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rows(name: str, model: Path, task: list[str], metric: str, calibration: list[str]) -> list[dict[str, Any]]:
    """Float and every scheme × method of one model."""
    scored = evenbits("evaluate", str(model), *task)
    made = [{"model": name, "scheme": "float", "method": "", metric: scored["metrics"][metric], "n": scored["n"]}]
    made[0]["interval"] = scored["interval"]
    with tempfile.TemporaryDirectory() as folder:
        for scheme, method in RUNS:
            out = Path(folder) / f"{scheme}-{method}"
            run = evenbits("quantize", str(model), "-o", str(out), "--scheme", scheme, "--method", method, *calibration)
            scored = evenbits("evaluate", str(out), *task)
            made.append(
                {
                    "model": name,
                    "scheme": scheme,
                    "method": method,
                    metric: scored["metrics"][metric],
                    "interval": scored["interval"],
                    "weight_ratio": run["weight_bytes"] / run["float_weight_bytes"],
                    "weight_bytes": run["weight_bytes"],
                    "file_bytes": run["file_bytes"],
                    "regions": {s: sum(r["status"] == s for r in run["regions"]) for s in ("folded", "multiplied")},
                    "seconds": round(run["seconds"], 1),
                    "n": scored["n"],
                }
            )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("EVENBITS_TEST_DATA"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.data is None:
        raise SystemExit("name the folder of models and data sets: --data DIR or EVENBITS_TEST_DATA")
    data = Path(options.data)
    sst2 = ["--task", "classification", "--data", str(data / "sst2" / "dev.tsv")]
    tiny = ["--task", "perplexity", "--data", str(data / "caltext" / "tiny.utf8")]
    table = rows("MiniLM SST-2", data / "minilm_glue" / "sst2", sst2, "accuracy", [])
    table += rows("stories260k", data / "stories260k_llama", tiny, "perplexity", [])
    if options.json:
        for line in [fingerprint(), *table]:
            print(json.dumps(line))
        return
    print(fingerprint())
    for row in table:
        value = row.get("accuracy", row.get("perplexity"))
        print(f"{row['model']:14} {row['scheme']:12} {row['method']:12} {value:8.4f}  {row.get('weight_ratio', 1):.4f}")


if __name__ == "__main__":
    main()
