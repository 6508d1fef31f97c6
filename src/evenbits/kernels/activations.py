"""The functions an epilogue may apply, by the very float32 operations of the C kernels (cpu/csrc/numbers.h).

Every product and sum is rounded by itself, so that all backends give the same bits. They are within 3e-7 of the exact
functions, relative to max(1, |x|). relu, gelu (with erf), gelu_tanh (its common approximation), silu.
"""

from __future__ import annotations

import torch

from evenbits.errors import unknown_name

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_ERFC = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_MAGIC = 12582912.0  # 1.5 · 2²³: adding it rounds to an integer, which is then in the low bits


def check_activation(name: str) -> None:
    """Raises EvenbitsError for a name that is not in ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise unknown_name("activation function", name, ACTIVATIONS)


def apply_activation(y: torch.Tensor, name: str) -> torch.Tensor:
    """float32 → float32, elementwise."""
    if name == "relu":
        return torch.where(y < 0, 0.0, y)
    if name == "silu":
        return y / (1.0 + _exp(-y))
    if name == "gelu_tanh":
        return y / (1.0 + _exp(-(y * (1.5957691216 + 0.0713548162726 * (y * y)))))
    return _gelu(y) if name == "gelu" else y


def _exp(x: torch.Tensor) -> torch.Tensor:
    t = x.clamp(-87.0, 88.0)
    z = t * 1.44269504088896341 + _MAGIC
    n = z - _MAGIC
    power = ((z.view(torch.int32) - 0x4B400000 + 127) << 23).view(torch.float32)
    r = (t - n * 0.693359375) - n * -2.12194440e-4
    p = torch.full_like(r, _EXP[0])
    for coefficient in _EXP[1:]:
        p = p * r + coefficient
    return ((p * r) * r + r + 1.0) * power


def _gelu(x: torch.Tensor) -> torch.Tensor:
    z = x.abs() * 0.70710678118654752
    t = 1.0 / (1.0 + 0.3275911 * z)
    p = torch.full_like(t, _ERFC[0])
    for coefficient in _ERFC[1:]:
        p = p * t + coefficient
    half = (0.5 * x) * ((p * t) * _exp(-(z * z).clamp(max=60.0)))
    return torch.where(x > 20.0, x, torch.where(x > 0, x - half, half))
