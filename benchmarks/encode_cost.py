"""What encoding costs: seconds and extra memory for 124 M weights (the shapes of a 12-layer, 768-wide transformer).

    python benchmarks/encode_cost.py [--formats ovp4:row ovp4:g32 …] [--threads 2] [--layers 12] [--memory]

Extra memory is the rise of the process's resident peak while a layer is encoded, the result included, over the layer's
float32 bytes: the largest over all shapes, and which it is. The peak is reset before each (Linux). --memory leaves the
timing out. One JSON line for each format.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from machine import fingerprint

import evenbits
from evenbits.evaluation.memory import peak_bytes
from evenbits.numerics.search import counting_cost

FORMATS = ("ovp4:row", "ovp4:g128", "ovp4:g32", "ovp4:g16", "ovp4-mix:g32")
SHAPES = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
EMBEDDING = (50257, 768)
MMAP_THRESHOLD = -3  # of mallopt: what is freed goes back at once, or holes between allocations would be counted


def extra_memory(shape: tuple[int, int], fmt: str) -> float:
    """Peak bytes beside the tensor while it is encoded, over its float32 bytes: of small ones the least of three tries,
    because pages of libraries that the system had dropped and reads again count too."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    library = ctypes.CDLL(None)
    library.mallopt(MMAP_THRESHOLD, 1 << 16)
    found = []
    for _ in range(3 if weight.numel() < 1 << 22 else 1):
        library.malloc_trim(0)  # or what was freed before would serve, unseen
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_bytes()
        evenbits.encode(weight, fmt)
        found.append((peak_bytes() - before) / weight.nbytes)
    return min(found)


def seconds(fmt: str, layers: int) -> Iterator[tuple[str, float]]:
    """Wall and processor seconds of encoding every layer, weights, and the search's passes over a layer."""
    generator, wall, processor, count = torch.Generator().manual_seed(0), 0.0, 0.0, 0
    with counting_cost() as cost:
        for shape in [EMBEDDING, *SHAPES * layers]:
            weight = torch.randn(shape, generator=generator)
            start, started = time.perf_counter(), time.process_time()
            evenbits.encode(weight, fmt)
            wall, processor = wall + time.perf_counter() - start, processor + time.process_time() - started
            count += weight.numel()
    yield from {"elements": count, "seconds": wall, "processor_seconds": processor}.items()
    yield "passes_per_layer", cost.passes / (1 + len(SHAPES) * layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--shapes", nargs="+", help="ROWSxCOLUMNS whose memory is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = [tuple(map(int, shape.split("x"))) for shape in options.shapes or ()]
    shapes = given or list(dict.fromkeys([*SHAPES, EMBEDDING]))
    for fmt in options.formats:
        evenbits.encode(torch.randn(512, 512), fmt)  # imports, tables, threads
        found = {"x".join(map(str, shape)): round(extra_memory(shape, fmt), 3) for shape in shapes}
        line = {"format": fmt, "extra_memory_ratio": max(found.values()), "of_shape": max(found, key=found.__getitem__)}
        times = {} if options.memory else {name: round(value, 1) for name, value in seconds(fmt, options.layers)}
        print(json.dumps(fingerprint() | line | {"ratios": found} | times), flush=True)


if __name__ == "__main__":
    main()
