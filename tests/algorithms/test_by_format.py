"""by_format hands on and decides nothing: bit for bit the method that suits the format."""

from __future__ import annotations

import pytest
import torch

from evenbits.algorithms import get
from evenbits.algorithms.base import LayerStats
from evenbits.algorithms.by_format import by_format, weight_method_of
from evenbits.errors import EvenbitsError
from evenbits.numerics.format import Format

METHODS = {
    "ovp4:row": "olive",
    "ovp4-mix:g32": "olive",
    "ovp4-i8:row": "olive",
    "ant4:row": "ant",
    "int4:g32:mse": "rtn",
    "flint4:g32": "rtn",
    "nf4:g64:mse": "rtn",
    "int8:row": "rtn",
    "mxfp4": "rtn",
}


def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    found = torch.randn(24, 64, generator=generator)
    found[torch.rand(24, 64, generator=generator) < 0.02] *= 9
    return found


@pytest.mark.parametrize("spelling", METHODS)
def test_the_result_is_that_of_the_method_that_suits(spelling: str) -> None:
    fmt, stats = Format.parse(spelling), LayerStats(torch.linspace(0.01, 9, 64))
    assert weight_method_of(fmt) == METHODS[spelling]
    ours, theirs = by_format(weight(), fmt, stats), get(METHODS[spelling])(weight(), fmt, stats)
    assert ours.format == theirs.format
    assert torch.equal(ours.packed, theirs.packed)
    assert torch.equal(ours.dequantize(), theirs.dequantize())


def test_options_reach_the_pairs() -> None:
    fmt, stats = Format.parse("ovp4:row"), LayerStats(torch.linspace(0.01, 9, 64))
    plain = by_format(weight(), fmt, stats, weighted=False).dequantize()
    assert torch.equal(plain, get("olive")(weight(), fmt).dequantize())
    assert not torch.equal(plain, by_format(weight(), fmt, stats).dequantize())
    assert by_format(weight(), fmt, policy="paper").format.rule.policy == "paper"
    with pytest.raises(EvenbitsError, match="pair policy 'papre'"):
        by_format(weight(), fmt, policy="papre")


def test_it_wants_what_the_methods_behind_it_want() -> None:
    behind = [get(name) for name in set(METHODS.values())]
    assert by_format.uses == frozenset().union(*(f.uses for f in behind))  # type: ignore[attr-defined]
    assert by_format.needs == frozenset().union(*(f.needs for f in behind))  # type: ignore[attr-defined]
