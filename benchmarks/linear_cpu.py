"""Linear layers on the CPU: int8 and packed 4-bit weights against torch's own ways and ONNX Runtime.

    python benchmarks/linear_cpu.py [--json] [--repeat 40] [--shapes 1x768x3072,8x4096x4096] [--threads 1]
                                    [--onnxruntime PYTHON]  a Python that has onnxruntime and onnx installed
                                    [--in-a-row 20]  calls of a variant before the next has its turn
                                    [--floats]  instead: 4-bit weights and float32 activations (weight-only layers)

Everything is included from float32 activations to float32 results: quantization, product, scales; but for rows that say
"alone". One thread: CPU time of the process, 25th percentile of --repeat rounds; more: least wall time, which needs a
quiet machine. In each round every variant runs once, forwards and backwards by turns, so that each finds the caches as
the others leave them; with --in-a-row as its own last call did (the first of a row is not timed). ONNX Runtime runs in
a process of its own. Below the table: what the processor could do at most (peaks.c), and how near W8A8 comes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from linear_torch import Variant, products
from machine import fingerprint

from evenbits.kernels import report
from evenbits.kernels.cpu.build import BuildError, compiler
from evenbits.kernels.ops import linear_pair, linear_pair_float, linear_w8a8
from evenbits.numerics.encode import encode

# rows x columns (inputs) x outputs
SHAPES = "1x768x3072,1x2048x2048,1x4096x4096,8x4096x4096,32x4096x4096,128x4096x4096,128x2048x2048"
PACKED = {
    "evenbits ovp4, row": "ovp4-int:row:minmax",
    "evenbits int4, row": "int4:row",
    "evenbits ovp4, g128": "ovp4-int:g128:minmax",
    "evenbits int4, g128": "int4:g128",
    "evenbits ovp4, g32": "ovp4-int:g32:minmax",
}
WEIGHT_ONLY = {"ovp4, row": "ovp4-flint:row:minmax", "int4, g128": "int4:g128", "nf4, g64": "nf4:g64"}


def variants(m: int, k: int, n: int) -> dict[str, Variant]:
    """Name → one call, all of the same shape."""
    x, weight = torch.randn(m, k), torch.randn(n, k) * 0.05
    weight[torch.rand(n, k) < 0.005] *= 8
    half_x, half = x.bfloat16(), weight.bfloat16()
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)

    found: dict[str, Variant] = {
        "torch float32": lambda: torch.nn.functional.linear(x, weight),
        "torch bfloat16": lambda: torch.nn.functional.linear(half_x, half),
        **products(x, weight, codes, scale),
        "evenbits W8A8": lambda: linear_w8a8(x, codes, scale, None, "int8:row"),
    }
    for name, fmt in PACKED.items():
        found[name] = packed(x, weight, fmt)
    return found


def packed(x: torch.Tensor, weight: torch.Tensor, fmt: str) -> Variant:
    """Packed 4-bit weights and int8 activations."""
    q = encode(weight, fmt)
    return lambda: linear_pair(x, q.packed, q.scale, q.format, None, "int8:row", global_scale=q.global_scale)


def weight_only(m: int, k: int, n: int) -> dict[str, Variant]:
    """Name → one call: packed 4-bit weights and float activations, and the same decoded whole for each call."""
    x, weight = torch.randn(m, k), torch.randn(n, k) * 0.05
    half_x, half = x.bfloat16(), weight.bfloat16()
    found: dict[str, Variant] = {
        "torch float32": lambda: torch.nn.functional.linear(x, weight),
        "torch bfloat16": lambda: torch.nn.functional.linear(half_x, half),
    }
    for name, fmt in WEIGHT_ONLY.items():
        q = encode(weight, fmt)
        found[f"evenbits {name}"] = lambda q=q: linear_pair_float(x, q.packed, q.scale, q.format, None)  # type: ignore[misc]
        found[f"{name}, decoded whole for each call"] = lambda q=q: torch.nn.functional.linear(x, q.dequantize())  # type: ignore[misc]
    return found


def measure(calls: dict[str, Variant], repeat: int, in_a_row: int, threads: int) -> dict[str, list[float]]:
    """Name → microseconds: the figure, and the quartiles of the rounds. Of the calls of a turn the mean."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    clock = time.process_time_ns if threads == 1 else time.perf_counter_ns
    for call in calls.values():
        call()
    for turn in range(repeat):
        for name in list(calls) if turn % 2 else list(calls)[::-1]:
            call = calls[name]
            if in_a_row > 1:
                call()
            start = clock()
            for _ in range(in_a_row):
                call()
            times[name].append((clock() - start) / in_a_row / 1e3)
    return {name: figures(taken, threads) for name, taken in times.items()}


def figures(taken: list[float], threads: int) -> list[float]:
    """What counts (25th percentile; of several threads the least), and both quartiles."""
    ordered = sorted(taken)
    low, high = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    return [low if threads == 1 else ordered[0], low, high]


def onnxruntime(python: str, shape: str, repeat: int, threads: int) -> dict[str, list[float]]:
    """Name → microseconds of ONNX Runtime's 4-bit and dynamic int8 products, in another Python."""
    script = Path(__file__).with_name("linear_onnxruntime.py")
    words = [python, str(script), shape, str(repeat), str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return {name: figures(taken, threads) for name, taken in json.loads(done.stdout).items()}


def peaks(megabytes: int) -> dict[str, float] | None:
    """Int8 products and bytes one core can do a second (billions), or None without a compiler."""
    try:
        cc = compiler()
    except BuildError:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        program = str(Path(scratch, "peaks"))
        source = str(Path(__file__).with_name("peaks.c"))
        subprocess.run([*cc, "-O3", "-march=native", source, "-o", program], check=True)
        done = subprocess.run([program, str(megabytes)], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def show(columns: dict[str, dict[str, list[float]]], most: dict[str, float] | None, threads: int) -> None:
    """The table in Markdown, its spread, and W8A8 beside the ceilings of as many cores."""
    clock = "CPU time, 25th percentile" if threads == 1 else "least wall time"
    print(f"{threads} thread(s), {clock}, {report()[0].reason}; times torch float32 (microseconds)\n")
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in next(iter(columns.values())):
        cells = [
            f"{taken['torch float32'][0] / taken[name][0]:.1f} ({taken[name][0]:.0f})" for taken in columns.values()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    spreads = sorted(high / low - 1 for taken in columns.values() for _, low, high in taken.values())
    print(f"\nquartiles apart: {spreads[len(spreads) // 2]:.0%} in the middle, {spreads[-1]:.0%} at most")
    if most is None:
        print("no C compiler: the ceilings were not measured")
        return
    products_most = f"{most['gops']:.0f} G" if most["gops"] else "(not measured without AVX-512 VNNI)"
    print(f"one core at most: {products_most} int8 operations/s, {most['gbytes']:.0f} GB/s from memory")
    for shape, taken in columns.items():
        m, k, n = map(int, shape.split("x"))
        if "evenbits W8A8" in taken and most["gops"]:
            done, read = 2e-3 * m * k * n / taken["evenbits W8A8"][0], 1e-3 * k * n / taken["evenbits W8A8"][0]
            share = done / (most["gops"] * threads)
            print(f"W8A8 {shape}: {done:.0f} G operations/s ({share:.0%}), {read:.1f} GB/s of weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--onnxruntime", metavar="PYTHON")
    parser.add_argument("--floats", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--in-a-row", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    columns: dict[str, dict[str, list[float]]] = {}
    with torch.inference_mode():
        for shape in options.shapes.split(","):
            m, k, n = map(int, shape.split("x"))
            repeat = options.repeat * (5 if m * k * n < 1 << 23 else 1)
            calls = (weight_only if options.floats else variants)(m, k, n)
            columns[shape] = measure(calls, repeat, options.in_a_row, options.threads)
            if options.onnxruntime:
                columns[shape] |= onnxruntime(options.onnxruntime, shape, repeat, options.threads)
    most = peaks(256)
    if options.json:
        found = {"machine": fingerprint(), "backend": report()[0].reason, "peaks": most, "microseconds": columns}
        print(json.dumps(found))
    else:
        show(columns, most, options.threads)


if __name__ == "__main__":
    main()
