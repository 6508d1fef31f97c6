"""The squared error of pairs under many scales: the same choices as `ovp.snap` makes, without writing the pairs.

With u = |x| / scale, n(u) the nearest normal value and o(u) the nearest outlier, a pair (u₀, u₁) costs

    normal  (n(u₀) − u₀)² + (n(u₁) − u₁)²      even stays  (o(u₀) − u₀)² + u₁²      odd stays  u₀² + (o(u₁) − u₁)²

and the optimal policy takes the least. All alphabets are symmetric, so signs play no part; n and o are closed forms (a
rounding, or an addition to the bits of a float), so a scale costs about twenty passes over numbers that stay in the
cache, whatever share of them are outliers. Ties may fall either way: their error is the same.

R: rows, G: groups, P: pairs of a group.
"""

from __future__ import annotations

import torch

from evenbits.numerics.ovp import PairKind, nearest_outlier


class PairLoss:
    """Magnitudes of groups, relative to `unit`, and room to try scales on them."""

    def __init__(self, x_RGg: torch.Tensor, unit_RG: torch.Tensor, importance_Gg: torch.Tensor | None) -> None:
        """x: groups of an even size; unit: positive, [R, G] or [1, 1]; importance: weights of the squared error."""
        relative = (x_RGg / unit_RG.unsqueeze(-1)).float().abs_()
        rows, groups, size = relative.shape
        # Short groups one beside the other: loops over sixteen numbers would be mostly loop.
        self._across = size // 2 < rows * groups
        self._x_2RGP = self._halves(relative)
        del relative  # its room is wanted
        self._h_21GP = None if importance_Gg is None else self._halves(importance_Gg.unsqueeze(0))
        self._u, self._n, self._o = (torch.empty_like(self._x_2RGP) for _ in range(3))

    def _halves(self, x_RGg: torch.Tensor) -> torch.Tensor:
        """Even and odd elements, each [R, G, P], or [P, R, G] where groups lie beside each other."""
        even, odd = x_RGg[..., 0::2], x_RGg[..., 1::2]
        if self._across:
            even, odd = even.movedim(-1, 0), odd.movedim(-1, 0)
        both = x_RGg.new_empty(2, *even.shape)  # torch.stack may keep the order of strides
        both[0].copy_(even)
        both[1].copy_(odd)
        return both

    def __call__(self, scale_RG: torch.Tensor | float, kind: PairKind, policy: str) -> torch.Tensor:
        """Squared errors float32 [R, G], in squares of the unit. scale: in units, [R, G], or one for all."""
        scale_RG = torch.as_tensor(scale_RG, dtype=torch.float32, device=self._u.device)
        inverse = scale_RG.reciprocal()
        u = torch.mul(self._x_2RGP, inverse if self._across else inverse.unsqueeze(-1), out=self._u)
        n, o = self._n, self._o
        far = None if policy == "optimal" else u >= kind.threshold
        even_wins = u[0] >= u[1] if policy == "paper" else None
        nearest_normal(u, kind, out=n, room=o).sub_(u).square_()
        nearest_outlier(u, kind, out=o).sub_(u).square_()
        u.square_()
        if self._h_21GP is not None:
            for part in (n, o, u):
                part.mul_(self._h_21GP)
        normal, even, odd = n[0].add_(n[1]), o[0].add_(u[1]), o[1].add_(u[0])
        if far is None:
            least = torch.minimum(torch.minimum(even, odd, out=even), normal, out=normal)
        else:
            keeps_even = far[0] if even_wins is None else far[0] & (~far[1] | even_wins)
            least = torch.where(keeps_even, even, torch.where(far[1], odd, normal))
        return least.sum(dim=0 if self._across else -1) * scale_RG.square()


def nearest_normal(magnitude: torch.Tensor, kind: PairKind, *, out: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """The nearest normal values of magnitudes, written to `out`; ties either way. room: like out, overwritten.

    flint is 0 … 4 in steps of one, to 8 in steps of two, then 16: three roundings, each of its own part.
    """
    if not kind.name.startswith("flint"):
        return torch.round(magnitude, out=out).clamp_(max=kind.normal_max)
    torch.clamp(magnitude, max=4, out=out).round_()
    out.add_(torch.clamp(magnitude, 4, 8, out=room).mul_(0.5).round_(), alpha=2)
    room.copy_(magnitude).view(torch.int32).add_((1 << 22) - 1).bitwise_and_(-(1 << 23))  # to a power of two
    return out.add_(room.clamp_(8, 16)).sub_(12)
