"""SmoothQuant: moves the difficulty of outlier channels from activations into weights.

What. A few input channels of a layer are 10 to 100 times larger than the rest. One scale for the whole activation then
leaves most channels two or three codes. Dividing channel j of the activation by s_j and multiplying column j of the
weight by s_j changes nothing in real numbers, and evens both out:

    X̂ = X · diag(s)⁻¹      Ŵ = W · diag(s)      s_j = max|X_j|^α / max|W_j|^(1−α)

α, the migration strength, splits the difficulty: 0 leaves all of it in X, 1 moves all of it into W, 0.5 shares it.

When it helps. Static per-tensor activations above all: that is where outliers cost most. With dynamic per-token scales
a bad α is worse than none (published for Llama-3-8B: perplexity 21.2 at α = 0.25 against 8.36 without). At 4-bit
activations it is not enough.

Shared inputs. Every layer that reads the same tensor (q, k, v; gate, up) must see the same s, so max|W_j| runs over all
of them. This is why the method works on regions, not on layers.

Dead channels. Where either statistic is zero the formula gives 0, infinity or NaN; s is 1 there. Clamping to 1e-5
instead multiplies a norm's gain by 10⁵, which is infinite in float16 (the reference implementation does this).

Clamps. max|W_j| ≥ 1e-5 as in the reference; s is limited to [1e-4, 1e4], so that a nearly dead channel cannot claim the
weight's whole range.

α may be a number or searched per region (`auto`, algorithms/alpha.py) with the quantizer that will be deployed.

Left out: the per-architecture table of which layers to smooth; regions are found by watching the model run.

Source: G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
ICML 2023, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch

from evenbits.algorithms.alpha import ALPHA_FORMS, AlphaGrid, Search, search_alpha
from evenbits.algorithms.base import Rebalance, balance_method
from evenbits.errors import EvenbitsError

_WEIGHT_FLOOR = 1e-5
_LIMITS = (1e-4, 1e4)


@balance_method()
def smoothquant(
    act_absmax_I: torch.Tensor,
    weights_RI: Sequence[torch.Tensor],
    *,
    alpha: float | str = 0.5,
    criterion: str = "loss",
) -> Rebalance | Search:
    """Smoothing factors of one region.

    act_absmax_I: [I], max |X_j| over the calibration data; weights_RI: of every layer that reads X, [R, I], what
    multiplies channel j in column j. alpha: a number, `auto` or `auto:LOW:HIGH:STEP`; criterion: of the search.
    Returns scale_I float32 [I], or the search for it. Raises EvenbitsError if alpha is none of these or outside [0, 1].
    """
    weight_I = torch.stack([weight.detach().abs().amax(dim=0).double() for weight in weights_RI]).amax(dim=0)
    act_I = act_absmax_I.double()
    if isinstance(alpha, str):
        return search_alpha(lambda a: _at(act_I, weight_I, a), AlphaGrid.parse(alpha), criterion)
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise EvenbitsError(ALPHA_FORMS.format(repr(alpha)))
    return _at(act_I, weight_I, float(alpha))


def _at(act_I: torch.Tensor, weight_I: torch.Tensor, alpha: float) -> Rebalance:
    if not 0.0 <= alpha <= 1.0:
        raise EvenbitsError(f"SmoothQuant's migration strength alpha must be between 0 and 1; given {alpha}.")
    # alpha = 0 and alpha = 1 are legal: 0⁰ = 1 keeps the formula defined, and dead channels are handled below.
    scale_I = act_I.pow(alpha) / weight_I.clamp(min=_WEIGHT_FLOOR).pow(1 - alpha)
    dead_I = (act_I < _WEIGHT_FLOOR) | (weight_I == 0)
    scale_I = torch.where(dead_I, torch.ones_like(scale_I), scale_I.clamp(*_LIMITS))
    return Rebalance(scale_I.float(), {"alpha": float(alpha)})
