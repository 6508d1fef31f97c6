"""The quantizers of collapse.py: tensor in, tensor of the same shape out, at any number of bits.

minmax     one grid from the smallest to the largest element; zero lies between two points of it
zero       the same with zero in the range and on the grid
multi      equal-count parts of the sorted elements, a min/max grid in each
grouped    a symmetric grid per 128 elements

Up to 8 bits these are the codecs of evenbits.comms.codecs, decode(encode(x)). Above, the same formulas are evaluated in
double precision without making bytes: what is studied there is the error. Codecs of the same widths exist; they round
their metadata, so that a few elements fall on the neighbouring point.

Three more change ONE thing about the error of a gradient, its mean, and leave the rest as it is:

minmax-centred   minmax, then its mean error is subtracted from every element
minmax-channels  minmax, then each channel's mean error is subtracted from its elements
zero-shifted     zero, then the mean error that minmax makes of the same tensor is added to every element
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta

Quantizer = Callable[[Tensor], Tensor]

# True bits → bits inside a part and parts. 11 and 8 are the settings of the experiment that is explained.
PARTS = {4: (2, 4), 6: (4, 4), 8: (4, 16), 10: (7, 8), 11: (8, 8), 12: (8, 16), 16: (12, 16)}
METHODS = ("minmax", "zero", "multi", "grouped")
SETS = (1, 2, 4, 8, 16, 32, 64)  # parts of 8 bits each, spelled multi8xP: 8 + log2 P true bits and their grids
INTERVENTIONS = ("minmax-centred", "minmax-channels", "zero-shifted")
_GROUP = 128


def coded(spec: str) -> Quantizer:
    """decode(encode(x)) of a codec."""
    codec = get(spec)

    def both(x: Tensor) -> Tensor:
        return codec.decode(codec.encode(x), Meta.of(x))

    return both


def _grid(x: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x in steps above `low`, in double precision, and the step (1 where the range is empty)."""
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, torch.ones_like(step))
    return (x - low) / step, step


def minmax(x: Tensor, bits: int) -> Tensor:
    """round((x − min) / step) · step + min."""
    wide = x.double()
    low = wide.amin()
    places, step = _grid(wide, low, wide.amax(), bits)
    return (places.round() * step + low).to(x.dtype)


def zero(x: Tensor, bits: int) -> Tensor:
    """The same grid, widened to zero and moved so that zero is one of its points."""
    wide = x.double()
    low, high = wide.amin().clamp(max=0), wide.amax().clamp(min=0)
    places, step = _grid(wide, torch.zeros_like(low), high - low, bits)
    point = (-low / step).round()
    return (((places.round() + point).clamp(0, 2**bits - 1) - point) * step).to(x.dtype)


def multi(x: Tensor, bits: int, parts: int) -> Tensor:
    """Parts of equal count of the sorted elements, each with its own min/max grid."""
    values, order = x.flatten().sort(descending=True)
    made = torch.cat([minmax(part, bits) for part in values.chunk(parts)])
    return torch.empty_like(made).scatter_(0, order, made).view_as(x)


def grouped(x: Tensor, bits: int) -> Tensor:
    """absmax / (2^(b−1) − 1) per 128 elements of the flattened tensor."""
    flat = x.double().flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % _GROUP)).view(-1, _GROUP)
    top = 2 ** (bits - 1) - 1
    scale = padded.abs().amax(dim=1, keepdim=True) / top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return ((padded / scale).round().clamp(-top, top) * scale).flatten()[: flat.numel()].view_as(x).to(x.dtype)


def quantizer(method: str, bits: int) -> Quantizer:
    """The quantizer of a method at so many true bits."""
    if method == "none":
        return lambda x: x
    if method in INTERVENTIONS:
        return _intervention(method, bits)
    if method.startswith("multi") and method != "multi":
        return coded(method)
    if method == "multi":
        inside, parts = PARTS[bits]
        return coded(f"multi{inside}x{parts}") if inside <= 8 else lambda x: multi(x, inside, parts)
    if bits <= 8:
        spelled = {
            "minmax": f"uint{bits}:tensor:affine:free",
            "zero": f"uint{bits}:tensor:affine",
            "grouped": f"int{bits}:g{_GROUP}",
        }
        return coded(spelled[method])
    formula = {"minmax": minmax, "zero": zero, "grouped": grouped}[method]
    return lambda x: formula(x, bits)


def _intervention(method: str, bits: int) -> Quantizer:
    off, on = quantizer("minmax", bits), quantizer("zero", bits)

    def centred(x: Tensor) -> Tensor:
        made = off(x)
        return made - (made - x).double().mean().to(x.dtype)

    def channels(x: Tensor) -> Tensor:
        made = off(x)
        places = [d for d in range(x.ndim) if d != 1]
        return made - (made - x).double().mean(dim=places, keepdim=True).to(x.dtype)

    def shifted(x: Tensor) -> Tensor:
        return on(x) + (off(x) - x).double().mean().to(x.dtype)

    return {"minmax-centred": centred, "minmax-channels": channels, "zero-shifted": shifted}[method]
