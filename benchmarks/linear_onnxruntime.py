"""One shape of ONNX Runtime's products for linear_cpu.py, in a Python that has onnxruntime: microseconds, as JSON.

    python benchmarks/linear_onnxruntime.py 1x4096x4096 40 [THREADS]

MatMulNBits: int4 weights in groups of 128, int8 activations (accuracy level 4). Dynamic int8: DynamicQuantizeLinear and
MatMulInteger with a weight scale per column, as its quantizer writes them.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

GROUP = 128


def run_of(nodes: list[Any], weights: dict[str, Any], m: int, k: int, n: int, threads: int) -> Any:
    """A session of x [M, K] → y [M, N]."""
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    )
    model.ir_version = 9
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def four_bits(m: int, k: int, n: int, threads: int) -> Any:
    """int4 weights in groups."""
    random = np.random.default_rng(0)
    weights = {
        "w": random.integers(0, 256, (n, k // GROUP, GROUP // 2), dtype=np.uint8),
        "s": random.random(n * (k // GROUP), dtype=np.float32),
    }
    numbers = {"K": k, "N": n, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **numbers)
    return run_of([node], weights, m, k, n, threads)


def dynamic_int8(m: int, k: int, n: int, threads: int) -> Any:
    """int8 weights, a scale per column; activations uint8, a scale per tensor; ONNX Runtime fuses the nodes."""
    random = np.random.default_rng(0)
    weights = {"w": random.integers(-127, 128, (k, n), dtype=np.int8), "s": random.random(n, dtype=np.float32)}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "q_scale", "q_zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "q_zero"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["float_sum"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["q_scale", "s"], ["scale"]),
        helper.make_node("Mul", ["float_sum", "scale"], ["y"]),
    ]
    return run_of(nodes, weights, m, k, n, threads)


def timed(run: Any, m: int, k: int, repeat: int, threads: int) -> list[float]:
    """Microseconds of each run, the first left out."""
    x = {"x": np.random.default_rng(1).standard_normal((m, k), dtype=np.float32)}
    clock = time.process_time_ns if threads == 1 else time.perf_counter_ns
    # Other memory in between, about as much as the other variants of linear_cpu.py touch.
    other = np.zeros(1 << 26, dtype=np.float32)
    times = []
    for _ in range(repeat + 1):
        other += 1
        start = clock()
        run.run(None, x)
        times.append((clock() - start) / 1e3)
    return times[1:]


def main() -> None:
    m, k, n = map(int, sys.argv[1].split("x"))
    repeat, threads = int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1
    found = {
        "ONNX Runtime MatMulNBits int4, g128": timed(four_bits(m, k, n, threads), m, k, repeat, threads),
        "ONNX Runtime dynamic int8": timed(dynamic_int8(m, k, n, threads), m, k, repeat, threads),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
