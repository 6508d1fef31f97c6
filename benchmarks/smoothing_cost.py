"""What smoothing costs: tracing, statistics, proofs and the search for α as multiples of one calibration forward.

    python benchmarks/smoothing_cost.py --data DIR [--json]

MiniLM on 64 sentences and ResNet-20 on 96 pictures, W8A8_STATIC. "Forward" is one walk of the float model over them.
Extra memory is the peak of live tensor bytes above the model and the data, with a quarter and with all of the batches,
for α = 0.5 and for auto. Process CPU time, the smallest of three (auto: one). DIR holds minilm_glue/, sst2/,
resnet_cifar10/ and cifar10/.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import fingerprint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evenbits


class _Peak(TorchDispatchMode):
    """The largest number of bytes that tensors made inside the block held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and (key := leaf.untyped_storage()._cdata) not in self._seen:
                size = leaf.untyped_storage().nbytes()
                self._seen.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(leaf.untyped_storage(), self._free, key, size)
        return output

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def minilm(data: Path) -> tuple[Callable[[], nn.Module], list[Any]]:
    """The model's factory and 16 batches of 4 sentences."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = data / "minilm_glue" / "sst2"
    lines = (data / "sst2" / "dev.tsv").read_text(encoding="utf-8").splitlines()[:64]
    texts = [line.split("\t")[1] for line in lines]
    tokens = AutoTokenizer.from_pretrained(folder)
    encode = lambda part: dict(tokens(part, padding="max_length", max_length=64, truncation=True, return_tensors="pt"))  # noqa: E731
    batches = [encode(texts[i : i + 4]) for i in range(0, 64, 4)]
    return lambda: AutoModelForSequenceClassification.from_pretrained(folder).eval(), batches


def resnet20(data: Path) -> tuple[Callable[[], nn.Module], list[Any]]:
    """The model's factory and 16 batches of 6 pictures."""
    os.environ.setdefault("EVENBITS_TEST_DATA", str(data))
    import vision

    pictures, _ = vision.cifar10("train", slice(0, 96))
    return vision.resnet20, list(torch.from_numpy(pictures).float().div(255).split(6))


def measure(make: Callable[[], nn.Module], batches: list[Any]) -> dict[str, float]:
    """Seconds of one walk and of quantization in three ways, and extra bytes with a quarter and all of the data."""

    def walk() -> None:
        model = make()
        with torch.no_grad():
            start = time.process_time()
            for batch in batches:
                model(**batch) if isinstance(batch, dict) else model(batch)
        found.append(time.process_time() - start)

    found: list[float] = []
    for _ in range(3):
        walk()
    seconds = {"forward": min(found)}
    for name, method, options in (
        ("rtn", "rtn", {}),
        ("fixed", "smoothquant", {"alpha": 0.5}),
        ("auto", "smoothquant", {"alpha": "auto"}),
    ):
        times = []
        for _ in range(3 if name != "auto" else 1):
            model = make()
            start = time.process_time()
            evenbits.quantize(model, scheme="W8A8_STATIC", method=method, data=batches, **options)
            times.append(time.process_time() - start)
        seconds[name] = min(times)
    counts = (len(batches) // 4, len(batches))
    return seconds | {f"bytes_{a}_{n}": _extra(make(), batches[:n], a) for a in (0.5, "auto") for n in counts}


def _extra(model: nn.Module, batches: list[Any], alpha: float | str) -> int:
    with _Peak() as peak:
        evenbits.quantize(model, scheme="W8A8_STATIC", method="smoothquant", data=batches, alpha=alpha)
    return peak.peak


def main() -> None:
    """Measures both models and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: measure(*make(given.data)) for name, make in (("MiniLM", minilm), ("ResNet-20", resnet20))}
    if given.json:
        print(json.dumps({"machine": fingerprint(), "rows": rows}))
        return
    heads = ["model", "forward s", "rtn", "α = 0.5", "auto"]
    heads += [f"extra MB, {way}, {n} batches" for way in ("α = 0.5", "auto") for n in (4, 16)]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for name, row in rows.items():
        multiples = [f"{row[key] / row['forward']:.1f}×" for key in ("rtn", "fixed", "auto")]
        extra = [f"{row[key] / 2**20:.1f}" for key in row if key.startswith("bytes_")]
        print("| " + " | ".join([name, f"{row['forward']:.2f}", *multiples, *extra]) + " |")


if __name__ == "__main__":
    main()
