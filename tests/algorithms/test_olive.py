"""OliVe: pairs only, its options, and that weighing by the input's mean square pays at the output."""

from __future__ import annotations

import pytest
import torch

import evenbits.algorithms.olive as module
from evenbits import algorithms
from evenbits.algorithms.base import LayerStats
from evenbits.algorithms.olive import olive
from evenbits.errors import EvenbitsError
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor

PAIRS = ["ovp4:row", "ovp4:tensor", "ovp4:g32", "ovp4-int:row", "ovp4-flint:g64", "ovp4-flint_i8:row", "ovp4-i8:row"]
PAIRS += ["ovp4-mix:g16", "ovp8:row", "ovp4:row:reference:3sigma"]


def _weights(rows: int = 12, columns: int = 64) -> torch.Tensor:
    """Gaussian weights with an outlier in one number of fifty."""
    weight = torch.randn(rows, columns) * 0.1
    return torch.where(torch.rand_like(weight) < 0.02, weight * 15, weight)


def _same(one: QTensor, other: QTensor) -> bool:
    parts = [(getattr(one, n), getattr(other, n)) for n in ("packed", "scale", "global_scale", "kinds")]
    equal = all(a is b if a is None or b is None else torch.equal(a.float(), b.float()) for a, b in parts)
    return equal and one.format == other.format and one.shape == other.shape and one.dtype == other.dtype


@pytest.mark.parametrize("spelling", PAIRS)
def test_without_statistics_it_is_encode(spelling: str) -> None:
    weight, fmt = _weights(), Format.parse(spelling)
    plain = encode(weight, fmt)
    for stats in (None, LayerStats(), LayerStats(None)):
        assert _same(olive(weight, fmt, stats), plain)
    assert _same(olive(weight, fmt, LayerStats(torch.rand(64) + 0.1), weighted=False), plain)


@pytest.mark.parametrize("spelling", PAIRS)
def test_with_statistics_it_is_encode_with_importance(spelling: str) -> None:
    weight, fmt, moment = _weights(), Format.parse(spelling), torch.rand(64) + 0.01
    assert _same(olive(weight, fmt, LayerStats(moment)), encode(weight, fmt, importance=moment))


@pytest.mark.parametrize("spelling", ["int4:row", "int8:row", "flint4:row", "nf4:g64", "ant4:row", "mxfp4", "nvfp4"])
def test_other_formats_are_refused(spelling: str) -> None:
    with pytest.raises(EvenbitsError, match="writes outlier-victim pairs, such as 'ovp4:row'; the scheme says"):
        olive(_weights(), Format.parse(spelling))


def test_the_policy_decides_which_of_two_outliers_stays() -> None:
    """The example of docs/ovp-format.md. Twenty sevens make the 60th percentile 7, and so the scale 1."""
    weight = torch.tensor([[15.0, -30.0, 30.0, 15.0, 10.0, 7.0, 3.0, 40.0, 200.0, 1.0, *[7.0] * 20]])
    expected = {
        "optimal": [0, -32, 32, 0, 7, 7, 0, 32, 96, 0],
        "paper": [0, -32, 32, 0, 12, 0, 0, 32, 96, 0],
        "reference": [16, 0, 32, 0, 12, 0, 0, 32, 96, 0],
    }
    for policy, values in expected.items():
        encoded = olive(weight, Format.parse("ovp4-int:row:p60"), policy=policy)
        assert encoded.scale.tolist() == [[1]] and encoded.format.rule.policy == policy
        assert encoded.dequantize().tolist() == [[*values, *[7] * 20]]


def test_weights_reach_into_the_pair_and_only_under_the_optimal_policy() -> None:
    """(10, 7): clipping 10 costs 9; keeping it costs 4 and the 49 of the victim, unless nobody reads the victim."""
    weight = torch.tensor([[10.0, 7.0, *[7.0] * 20]])
    moment = torch.ones(22)
    moment[1] = 1e-4
    fmt = Format.parse("ovp4-int:row:p60")
    assert olive(weight, fmt, LayerStats(moment)).dequantize()[0, :2].tolist() == [12, 0]
    assert olive(weight, fmt, LayerStats(moment), weighted=False).dequantize()[0, :2].tolist() == [7, 7]
    moment[:2] = torch.tensor([1e-4, 1.0])
    assert olive(weight, fmt, LayerStats(moment)).dequantize()[0, :2].tolist() == [7, 7]
    assert olive(weight, fmt, LayerStats(moment), policy="paper").dequantize()[0, :2].tolist() == [12, 0]


@pytest.mark.parametrize("policy", ["optimal", "paper", "reference"])
def test_the_policy_option_overrides_the_formats(policy: str) -> None:
    weight = _weights()
    named = "" if policy == "optimal" else f":{policy}"
    plain = encode(weight, f"ovp4-int:row{named}")
    for spelling in ("ovp4-int:row", "ovp4-int:row:paper", "ovp4-int:row:reference"):
        assert _same(olive(weight, Format.parse(spelling), policy=policy), plain)
    assert olive(weight, Format.parse("ovp4-int:row:paper")).format.rule.policy == "paper"


def test_an_unknown_policy_names_the_nearest() -> None:
    with pytest.raises(EvenbitsError, match=r"unknown pair policy 'papper'\. Did you mean 'paper'"):
        olive(_weights(), Format.parse("ovp4:row"), policy="papper")


def test_the_released_policy_keeps_the_even_one_of_two_outliers_and_ours_the_larger() -> None:
    weight = torch.randn(1, 8192) * 0.3  # so many that no scale is drawn up by the two
    weight[0, 10:12] = torch.tensor([5.0, -9.0])
    kept = {}
    for policy in ("optimal", "paper", "reference"):
        decoded = olive(weight, Format.parse("ovp4-int:row"), policy=policy).dequantize()
        kept[policy] = [bool(value) for value in decoded[0, 10:12]]
    assert kept == {"optimal": [False, True], "paper": [False, True], "reference": [True, False]}


def _output_error(weight_OI: torch.Tensor, encoded: QTensor, x_TI: torch.Tensor) -> float:
    """‖(W − W') X‖², in float64."""
    return float(((weight_OI.double() - encoded.dequantize(torch.float64)) @ x_TI.double().t()).square().sum())


@pytest.mark.parametrize("spelling", ["ovp4:row", "ovp4-int:row", "ovp4:g32", "ovp4-i8:row", "ovp4-mix:g32"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weighing_lowers_the_output_error_where_input_channels_differ(spelling: str, seed: int) -> None:
    torch.manual_seed(seed)
    weight, fmt = _weights(32, 64), Format.parse(spelling)
    spread = torch.where(torch.arange(64) % 9 == 4, 12.0, 1.0)
    seen, fresh = (torch.randn(512, 64) * spread for _ in range(2))
    stats = LayerStats(seen.double().square().mean(0).float())
    weighted, plain = olive(weight, fmt, stats), olive(weight, fmt, stats, weighted=False)
    for x in (seen, fresh):  # not only on the data that the weights come from
        assert _output_error(weight, weighted, x) < 0.95 * _output_error(weight, plain, x)
    # What is bought at the output is paid for in the plain error of the weight.
    miss = [float((q.dequantize() - weight).square().sum()) for q in (weighted, plain)]
    assert miss[0] >= miss[1] * (1 - 1e-3)


def test_equal_weights_change_nothing() -> None:
    weight, fmt = _weights(), Format.parse("ovp4:row")
    for value in (1.0, 4.0, 2.0**-10):
        assert _same(olive(weight, fmt, LayerStats(torch.full((64,), value))), encode(weight, fmt))


def test_an_input_of_zeros_is_no_reason_to_round_badly() -> None:
    weight, fmt = _weights(), Format.parse("ovp4:row")
    assert _same(olive(weight, fmt, LayerStats(torch.zeros(64))), encode(weight, fmt))
    some = torch.rand(64)
    some[::7] = 0  # dead channels beside live ones
    assert torch.isfinite(olive(weight, fmt, LayerStats(some)).dequantize()).all()


@pytest.mark.parametrize("moment", [torch.rand(63), torch.rand(65), torch.full((64,), float("inf")), -torch.rand(64)])
def test_statistics_that_do_not_fit_are_refused(moment: torch.Tensor) -> None:
    with pytest.raises(EvenbitsError, match="importance must be 64 finite weights"):
        olive(_weights(), Format.parse("ovp4:row"), LayerStats(moment))


def test_an_odd_number_of_columns() -> None:
    weight = _weights(5, 33)
    encoded = olive(weight, Format.parse("ovp4:row"), LayerStats(torch.rand(33)))
    assert encoded.dequantize().shape == weight.shape
    assert encoded.packed.shape == (5, 17)


def test_the_method_is_registered_and_says_what_it_uses() -> None:
    assert algorithms.get("olive") is olive
    assert (olive.kind, olive.needs, olive.uses) == ("weight", frozenset(), frozenset({"second_moment"}))


def test_the_file_opens_with_its_lesson() -> None:
    lesson = module.__doc__ or ""
    for word in ("What.", "When it helps.", "Ours differs", "Left out:", "Source:", "ISCA 2023"):
        assert word in lesson
