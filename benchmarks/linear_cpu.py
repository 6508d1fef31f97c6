"""Linear layers on one CPU thread: int8 and packed 4-bit weights against torch's own ways and ONNX Runtime.

    python benchmarks/linear_cpu.py [--json] [--repeat 40] [--shapes 1x768x3072,8x4096x4096]
                                    [--onnxruntime PYTHON]  a Python that has onnxruntime and onnx installed
                                    [--floats]  instead: 4-bit weights and float32 activations (weight-only layers)

Everything is included from float32 activations to float32 results: quantization, product, scales. Time is the process's
CPU time, the 25th percentile of --repeat rounds; in each round every variant runs once, forwards and backwards by
turns, so that each finds the caches as the others leave them. ONNX Runtime runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from machine import fingerprint

from evenbits.kernels import report
from evenbits.kernels.ops import linear_pair, linear_pair_float, linear_w8a8
from evenbits.numerics.encode import encode

# rows x columns (inputs) x outputs
SHAPES = "1x768x3072,1x2048x2048,1x4096x4096,8x4096x4096,32x4096x4096,128x4096x4096"
PACKED = {
    "evenbits ovp4, row": "ovp4-int:row:minmax",
    "evenbits int4, row": "int4:row",
    "evenbits ovp4, g128": "ovp4-int:g128:minmax",
    "evenbits int4, g128": "int4:g128",
    "evenbits ovp4, g32": "ovp4-int:g32:minmax",
}
WEIGHT_ONLY = {"ovp4, row": "ovp4-flint:row:minmax", "int4, g128": "int4:g128", "nf4, g64": "nf4:g64"}
Variant = Callable[[], torch.Tensor]


def variants(m: int, k: int, n: int) -> dict[str, Variant]:
    """Name → one call, all of the same shape."""
    x, weight = torch.randn(m, k), torch.randn(n, k) * 0.05
    weight[torch.rand(n, k) < 0.005] *= 8
    half_x, half = x.bfloat16(), weight.bfloat16()
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)

    def int_mm() -> torch.Tensor:
        rows = x.abs().amax(1, keepdim=True) / 127
        return torch._int_mm((x / rows).round_().to(torch.int8), codes.t()).float() * (rows * scale.t())

    found: dict[str, Variant] = {
        "torch float32": lambda: torch.nn.functional.linear(x, weight),
        "torch bfloat16": lambda: torch.nn.functional.linear(half_x, half),
        "torch._int_mm + eager quantization": int_mm,
        "torch dynamic int8 (fbgemm)": fbgemm(x, weight),
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


def fbgemm(x: torch.Tensor, weight: torch.Tensor) -> Variant:
    """torch's dynamically quantized linear layer (one activation scale per tensor)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight
        layer.qconfig = torch.ao.quantization.per_channel_dynamic_qconfig
        quantized = torch.ao.nn.quantized.dynamic.Linear.from_float(layer)
    return lambda: quantized(x)


def measure(calls: dict[str, Variant], repeat: int) -> dict[str, float]:
    """Name → microseconds of CPU time, 25th percentile."""
    times: dict[str, list[int]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(repeat):
        for name in list(calls) if turn % 2 else list(calls)[::-1]:
            start = time.process_time_ns()
            calls[name]()
            times[name].append(time.process_time_ns() - start)
    return {name: sorted(taken)[len(taken) // 4] / 1e3 for name, taken in times.items()}


def onnxruntime(python: str, shape: str, repeat: int) -> float:
    """Microseconds of MatMulNBits (int4, groups of 128, int8 activations) in another Python."""
    script = Path(__file__).with_name("linear_onnxruntime.py")
    done = subprocess.run([python, str(script), shape, str(repeat)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--onnxruntime", metavar="PYTHON")
    parser.add_argument("--floats", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    columns: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for shape in options.shapes.split(","):
            m, k, n = map(int, shape.split("x"))
            repeat = options.repeat * (5 if m * k * n < 1 << 23 else 1)
            columns[shape] = measure((weight_only if options.floats else variants)(m, k, n), repeat)
            if options.onnxruntime:
                columns[shape]["ONNX Runtime MatMulNBits int4, g128"] = onnxruntime(options.onnxruntime, shape, repeat)
    if options.json:
        print(json.dumps({"machine": fingerprint(), "backend": report()[0].reason, "microseconds": columns}))
        return
    print(f"one thread, {report()[0].reason}; times torch float32 (microseconds)\n")
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in next(iter(columns.values())):
        cells = [f"{taken['torch float32'] / taken[name]:.1f} ({taken[name]:.0f})" for taken in columns.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
