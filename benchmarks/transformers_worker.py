"""One variant of one model in a process of its own, for transformers_cpu.py: builds it, then runs it when told.

    PYTHON benchmarks/transformers_worker.py VARIANT MODEL THREADS

It answers with JSON lines on standard output (what libraries print goes to standard error): first the tasks it can
run, how near its output is to float32's (dB) and what could not be built; then, for every task named on standard
input, the seconds that one call took.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, OPTConfig, OPTForCausalLM

TOKENS = 128
# Model → task → sequences in a batch. "one token" stands behind a cache of TOKENS.
TASKS = {"bert": {"batch 1": 1, "batch 8": 8}, "opt": {"one token": 1, "prefill": 1}}
Call = Callable[[], Any]
Built = Callable[[torch.Tensor], Any]  # a forward of token ids


class Plain(nn.Module):
    """Token ids → one tensor: what an exported graph should be."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.words = {"use_cache": False} if isinstance(model, OPTForCausalLM) else {}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, **self.words)[0]


def float_model(name: str) -> nn.Module:
    """BERT-base or OPT-125M with random weights."""
    torch.manual_seed(0)
    made = BertModel(BertConfig()) if name == "bert" else OPTForCausalLM(OPTConfig())
    return made.eval()


def token_ids(model: nn.Module, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(4, model.config.vocab_size, (batch, TOKENS), generator=generator)


def ours(model: nn.Module, scheme: Any) -> nn.Module:
    """Head included (`evenbits quantize --head`), as in fbgemm's and torchao's rows."""
    import evenbits
    from evenbits.schemes.scheme import resolve

    evenbits.quantize(model, scheme=resolve(scheme).with_head(), method="rtn")
    return model


def four_bits(weights: str) -> dict[str, Any]:
    return {"weights": weights, "input_activations": "int8:row"}


def fbgemm(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def torchao(model: nn.Module, bits: int) -> nn.Module:
    from torchao import quantization

    if bits == 8:
        config = quantization.Int8DynamicActivationInt8WeightConfig()
    else:
        model = model.to(torch.bfloat16)
        config = quantization.Int4WeightOnlyConfig(group_size=128, int4_packing_format="opaque")
    quantization.quantize_(model, config)
    return model


def bitsandbytes(model: nn.Module) -> nn.Module:
    import bitsandbytes as library

    model = model.to(torch.bfloat16)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        small = library.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, torch.bfloat16, quant_type="nf4"
        )
        small.load_state_dict(layer.state_dict())
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, small.to("cpu"))
    return model.eval()


def quanto(model: nn.Module, bits: int) -> nn.Module:
    from optimum import quanto as library

    library.quantize(model, weights=library.qint8 if bits == 8 else library.qint4)
    library.freeze(model)
    return model


def exported(model: nn.Module, ids: torch.Tensor, folder: str) -> str:
    path = f"{folder}/plain.onnx"
    torch.onnx.export(Plain(model), (ids,), path, input_names=["ids"], dynamo=True, verbose=False)
    return path


def onnxruntime(model: nn.Module, ids: torch.Tensor, threads: int) -> Built:
    import onnxruntime as library
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory() as folder:
        small = f"{folder}/int8.onnx"
        kinds = {"weight_type": quantization.QuantType.QInt8, "per_channel": True}
        quantization.quantize_dynamic(exported(model, ids, folder), small, **kinds)
        options = library.SessionOptions()
        options.intra_op_num_threads = threads
        session = library.InferenceSession(small, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"ids": x.numpy()})[0])


def openvino(model: nn.Module, ids: torch.Tensor, threads: int, bits: int) -> Built:
    import openvino as library

    read = library.convert_model(Plain(model), example_input=ids)
    read.reshape(list(ids.shape))
    if bits == 8:
        import nncf

        batches = [torch.randint(4, model.config.vocab_size, ids.shape).numpy() for _ in range(4)]
        kind = nncf.ModelType.TRANSFORMER
        read = nncf.quantize(read, nncf.Dataset(batches), subset_size=len(batches), model_type=kind)
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if bits == 32:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = library.compile_model(read, "CPU", settings)
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0])


# Scales by minmax: found at once, and speed does not depend on them.
OVP, INT4 = "ovp4-i8:row:minmax", "int4:row"
COMPILED = "torch.compile: "  # in front of a variant
# Variant → a torch module from the float model.
MODULES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch float32": lambda model: model,
    "torch bfloat16": lambda model: model.to(torch.bfloat16),
    "torch dynamic int8 (fbgemm)": fbgemm,
    "evenbits W8A8": lambda model: ours(model, "W8A8"),
    "evenbits W4A8_OVP": lambda model: ours(model, four_bits(OVP)),
    "evenbits int4 weights, int8 activations": lambda model: ours(model, four_bits(INT4)),
    "torchao int8 dynamic": lambda model: torchao(model, 8),
    "torchao int4 weights": lambda model: torchao(model, 4),
    "bitsandbytes nf4, bfloat16": bitsandbytes,
    "optimum-quanto int8 weights": lambda model: quanto(model, 8),
    "optimum-quanto int4 weights": lambda model: quanto(model, 4),
}
# Variant → a forward for ids of one shape.
GRAPHS: dict[str, Callable[[nn.Module, torch.Tensor, int], Built]] = {
    "ONNX Runtime dynamic int8": onnxruntime,
    "OpenVINO float32": lambda *given: openvino(*given, bits=32),
    "OpenVINO NNCF int8": lambda *given: openvino(*given, bits=8),
}


def calls(variant: str, name: str, threads: int, wrong: dict[str, str]) -> tuple[dict[str, Call], dict[str, float]]:
    """Task → one call, and task → dB of its output to float32's. `wrong` gets the reason where one cannot be had."""
    from evenbits.evaluation.latency import one_token

    plain = float_model(name)
    inputs = {task: token_ids(plain, batch) for task, batch in TASKS[name].items()}
    right = {task: Plain(plain)(ids) for task, ids in inputs.items()}
    module = None
    if variant not in GRAPHS:
        module = MODULES[variant.removeprefix(COMPILED)](copy.deepcopy(plain))
    found: dict[str, Call] = {}
    near: dict[str, float] = {}
    for task, ids in inputs.items():
        try:
            if module is None:
                run = GRAPHS[variant](plain, ids, threads)
            else:
                run = Plain(module)
                run = torch.compile(run) if variant.startswith(COMPILED) else run
            if task == "one token":
                if module is None:
                    raise RuntimeError("exported without a cache")
                whole = torch.compile(module) if variant.startswith(COMPILED) else module
                found[task] = one_token(whole, ids)
            else:
                found[task] = lambda run=run, ids=ids: run(ids)
            found[task]()
            near[task] = decibels(right[task], run(ids))
        except Exception as error:
            found.pop(task, None)
            wrong[task] = reason(error)
    return found, near


def decibels(right: torch.Tensor, given: torch.Tensor) -> float:
    noise = (given.float() - right).square().sum()
    return float(10 * torch.log10(right.square().sum() / noise.clamp_min(1e-30)))


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def main() -> None:
    variant, name, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(data: object) -> None:
        print(json.dumps(data), file=answers, flush=True)

    warnings.simplefilter("ignore")  # deprecations of the peers' own
    torch.set_num_threads(threads)
    wrong: dict[str, str] = {}
    found: dict[str, Call] = {}
    near: dict[str, float] = {}
    with torch.no_grad() if variant.startswith(COMPILED) else torch.inference_mode():
        try:
            found, near = calls(variant, name, threads, wrong)
        except Exception as error:
            wrong |= {task: reason(error) for task in TASKS[name]}
        answer({"tasks": list(found), "decibels": near, "wrong": wrong})
        clock = time.process_time if threads == 1 else time.perf_counter
        for line in sys.stdin:
            call = found[line.strip()]
            start = clock()
            call()
            answer(clock() - start)


if __name__ == "__main__":
    main()
