"""What every kernel does with a sum: scales as they are stored, activation functions by activations.py's operations.

Launched with fused multiply-adds off: every product and sum is rounded by itself, in the order written, as the CPU
kernels and torch do it.
"""

from __future__ import annotations

import triton
import triton.language as tl

_FLOAT, _E4M3, _E8M0 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def scale_at(pointer, mask, factor, unit, KIND: tl.constexpr):
    """A stored scale → float32, times the tensor's factor (a pointer, or None) and `unit`. KIND: 0 float32 or float16,
    1 E4M3 and 2 E8M0, both read as bytes: GPUs before 8.9 have no instruction for them."""
    stored = tl.load(pointer, mask=mask, other=0)
    if KIND == _E8M0:
        code = stored.to(tl.int32)
        scale = tl.where(code == 0, 0x00400000, code << 23).to(tl.float32, bitcast=True)
    else:
        if KIND == _E4M3:
            code = stored.to(tl.int32)
            small = code.to(tl.float32) * 0.001953125
            large = tl.where(code == 127, 0x7FC00000, (code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
            scale = tl.where(code < 8, small, large)
        else:
            scale = stored.to(tl.float32)
        if factor is not None:
            scale = tl.minimum(scale * tl.load(factor), _LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return scale * unit


@triton.jit
def _exp(x):
    t = tl.maximum(x, -87.0, propagate_nan=tl.PropagateNan.ALL)
    t = tl.minimum(t, 88.0, propagate_nan=tl.PropagateNan.ALL)
    z = t * 1.44269504088896341 + _MAGIC
    n = z - _MAGIC
    power = ((z.to(tl.int32, bitcast=True) - 0x4B400000 + 127) << 23).to(tl.float32, bitcast=True)
    r = (t - n * 0.693359375) - n * -2.12194440e-4
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    return ((p * r) * r + r + 1.0) * power


@triton.jit
def _gelu(x):
    z = tl.abs(x) * 0.70710678118654752
    t = tl.div_rn(1.0, 1.0 + 0.3275911 * z)
    p = 1.061405429 * t + -1.453152027
    p = p * t + 1.421413741
    p = p * t + -0.284496736
    p = p * t + 0.254829592
    half = (0.5 * x) * ((p * t) * _exp(-tl.minimum(z * z, 60.0)))
    return tl.where(x > 20.0, x, tl.where(x > 0, x - half, half))


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    """float32 → float32, by name."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == "silu":
        y = tl.div_rn(y, 1.0 + _exp(-y))
    elif ACTIVATION == "gelu_tanh":
        y = tl.div_rn(y, 1.0 + _exp(-(y * (1.5957691216 + 0.0713548162726 * (y * y)))))
    elif ACTIVATION == "gelu":
        y = _gelu(y)
    return y


@triton.jit
def biased(y, bias, offsets, mask):
    """y + bias, which may be None; offsets, mask: of the outputs, shaped to broadcast against y."""
    if bias is not None:
        y = y + tl.load(bias + offsets, mask=mask, other=0.0)
    return y
