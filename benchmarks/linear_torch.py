"""torch's own int8 and 4-bit products for linear_cpu.py: what core torch offers on a CPU, whole and product alone.

"Alone" leaves out what a layer needs besides: quantizing activations and, for int32 results, scaling them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

Variant = Callable[[], torch.Tensor]
GROUP = 128


def products(x: torch.Tensor, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> dict[str, Variant]:
    """Name → one call. x: float32 [M, K]; codes int8 [N, K] and scale float32 [N, 1]: of weight [N, K]. Every call has
    a copy of the weights of its own: none finds what the one before it has read."""
    half = x.bfloat16()
    rows = x.abs().amax(1, keepdim=True) / 127
    x_codes = (x / rows).round().to(torch.int8)
    u8 = (x_codes.int() + 128).to(torch.uint8)
    n, k = weight.shape
    packed, packed_alone = (torch.ops.onednn.qlinear_prepack(codes, list(x.shape)) for _ in range(2))
    scales, zeros = scale.flatten(), torch.zeros(n, dtype=torch.int64)
    half_scales = scales.bfloat16()
    alone = codes.clone()
    int8 = codes.clone()
    codes = codes.clone()
    pack4 = torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (n, k), dtype=torch.int32), 1)
    scales_zeros = torch.rand(k // GROUP, n, 2).bfloat16()

    def int_mm() -> torch.Tensor:
        rows = x.abs().amax(1, keepdim=True) / 127
        return torch._int_mm((x / rows).round_().to(torch.int8), codes.t()).float() * (rows * scale.t())

    def onednn(given: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            given, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return found

    def quantized_onednn() -> torch.Tensor:
        rows = x.abs().amax(1, keepdim=True) / 127
        return onednn((x / rows).round_().add_(128).to(torch.uint8), packed) * rows

    return {
        "torch._int_mm + eager quantization": int_mm,
        "torch._int_mm alone": lambda: torch._int_mm(x_codes, alone.t()),
        "oneDNN qlinear u8 + eager quantization": quantized_onednn,
        "oneDNN qlinear u8 alone": lambda: onednn(u8, packed_alone),
        "torch dynamic int8 (fbgemm)": fbgemm(x, weight),
        "torch int8 weights, bfloat16": lambda: torch._weight_int8pack_mm(half, int8, half_scales),
        "torch int4 weights g128, bfloat16": lambda: torch._weight_int4pack_mm_for_cpu(
            half, pack4, GROUP, scales_zeros
        ),
    }


def fbgemm(x: torch.Tensor, weight: torch.Tensor) -> Variant:
    """torch's dynamically quantized linear layer (one activation scale per tensor)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight
        layer.qconfig = torch.ao.quantization.per_channel_dynamic_qconfig
        quantized = torch.ao.nn.quantized.dynamic.Linear.from_float(layer)
    return lambda: quantized(x)
