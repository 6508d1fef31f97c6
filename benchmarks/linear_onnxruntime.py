"""One shape of ONNX Runtime's MatMulNBits for linear_cpu.py, in a Python that has onnxruntime: microseconds.

python benchmarks/linear_onnxruntime.py 1x4096x4096 40
"""

from __future__ import annotations

import sys
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

GROUP = 128


def session(m: int, k: int, n: int) -> onnxruntime.InferenceSession:
    """int4 weights in groups of 128 and int8 activations (accuracy level 4)."""
    random = np.random.default_rng(0)
    packed = random.integers(0, 256, (n, k // GROUP, GROUP // 2), dtype=np.uint8)
    scales = random.random(n * (k // GROUP), dtype=np.float32)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=4,
        block_size=GROUP,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
        [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scales, "s")],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    )
    model.ir_version = 9
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    m, k, n = map(int, sys.argv[1].split("x"))
    run = session(m, k, n)
    x = {"x": np.random.default_rng(1).standard_normal((m, k), dtype=np.float32)}
    # Other memory in between, about as much as the other variants of linear_cpu.py touch.
    other = np.zeros(1 << 26, dtype=np.float32)
    times = []
    for _ in range(int(sys.argv[2]) + 1):
        other += 1
        start = time.process_time_ns()
        run.run(None, x)
        times.append(time.process_time_ns() - start)
    print(sorted(times[1:])[(len(times) - 1) // 4] / 1e3)


if __name__ == "__main__":
    main()
