"""What encoding costs: seconds and extra memory for 124 M weights (the shapes of a 12-layer, 768-wide transformer).

    python benchmarks/encode_cost.py [--format ovp4:row] [--threads 2] [--layers 12]

Extra memory is the rise of the process's peak (VmHWM) while the largest layer is encoded, over its float32 bytes.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from machine import fingerprint

import evenbits
from evenbits.evaluation.memory import peak_bytes
from evenbits.numerics.search import counting_cost

SHAPES = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
EMBEDDING = (50257, 768)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="ovp4:row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    evenbits.encode(torch.randn(64, 64), options.format)  # imports and tables
    seconds, elements, extra = 0.0, 0, 0.0
    with counting_cost() as cost:
        for shape in [EMBEDDING, *SHAPES * options.layers]:
            weight = torch.randn(shape, generator=generator)
            before, start = peak_bytes(), time.perf_counter()
            encoded = evenbits.encode(weight, options.format)
            seconds += time.perf_counter() - start
            elements += weight.numel()
            if shape == EMBEDDING:
                extra = (peak_bytes() - before) / weight.nbytes
            del weight, encoded
    found = {"format": options.format, "elements": elements, "seconds": seconds, "search_passes": cost.passes}
    print(json.dumps(fingerprint() | found | {"extra_memory_ratio": extra}))


if __name__ == "__main__":
    main()
