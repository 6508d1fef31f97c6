"""The calibrated scale of least squared error for a whole activation, without keeping the activation.

Every candidate's squared error is added up batch by batch; what is kept is one number per candidate. For pairs the
candidates are multiples of three standard deviations, as OliVe anchors them (`3sigma`: the released 88), and the
largest value; for all other types fractions of the largest value; under `minmax` only that value itself. Types that are
a choice compete with one another. What saw nothing but zeros gets scale 1, as everywhere.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from evenbits.errors import EvenbitsError
from evenbits.numerics import elements
from evenbits.numerics.affine import symmetric_scale
from evenbits.numerics.blocks import Block
from evenbits.numerics.elements import PairType, TypeChoice
from evenbits.numerics.format import Format

_PAIR_RATIOS = tuple(0.2 * 1.04**i for i in range(66))  # 0.2 … 2.56 times 3σ
_RATIOS = tuple(1.05**-i for i in range(40))  # 1.0 … 0.15 times absmax
_RELEASED = tuple(percent / 100 for percent in range(75, 250, 2))
_TINY = torch.finfo(torch.float32).tiny


class ScaleSearch:
    """First `measure` every batch, then `update` with every batch again, then take `best`.

    Raises EvenbitsError for affine formats and percentiles, which are not searched, and for negative numbers in an
    unsigned format.
    """

    def __init__(self, fmt: Format) -> None:
        element = fmt.dtype
        if not fmt.rule.symmetric or fmt.rule.range == "percentile":
            raise EvenbitsError(
                f"{fmt}: a calibrated scale is searched for symmetric formats, by mse or 3sigma, or spans the range "
                "(minmax); leave the other options out, or use dynamic: true."
            )
        if isinstance(element, TypeChoice):
            self._members = [replace(fmt, dtype=member) for member in element.choices]
        elif isinstance(element, PairType) and len(element.choices) > 1:
            self._members = [replace(fmt, dtype=element.with_kind(kind)) for kind in element.choices]
        else:
            self._members = [fmt]
        self._sum = self._squares = self._absmax = 0.0
        self._count = 0
        self._errors: dict[tuple[int, int], float] = {}

    def measure(self, x: torch.Tensor) -> None:
        """Adds a tensor to the mean, deviation and largest value."""
        if not x.numel():
            return
        symmetric_scale(x.amin().float(), x.amax().float(), self._members[0])  # refuses negatives in an unsigned format
        self._sum += float(x.double().sum())
        self._squares += float(x.double().square().sum())
        self._absmax = max(self._absmax, float(x.abs().max()))
        self._count += x.numel()

    def update(self, x: torch.Tensor) -> None:
        """Adds a tensor [..., K] to the error of every candidate."""
        if not x.numel():
            return
        x_MK = x.reshape(-1, x.shape[-1]).float()
        padding = self._members[0].stored_columns(x_MK.shape[1]) - x_MK.shape[1]
        block = Block(torch.nn.functional.pad(x_MK, (0, padding)).unsqueeze(1), shared=True)
        for member, fmt in enumerate(self._members):
            for index, scale in enumerate(self._scales(fmt)):
                error = float(block.error(torch.tensor([[scale]], device=x.device), fmt, fmt.rule.policy))
                self._errors[member, index] = self._errors.get((member, index), 0.0) + error

    def best(self) -> tuple[Format, torch.Tensor]:
        """The format (choices resolved) and scale, float32 [1], of least error. Raises EvenbitsError if unused."""
        if not self._errors:
            raise EvenbitsError("no calibration data reached this layer.")
        member, index = min(self._errors, key=self._errors.__getitem__)
        fmt = self._members[member]
        return fmt, torch.tensor([self._scales(fmt)[index]], dtype=torch.float32)

    def _scales(self, fmt: Format) -> list[float]:
        largest = elements.largest(fmt.dtype)
        if self._absmax == 0:
            return [1.0]
        if fmt.rule.range == "minmax":
            return [max(self._absmax / largest, _TINY)]
        if not isinstance(fmt.dtype, PairType):
            return [max(ratio * self._absmax / largest, _TINY) for ratio in _RATIOS]
        mean = self._sum / max(1, self._count)
        deviation = max(0.0, self._squares / max(1, self._count) - mean**2) ** 0.5
        base = max(abs(mean + 3 * deviation), abs(mean - 3 * deviation))
        released = fmt.rule.range == "3sigma"
        # 8-bit pairs may want a larger scale than any multiple of 3σ here; ours is never worse than spanning.
        tops = [ratio * base for ratio in _RELEASED] if released else [*(r * base for r in _PAIR_RATIOS), self._absmax]
        return [max(top / largest, _TINY) for top in tops]
