"""Speed of convolutional nets: ResNet18 and MobileNetV2 shapes at 3×224×224, batch 1, random weights.

    python benchmarks/conv_nets.py [--threads 1,2] [--seconds 20] [--json]

float32, bfloat16       torch, as they are; float32 with BatchNorm folded, too, since every other row folds it
per layer               W8A8_STATIC, each layer by itself, float between layers; also of a picture in channels last
byte chains             the same fused (pipeline/fuse.py): bytes between convolutions
torch FX static         torch.ao.quantization: prepare_fx, convert_fx, x86 backend
onnxruntime int8        static QDQ; openvino int8: NNCF post-training. Only where they are installed; else named

All variants in turns inside one process. One thread: CPU time, 25th percentile; more: least wall time (probe.py).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import fingerprint
from torch import nn
from torch.fx.experimental import optimization

import evenbits
from evenbits.evaluation.latency import threads_of
from evenbits.kernels.probe import alternate, quantile
from evenbits.pipeline.fuse import fuse

BATCHES = 4
# Expansion, channels, repeats, first stride of each row of the MobileNetV2 paper's table 2.
ROWS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias and its BatchNorm."""
    made = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [made, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """Two 3×3 convolutions and what goes round them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv(inputs, outputs, 3, stride), nn.ReLU(), *conv(outputs, outputs, 3))
        self.around = nn.Sequential(*conv(inputs, outputs, 1, stride)) if inputs != outputs else nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.body(x) + self.around(x))


def resnet18() -> nn.Module:
    """ResNet18's shapes."""
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [Residual(i, o, 1 if i == o else 2) for i, o in itertools.pairwise(widths)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)]
    return nn.Sequential(*conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *blocks, *head)


class Inverted(nn.Module):
    """Wide, depthwise, narrow; added to its input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        up = [*conv(inputs, wide, 1), nn.ReLU6()] if expansion > 1 else []
        self.body = nn.Sequential(*up, *conv(wide, wide, 3, stride, wide), nn.ReLU6(), *conv(wide, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenetv2() -> nn.Module:
    """MobileNetV2's shapes."""
    blocks, inputs = [], 32
    for expansion, channels, repeats, first in ROWS:
        for i in range(repeats):
            blocks.append(Inverted(inputs, channels, first if i == 0 else 1, expansion))
            inputs = channels
    head = [*conv(inputs, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*conv(3, 32, 3, 2), nn.ReLU6(), *blocks, *head)


NETS: dict[str, Callable[[], nn.Module]] = {"ResNet18": resnet18, "MobileNetV2": mobilenetv2}


def prepared(make: Callable[[], nn.Module]) -> nn.Module:
    """A net whose BatchNorms have seen data, so that random weights give activations of sensible sizes."""
    torch.manual_seed(0)
    model = make().train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 64, 64))
    return model.eval()


def folded(model: nn.Module) -> nn.Module:
    """BatchNorm inside the convolutions."""
    return optimization.fuse(copy.deepcopy(model))


def fx_static(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
    """torch's FX static quantization for x86."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "x86"
    watched = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (batches[0],))
    for batch in batches:
        watched(batch)
    return convert_fx(watched)


def onnxruntime_int8(model: nn.Module, batches: list[torch.Tensor], threads: int) -> Callable[[torch.Tensor], Any]:
    """ONNX Runtime, static QDQ, uint8 activations, int8 weights per channel."""
    import onnxruntime
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"x": batch.numpy()} for batch in batches])

        def get_next(self) -> Any:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        plain, small = f"{folder}/plain.onnx", f"{folder}/int8.onnx"
        torch.onnx.export(folded(model), (batches[0],), plain, input_names=["x"], dynamo=False)
        quantization.quantize_static(plain, small, Reader(), per_channel=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(small, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})


def openvino_int8(model: nn.Module, batches: list[torch.Tensor], threads: int) -> Callable[[torch.Tensor], Any]:
    """OpenVINO with NNCF's post-training quantization."""
    import nncf
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        plain = f"{folder}/plain.onnx"
        torch.onnx.export(folded(model), (batches[0],), plain, input_names=["x"], dynamo=False)
        read = openvino.Core().read_model(plain)
    small = nncf.quantize(read, nncf.Dataset([b.numpy() for b in batches]), subset_size=len(batches))
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(small, "CPU", settings)
    return lambda x: compiled([x.numpy()])


def variants(model: nn.Module, batches: list[torch.Tensor], threads: int) -> tuple[dict[str, Any], list[str]]:
    """What is timed, and what is not, with the reason."""
    half, channels_last = copy.deepcopy(folded(model)).to(torch.bfloat16), torch.channels_last
    quantized = copy.deepcopy(model)
    evenbits.quantize(quantized, scheme="W8A8_STATIC", method="rtn", data=batches)
    fused = fuse(quantized, batches)
    chained = sum(row.status == "u8" for row in fused.rows)
    notes = [f"{chained} of {len(fused.rows)} convolutions hand on bytes ({fused.sqnr_db:.1f} dB to per layer)"]
    found: dict[str, Any] = {
        "float32": model,
        "float32 folded": folded(model),
        "float32 folded, channels last": folded(model).to(memory_format=channels_last),
        "bfloat16 folded": lambda x: half(x.to(torch.bfloat16)),
        "evenbits per layer": quantized,
        "evenbits per layer, channels last": lambda x: quantized(x.contiguous(memory_format=channels_last)),
        "evenbits byte chains": fused.model,
    }
    makers: dict[str, tuple[str, Callable[[], Any]]] = {
        "torch FX static": ("torch.ao.quantization", lambda: fx_static(model, batches)),
        "onnxruntime int8": ("onnxruntime", lambda: onnxruntime_int8(model, batches, threads)),
        "openvino int8": ("openvino", lambda: openvino_int8(model, batches, threads)),
    }
    for name, (package, make) in makers.items():
        if importlib.util.find_spec(package) is None:
            notes.append(f"{name}: not measured ({package} not installed)")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = make()
    return found, notes


def measured(name: str, make: Callable[[], nn.Module], threads: int, seconds: float, size: int) -> dict[str, Any]:
    """One table."""
    batches = [torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(i)) for i in range(BATCHES)]
    with threads_of(threads), torch.no_grad():
        found, notes = variants(prepared(make), batches, threads)
        x = batches[0]
        samples = alternate([lambda run=run: run(x) for run in found.values()], seconds=seconds, most=400)
    times = [samples.typical(index) for index in range(len(found))]
    rows = [
        {
            "variant": variant,
            "ms": 1e3 * seconds_,
            "quartiles_ms": [1e3 * quantile(samples.seconds[i], q) for q in (0.25, 0.75)],
            "speedup": times[0] / seconds_,
        }
        for i, (variant, seconds_) in enumerate(zip(found, times, strict=True))
    ]
    rounds = len(samples.seconds[0])
    return {"net": name, "threads": threads, "clock": samples.clock, "rounds": rounds, "rows": rows, "notes": notes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--net", choices=NETS, action="append")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    tables = []
    for name in given.net or NETS:
        for threads in (int(part) for part in given.threads.split(",")):
            table = measured(name, NETS[name], threads, given.seconds, given.size)
            tables.append(table)
            print(f"\n{name}, {threads} thread(s), {table['clock']} time, {table['rounds']} rounds")
            for row in table["rows"]:
                low, high = row["quartiles_ms"]
                figures = f"{row['ms']:9.2f} ms  {low:9.2f} … {high:9.2f}  {row['speedup']:6.2f}x"
                print(f"  {row['variant']:<32}{figures}")
            print("  " + "\n  ".join(table["notes"]), flush=True)
    if given.json:
        given.json.write_text(json.dumps({"machine": fingerprint(), "tables": tables}), encoding="utf-8")


if __name__ == "__main__":
    main()
