"""Linear layers on an NVIDIA GPU: int8 and packed 4-bit weights against torch's bfloat16. FP8 activations from compute
capability 8.9 on.

    python benchmarks/linear_gpu.py [--json] [--rounds 15] [--shapes 2048x4096x4096,1x4096x11008]

Every variant's result on the GPU is first compared with the CPU's, which is defined to the bit; one that is wrong ends
the run. Calls are captured in a CUDA graph, one for each of so many copies of the weight that they do not fit the
level-2 cache: weights come from memory, as they do in a model. Graphs are replayed in turns; the median of --rounds
replays counts. Everything from float activations to float results is included. Beside each time: the
fraction of what this GPU was measured to do, its copy bandwidth and its largest matrix products (of int8 for FP8 too).
Exit status 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from machine import fingerprint

from evenbits.kernels import pair_fp8, report
from evenbits.kernels.ops import linear_pair, linear_pair_float, linear_pair_fp8, linear_w8a8
from evenbits.numerics.encode import encode

# rows x columns (inputs) x outputs: prefill, then one token and more
SHAPES = "2048x4096x4096,1x4096x11008,8x4096x11008,16x4096x11008,32x4096x11008,128x4096x11008"
PACKED = {"ovp4, row": "ovp4-int:row:minmax", "int4, row": "int4:row", "int4, g128": "int4:g128"}
PACKED["ovp4, g128"] = "ovp4-int:g128:minmax"
CACHES = 4
Call = Callable[[int], torch.Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", default=SHAPES)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("linear_gpu.py needs an NVIDIA GPU and a torch built for it; this machine has none.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    with torch.inference_mode():
        ceilings = measured_ceilings()
        columns = {shape: column(*map(int, shape.split("x")), options.rounds) for shape in options.shapes.split(",")}
    found = {
        "gpu": torch.cuda.get_device_name(),
        "machine": fingerprint(),
        "backend": [str(line) for line in report()],
        "ceilings": ceilings,
        "microseconds": columns,
    }
    print(json.dumps(found) if options.json else table(found))
    return 0


def column(m: int, k: int, n: int, rounds: int) -> dict[str, dict[str, float]]:
    """Name → microseconds and the bytes of weights that one call reads."""
    variants = checked(m, k, n)
    graphs = {name: (captured(call, copies), copies, size) for name, (call, copies, size) in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds):
        for name in list(graphs) if turn % 2 else list(graphs)[::-1]:
            graph, copies, _ = graphs[name]
            times[name].append(replayed(graph) / copies)
    return {name: {"us": statistics.median(times[name]), "bytes": graphs[name][2]} for name in graphs}


def checked(m: int, k: int, n: int) -> dict[str, tuple[Call, int, int]]:
    """Name → a call with the i-th copy of its weight, copies, bytes of one. Each agrees with the CPU's result."""
    x, weight = torch.randn(m, k).bfloat16(), torch.randn(n, k) * 0.05
    weight[torch.rand(n, k) < 0.005] *= 8
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    found = {
        "torch bfloat16": prepared(torch.nn.functional.linear, x, weight.bfloat16()),
        "W8A8": prepared(partial(linear_w8a8, bias=None, fmt="int8:row"), x, codes, scale, exact=True),
    }
    for name, fmt in PACKED.items():
        q = encode(weight, fmt)
        words = {"weight_format": q.format, "bias": None}
        factor = {} if q.global_scale is None else {"global_scale": q.global_scale}
        integer, plain = partial(linear_pair, **words, fmt="int8:row"), partial(linear_pair_float, **words)
        parts = (x, q.packed, q.scale)
        found[f"{name}, int8 activations"] = prepared(integer, *parts, exact=True, **factor)
        found[f"{name}, bfloat16 activations"] = prepared(plain, *parts, **factor)
        if pair_fp8.is_served("cuda"):
            found[f"{name}, FP8 activations"] = prepared(partial(linear_pair_fp8, **words), *parts, **factor)
    return found


def prepared(
    operation: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    *scale: torch.Tensor,
    exact: bool = False,
    **more: torch.Tensor,
) -> tuple[Call, int, int]:
    """Moves an operation's tensors to the GPU and ends the run if it says something else there than on the CPU: one
    other bit where integers are summed, more than bfloat16's rounding elsewhere."""
    x_gpu, scale_gpu, more_gpu = x.cuda(), [s.cuda() for s in scale], {name: t.cuda() for name, t in more.items()}
    copies = copied(weight.cuda())
    found, expected = operation(x_gpu, copies[0], *scale_gpu, **more_gpu).cpu(), operation(x, weight, *scale, **more)
    if exact and not found.equal(expected):
        raise SystemExit(
            f"{operation} of {list(x.shape)} differs from the CPU's bits: the kernels are wrong on this GPU."
        )
    torch.testing.assert_close(found, expected, rtol=2.0**-6, atol=2.0**-7 * float(expected.float().std()))
    size = nbytes(weight) + sum(map(nbytes, scale))
    return lambda i: operation(x_gpu, copies[i], *scale_gpu, **more_gpu), len(copies), size


def copied(weight: torch.Tensor) -> list[torch.Tensor]:
    """So many copies that they do not fit the level-2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [weight.clone() for _ in range(max(2, CACHES * cache // nbytes(weight) + 1))]


def captured(call: Call, copies: int) -> torch.cuda.CUDAGraph:
    """A graph of one call for each copy."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(copies):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    graph.replay()
    return graph


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of a replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def measured_ceilings() -> dict[str, float]:
    """Bytes and operations a second that this GPU does at its best: copies, bfloat16 and int8 products of 8192³."""
    size, ones = 8192, 1 << 30
    source, target = (torch.zeros(ones, dtype=torch.uint8, device="cuda") for _ in range(2))
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    c, d = (torch.randint(-127, 128, (size, size), device="cuda").to(torch.int8) for _ in range(2))
    work = 2.0 * size**3
    best = {}
    for name, call, amount in (
        ("bytes a second", lambda _: target.copy_(source), 2.0 * ones),
        ("bfloat16 a second", lambda _: a @ b.t(), work),
        ("int8 a second", lambda _: torch._int_mm(c, d.t()), work),
    ):
        graph = captured(call, 1)  # type: ignore[arg-type]
        best[name] = amount / min(replayed(graph) for _ in range(10)) * 1e6
    return best


def nbytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def table(found: dict[str, object]) -> str:
    """Times torch bfloat16 (microseconds; share of the copy bandwidth, share of the matrix peak)."""
    ceilings, columns = found["ceilings"], found["microseconds"]
    assert isinstance(ceilings, dict) and isinstance(columns, dict)
    lines = [f"{found['gpu']}; " + ", ".join(f"{value:.3g} {name}" for name, value in ceilings.items()), ""]
    lines += ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in next(iter(columns.values())):
        cells = []
        for shape, taken in columns.items():
            m, k, n = map(int, shape.split("x"))
            seconds = taken[name]["us"] / 1e6
            integer = name == "W8A8" or "int8" in name or "FP8" in name
            peak = ceilings["int8 a second" if integer else "bfloat16 a second"]
            memory = taken[name]["bytes"] / seconds / ceilings["bytes a second"]
            ratio = taken["torch bfloat16"]["us"] / taken[name]["us"]
            share = f"{memory:.0%}, {2.0 * m * k * n / seconds / peak:.0%}"
            cells.append(f"{ratio:.2f} ({taken[name]['us']:.1f}; {share})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
