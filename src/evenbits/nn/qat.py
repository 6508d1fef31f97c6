"""Quantization-aware training: layers that compute in float what their integer twins will compute.

Rounding has a derivative of zero almost everywhere, so a network that rounds cannot learn. The straight-through
estimator lets the gradient pass as if nothing had been rounded, wherever the number could move:

    u = x / s    q = snap(u)    y = s · q

    a number that is         gradient to x     gradient to s, times 1 / √(n · largest value)
    inside the range               1           q − u    (n: how many share s, of activations the features)
    saturated                      0           q        (the limit)
    a victim                       1           0

In an outlier-victim pair the range of an outlier is that of the outlier codes, that of a normal value the normal ones.
A victim is zero because of its partner, whatever s is, so it says nothing about s. (With q − u instead, a scale that
was too small shrank for good.) Its own gradient passes (`VICTIM_GRADIENT`), which keeps it up to date for the moment
its partner frees it; stopping it made no difference that could be measured (docs/qat.md). Who is written and who is
the victim is decided anew in every forward.

Scales are s = start · exp(t), rounded to how the format stores them, the rounding straight through. `t` is the
parameter: s stays positive, a step of the optimizer is a relative one whatever the scale is, and weight decay pulls to
the searched scale instead of to zero.

Source: Y. Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013; S. Esser et al.,
"Learned Step Size Quantization", ICLR 2020; the pairs are C. Guo et al., "OliVe", ISCA 2023 (whose released code rounds
without an estimator). Left out: gradients of scales that are powers of two (MX) or fixed blocks (NV), zero points.

O: out, I: in, R: rows, K: columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import isnan
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from evenbits.algorithms.base import ActivationQuantizer
from evenbits.errors import EvenbitsError
from evenbits.nn.base import QuantizedLayer, check_formats
from evenbits.nn.conv import QConv2d
from evenbits.nn.linear import QLinear
from evenbits.numerics import elements, ovp, scales
from evenbits.numerics.codebook import Codebook
from evenbits.numerics.elements import PairType, TypeChoice
from evenbits.numerics.encode import encode
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.format import Format
from evenbits.numerics.qdtypes import QDtype
from evenbits.numerics.qtensor import QTensor

VICTIM_GRADIENT = True
_LIMITS = torch.finfo(torch.float32)
_ALLOWED = "symmetric integers, tables and pairs, one scale per tensor, row or group, such as 'int4:row', 'ovp4:g32'"


def fake_quant_ste(
    x: torch.Tensor,
    scale: torch.Tensor,
    fmt: str | Format,
    *,
    count: int | None = None,
    victim_gradient: bool = VICTIM_GRADIENT,
) -> torch.Tensor:
    """x (any float shape [..., K]) → what it is when encoded with these scales and decoded, same shape and type.

    scale: positive float32 of the shape that `fmt` has for x ([1], [R, 1] or [R, G]), used unrounded. count: n of LSQ's
    gradient scale, by default how many numbers share one. A row that holds a NaN or an infinity comes out as NaN.
    Raises EvenbitsError for affine, MX, NV, mixed and undecided formats and for scales of another shape.
    """
    fmt = Format.parse(fmt)
    _check_trainable(fmt)
    if len(members(fmt)) > 1:
        raise EvenbitsError(f"{fmt} is still a choice; name one of {', '.join(map(str, members(fmt)))}.")
    if not x.numel():
        return x
    fmt = fmt.fitted(tuple(x.shape))
    expected = fmt.granularity.scale_shape(tuple(x.shape))
    if tuple(scale.shape) != expected:
        raise EvenbitsError(f"{fmt} of shape {list(x.shape)} has scales {list(expected)}; given {list(scale.shape)}.")
    x_RK = fmt.granularity.matrix(x)
    columns = fmt.stored_columns(x_RK.shape[1])
    x_RK = nn.functional.pad(_wide(x_RK), (0, columns - x_RK.shape[1]))
    step = ((count or max(1, x.numel() // scale.numel())) * elements.largest(fmt.dtype)) ** -0.5
    spread = fmt.granularity.spread(scale, columns)
    top = torch.finfo(torch.float32 if x.dtype == torch.float64 else x.dtype).max  # as `dequantize`: finite
    y_RK = _FakeQuantSTE.apply(x_RK, spread, fmt, step, victim_gradient, top)  # type: ignore[no-untyped-call]
    return fmt.granularity.unmatrix(y_RK[:, : x.numel() // len(x_RK)], tuple(x.shape)).to(x.dtype)


class _FakeQuantSTE(torch.autograd.Function):
    """x [R, K] and scales that broadcast against it → s · snap(x / s), float32."""

    @staticmethod
    def forward(
        ctx: Any, x_RK: torch.Tensor, scale: torch.Tensor, fmt: Format, step: float, victim_gradient: bool, top: float
    ) -> torch.Tensor:
        broken_R1 = ~x_RK.isfinite().all(dim=1, keepdim=True)
        u_RK, q_RK = _snap(x_RK.masked_fill(broken_R1, 0.0), scale, fmt)
        if any(ctx.needs_input_grad):
            written_RK, victim_RK = passes(u_RK, q_RK, fmt)
            residual_RK = torch.where(written_RK, q_RK - u_RK, q_RK) if ctx.needs_input_grad[1] else None
            ctx.save_for_backward(written_RK | victim_RK if victim_gradient else written_RK, residual_RK)
        ctx.step, ctx.scale_shape = step, scale.shape
        y_RK = (q_RK * scale + 0.0).clamp_(-top, top)  # no minus zero: bytes have none
        return y_RK.masked_fill_(broken_R1, torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        moves_RK, residual_RK = ctx.saved_tensors
        grad_x = grad_RK * moves_RK if ctx.needs_input_grad[0] else None
        if residual_RK is None:
            return grad_x, None, None, None, None, None
        grad_scale = (grad_RK * residual_RK * ctx.step).sum_to_size(ctx.scale_shape)
        return grad_x, grad_scale, None, None, None, None


def passes(u_RK: torch.Tensor, q_RK: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """From scaled numbers and what they became: which are written unsaturated, which are victims; bool [R, K] each."""
    element = fmt.dtype
    if isinstance(element, PairType):
        kind = ovp.pair_kind(element.kind)
        outlier = q_RK.abs() > kind.normal_max
        victim = outlier.reshape(-1, 2).flip(1).reshape(outlier.shape)
        limit = torch.where(outlier, float(kind.largest), float(kind.normal_max))
        return (u_RK.abs() <= limit) & ~victim, victim
    if isinstance(element, Codebook):
        used = [value for value in element.values if not isnan(value)]
        low, high = min(used), max(used)
    else:
        low, high = fmt.code_range
    return (u_RK >= low) & (u_RK <= high), torch.zeros_like(u_RK, dtype=torch.bool)


def members(fmt: Format) -> tuple[Format, ...]:
    """The formats that `fmt` leaves open ("ovp4:row": int or flint pairs; "ant4:row": three types), or itself."""
    element = fmt.dtype
    if isinstance(element, TypeChoice):
        return tuple(replace(fmt, dtype=member) for member in element.choices)
    if isinstance(element, PairType) and element.is_choice:
        return tuple(replace(fmt, dtype=element.with_kind(kind)) for kind in element.choices)
    return (fmt,)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _snap(x_RK: torch.Tensor, scale: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    u_RK = x_RK / scale if isinstance(fmt.dtype, QDtype) else (x_RK / scale).float()  # float64 as `encode` has it
    return u_RK, elements.snap(u_RK, fmt.dtype, fmt.rule.policy, full_range=fmt.rule.full_range).float()


def _check_trainable(fmt: Format) -> None:
    mixed = isinstance(fmt.dtype, PairType) and fmt.dtype.kind == "mix"
    if mixed or fmt.rule.block or not fmt.rule.symmetric:
        why = "a kind for each group" if mixed else "fixed blocks" if fmt.rule.block else "a zero point"
        raise EvenbitsError(f"{fmt} has {why}, which cannot be trained. Allowed: {_ALLOWED}.")


class FakeQuantizer(nn.Module):
    """A symmetric format with a learnable scale; what it returns is what encoding with that scale would give.

    log_scale: the parameter t, float32 of the scales' shape, zero at the start; start_scale: float32, its origin;
    choice: int64 scalar, which of `members(fmt)` was taken, −1 before the first tensor was seen.
    start_factor: float32 [1], the factor of E4M3 scales; it grows when scales do and never shrinks.
    shape: of the matrix, or None for an activation, whose one scale serves every shape.
    """

    start_scale: torch.Tensor
    start_factor: torch.Tensor
    choice: torch.Tensor

    def __init__(self, fmt: Format, shape: tuple[int, int] | None = None) -> None:
        super().__init__()
        _check_trainable(fmt)
        if shape is None and fmt.granularity.kind != "tensor":
            raise EvenbitsError(f"a learnt activation scale is one per tensor, such as 'int8:tensor'; given {fmt}.")
        self.asked = fmt if shape is None else fmt.fitted(shape)
        self.members, self.is_input = members(self.asked), shape is None
        self.victim_gradient = VICTIM_GRADIENT
        size = (1,) if shape is None else self.members[0].granularity.scale_shape(shape)
        self.register_buffer("choice", torch.tensor(-1))
        self.register_buffer("start_scale", torch.ones(size))
        self.register_buffer("start_factor", torch.zeros(1))
        self.log_scale = nn.Parameter(torch.zeros(size))

    @property
    def format(self) -> Format:
        """The format, its choices resolved. Raises EvenbitsError before a tensor was seen."""
        if int(self.choice) < 0:
            raise EvenbitsError("an activation has no scale yet: run the model on a batch first.")
        return self.members[int(self.choice)]

    @torch.no_grad()
    def start(self, fmt: Format, scale: torch.Tensor, factor: torch.Tensor | None = None) -> None:
        """Starts from a format (one of `members`) and real scales, such as calibrated ones."""
        if fmt not in self.members or scale.shape != self.start_scale.shape:
            raise EvenbitsError(f"{fmt} with scales {list(scale.shape)} does not fit {self.members[0]}.")
        self.choice.fill_(self.members.index(fmt))
        self.start_factor.copy_(torch.zeros(1) if factor is None else factor)
        self.start_scale.copy_(scale)
        self.log_scale.zero_()

    @torch.no_grad()
    def start_from(self, x_RK: torch.Tensor) -> None:
        """Starts from the scales and the kind that `encode` finds for x [R, K]. Raises EvenbitsError as `encode`."""
        found = encode(x_RK, self.asked)
        scale = found.scales()
        # A group of zeros says nothing about its scale; should it come to life, its neighbours' is the better guess.
        tops = [block.abs().amax(dim=2) for block in found.format.granularity.blocks(x_RK)]
        used = (torch.cat(tops, dim=1) != 0).reshape(scale.shape)
        scale = torch.where(used, scale, scale[used].median()) if bool(used.any()) else scale
        self.start(found.format, scale, found.global_scale if found.format.storage == "e4m3" else None)

    def stored(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The scales as stored, and the factor they are relative to (numerics/scales.py). No gradient."""
        scale, storage = self._exact().detach(), self.format.storage
        factor = scales.factor_for(scale, storage)
        if factor is not None and storage == "e4m3":
            factor = torch.maximum(factor, self.start_factor)
        return scales.store(scale, storage, factor), factor

    def scale(self) -> torch.Tensor:
        """The scales after storing, float32; the gradient passes the rounding straight through to `log_scale`."""
        exact = self._exact()
        return scales.real(*self.stored()) + (exact - exact.detach())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FakeQuantizer:
        # `.half()` and `.to(bfloat16)` change activations, never the origin of the scales.
        kept = self.start_scale, self.start_factor
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.start_scale, self.start_factor = (tensor.to(self.choice.device) for tensor in kept)
        return self

    def _exact(self) -> torch.Tensor:
        return (self.start_scale * self.log_scale.float().exp()).clamp(_LIMITS.tiny, _LIMITS.max)

    def forward(self, x_RK: torch.Tensor) -> torch.Tensor:
        """x [R, K] → its fake-quantized values; the first x that is not all zero gives an activation its start."""
        if int(self.choice) < 0:
            if not x_RK.numel() or not bool(x_RK.any()):
                return x_RK
            self.start_from(x_RK.detach())
        count = x_RK.shape[1] if self.is_input else None  # of activations LSQ counts the features, not the batch
        return fake_quant_ste(x_RK, self.scale(), self.format, count=count, victim_gradient=self.victim_gradient)


class QATLayer(nn.Module):
    """Base of the twins: a float weight, its quantizer, and, if inputs are quantized, theirs.

    weight: float Parameter [O, ...], taken over as it is; bias: float [O] or None. activation: the input's format, with
    a scale if it is calibrated. dynamic: take the input's scales from each input, as the layer will, and learn none;
    otherwise the first batch gives the scale its start (before DistributedDataParallel copies parameters, please).
    extra: what else the integer layer (`target`) wants: a convolution's geometry.
    Raises EvenbitsError for formats that cannot be trained and for weights that are not finite.
    """

    target: type[QuantizedLayer]

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        fmt: str | Format,
        activation: ActivationQuantizer | None = None,
        *,
        dynamic: bool = False,
        **extra: Any,
    ) -> None:
        super().__init__()
        self.extra = extra
        check_formats(Format.parse(fmt), None if activation is None else activation.format)
        self.weight, self.bias = weight, bias
        weight_OK = weight.detach().flatten(1)
        self.weight_quantizer = FakeQuantizer(Format.parse(fmt), (len(weight_OK), weight_OK.shape[1]))
        self.weight_quantizer.to(weight.device).start_from(weight_OK)
        self.input_quantizer: FakeQuantizer | None = None
        self.input_format = None if activation is None else activation.format
        if activation is not None:
            _check_trainable(activation.format)
            self.input_quantizer = None if dynamic else FakeQuantizer(activation.format).to(weight.device)
        if activation is not None and activation.scale is not None and self.input_quantizer is not None:
            self.input_quantizer.start(activation.format, activation.scale)

    def fake_weight(self) -> torch.Tensor:
        """The weight as its codes will decode, in its own shape and type."""
        return self.weight_quantizer(self.weight.flatten(1)).view(self.weight.shape)  # type: ignore[no-any-return]

    def fake_input(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] (what shares a scale: a token, an image) as the layer will see it, rows laid as there too."""
        if self.input_format is None or not x.numel():
            return x
        if self.input_quantizer is None:
            return fake_quantize(x.detach(), self.input_format) + (x - x.detach())
        return self.input_quantizer(x.reshape(-1, x.shape[-1])).contiguous().view(x.shape)  # type: ignore[no-any-return]

    @torch.no_grad()
    def qweight(self) -> QTensor:
        """The weight's matrix view [O, K] as real packed codes. Raises EvenbitsError if a parameter is not finite."""
        weight_OK, quantizer = self.weight.detach().flatten(1), self.weight_quantizer
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters()):
            raise EvenbitsError("a parameter or a scale is NaN or infinite: the training diverged.")
        fmt, shape, (stored, factor) = quantizer.format, tuple(weight_OK.shape), quantizer.stored()
        columns = fmt.stored_columns(shape[1])
        x_OK = nn.functional.pad(_wide(weight_OK), (0, columns - shape[1]))
        _, q_OK = _snap(x_OK, fmt.granularity.spread(scales.real(stored, factor), columns), fmt)
        packed = elements.pack_values(q_OK, fmt.dtype)
        return QTensor(packed, stored, None, fmt, shape, weight_OK.dtype, factor)

    def to_quantized(self) -> QuantizedLayer:
        """The integer layer whose output is this one's. Raises EvenbitsError if an input scale was never started."""
        activation = None if self.input_format is None else ActivationQuantizer(self.input_format)
        weight, shape = self.qweight(), tuple(self.weight.shape)
        if (quantizer := self.input_quantizer) is not None:
            activation = ActivationQuantizer(quantizer.format, quantizer.stored()[0])
        return self.target(weight, shape, self.bias, activation, **self.extra).to(self.weight.device)

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, weight={self.weight_quantizer.asked}, input={self.input_format or 'float'}"


class QATLinear(QATLayer):
    """x [..., I] → [..., O] in float, with the roundings of a QLinear."""

    target = QLinear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.fake_input(x), self.fake_weight().to(x.dtype), self.bias)


class QATConv2d(QATLayer):
    """x [N, C, H, W] (or [C, H, W]) → [N, O, H', W'] in float, with the roundings of a QConv2d."""

    target = QConv2d

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        shape = self.extra["geometry"]
        x = self.fake_input(x.flatten(1)).view(x.shape)
        if any(shape["padding"]):
            mode = "constant" if shape["padding_mode"] == "zeros" else shape["padding_mode"]
            x = nn.functional.pad(x, shape["padding"], mode=mode)
        where = shape["stride"], 0, shape["dilation"], shape["groups"]
        return nn.functional.conv2d(x, self.fake_weight().to(x.dtype), self.bias, *where)
