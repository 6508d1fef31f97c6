"""What became of pairs: rows made by hand, whose counts are known."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from evenbits.numerics.encode import encode
from evenbits.numerics.pair_statistics import PairStatistics, pair_statistics
from evenbits.numerics.qtensor import QTensor

# Twenty numbers whose 60th percentile is 7: the scale is 1 (int), numbers beyond 9.5 are outliers, beyond 96 saturate.
SEVENS = [7.0] * 20


def _statistics(x: torch.Tensor, spelling: str) -> PairStatistics:
    found = pair_statistics(x, encode(x, spelling))
    assert found is not None
    return found


def _with_scale(x: torch.Tensor, encoded: QTensor, scale: float) -> QTensor:
    """`encoded`, read with another scale: the statistics are those of the numbers over the scale."""
    return QTensor(
        encoded.packed,
        torch.full_like(encoded.scale.float(), scale).to(encoded.scale.dtype),
        None,
        encoded.format,
        encoded.shape,
        encoded.dtype,
        None,
        encoded.kinds,
    )


def test_counts_by_hand() -> None:
    #        NN            ON            ON            OO            OO + saturated    NN at the threshold
    pairs = [(1.0, -7.0), (12.0, 3.0), (0.0, -40.0), (15.0, -30.0), (200.0, -97.0), (9.5, -9.5)]
    x = torch.tensor([[number for pair in pairs for number in pair] + SEVENS])
    encoded = encode(x, "ovp4-int:row:p60")
    assert encoded.scale.tolist() == [[1]]
    found = pair_statistics(x, encoded)
    assert found == PairStatistics("int", pytest.approx(100 * 12 / 16), 12.5, 12.5, pytest.approx(100 * 2 / 32))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "threshold", "largest"), [("int", 9.5, 96), ("flint", 20, 192), ("flint_i8", 18, 120)]
)
def test_thresholds_of_every_kind(kind: str, threshold: float, largest: float) -> None:
    just = 1e-3
    x = torch.tensor(
        [[threshold, 0, threshold + just, 0, -threshold - just, threshold + just, largest, largest + just]]
    )
    encoded = _with_scale(x, encode(x, f"ovp4-{kind}:row"), 1.0)
    found = pair_statistics(x, encoded)
    assert found == PairStatistics(kind, 25, 25, 50, 12.5)
    halved = pair_statistics(x / 2, _with_scale(x, encoded, 0.5))
    assert halved == found


def test_eight_bit_pairs() -> None:
    x = torch.tensor([[135.0, 1.0, 136.0, 1.0, 32768.0, -200.0, 40000.0, 0.0]])
    found = pair_statistics(x, _with_scale(x, encode(x, "ovp8:row"), 1.0))
    assert found == PairStatistics("int8", 25, 50, 25, 12.5)


def test_a_choice_is_reported_as_what_was_chosen() -> None:
    x = torch.randn(4, 64)
    encoded = encode(x, "ovp4:row")
    assert _statistics(x, "ovp4:row").kind == encoded.format.dtype.kind in ("int", "flint")  # type: ignore[union-attr]


@pytest.mark.parametrize("columns", [1, 3, 7])
def test_odd_columns(columns: int) -> None:
    """The padding makes the last pair whole; it is no number, and saturation is a share of numbers."""
    row = [1.0] * (columns - 1) + [500.0]
    x = torch.tensor([row, row])
    encoded = _with_scale(x, encode(x, "ovp4-int:row"), 1.0)
    found = pair_statistics(x, encoded)
    pairs = (columns + 1) // 2
    assert found is not None
    assert found.on == pytest.approx(100 / pairs) and found.oo == 0
    assert found.nn == pytest.approx(100 * (pairs - 1) / pairs)
    assert found.saturated == pytest.approx(100 / columns)


def test_groups_have_scales_of_their_own() -> None:
    x = torch.tensor([[12.0, 1.0, 1.0, 1.0, 12.0, 1.0, 1.0, 1.0]])
    encoded = encode(x, "ovp4-int:g4")
    scales = encoded.scales()[0].tolist()
    for index, scale in enumerate(scales):
        part = x[:, 4 * index : 4 * index + 4] / scale
        outliers = (part.reshape(-1, 2).abs() > 9.5).sum(1)
        assert len(outliers) == 2
    expected = (x / encoded.scales().repeat_interleave(4, dim=1)).abs().reshape(-1, 2) > 9.5
    found = pair_statistics(x, encoded)
    assert found is not None and found.on == 100 * float((expected.sum(1) == 1).float().mean())


def test_mix_counts_every_group_by_its_own_kind() -> None:
    """One group of a mix is int (outliers beyond 9.5), the other flint (beyond 20)."""
    x = torch.tensor([[12.0, 1.0, 3.0, 2.0, 12.0, 1.0, 3.0, 2.0], [1.0, 1.0, 30.0, 2.0, 1.0, 1.0, 150.0, 2.0]])
    encoded = encode(torch.randn(2, 8), "ovp4-mix:g4")
    kinds = torch.tensor([[0b10], [0b10]], dtype=torch.uint8)  # first group int, second flint
    one = torch.ones_like(encoded.scale.float()).to(encoded.scale.dtype)
    made = QTensor(encoded.packed, one, None, encoded.format, (2, 8), torch.float32, None, kinds)
    found = pair_statistics(x, made)
    # Row 1: (12, 1) is ON as int and NN as flint. Row 2: (30, 2) ON, (150, 2) ON; 150 saturates int only.
    assert found == PairStatistics("mix", 62.5, 37.5, 0, 0)
    swapped = QTensor(encoded.packed, one, None, encoded.format, (2, 8), torch.float32, None, kinds ^ 0b11)
    assert pair_statistics(x, swapped) == PairStatistics("mix", 62.5, 37.5, 0, 6.25)


def test_mix_from_the_encoder_agrees_with_a_count() -> None:
    x = torch.distributions.StudentT(2.5).sample((6, 64))
    encoded = encode(x, "ovp4-mix:g16")
    found = pair_statistics(x, encoded)
    assert encoded.kinds is not None and found is not None
    counts, beyond = [0, 0, 0], 0
    for row in range(6):
        for group in range(4):
            flint = int(encoded.kinds[row, 0]) >> group & 1
            part = (x[row, 16 * group : 16 * group + 16] / encoded.scales()[row, group]).abs()
            for pair in part.reshape(-1, 2):
                counts[int((pair > (20 if flint else 9.5)).sum())] += 1
            beyond += int((part > (192 if flint else 96)).sum())
    assert [found.nn, found.on, found.oo] == pytest.approx([100 * c / 192 for c in counts])
    assert found.saturated == pytest.approx(100 * beyond / 384)


def test_shares_add_up_and_are_plain_numbers() -> None:
    for spelling in ("ovp4:row", "ovp4:tensor", "ovp4:g32", "ovp4-i8:row", "ovp4-mix:g32", "ovp8:row"):
        found = _statistics(torch.distributions.StudentT(3.0).sample((8, 65)), spelling)
        assert found.nn + found.on + found.oo == pytest.approx(100)
        assert all(type(value) is float for key, value in asdict(found).items() if key != "kind")


@pytest.mark.parametrize("shape", [(6,), (2, 3, 10)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_shapes_and_float_types(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    assert _statistics(x, "ovp4:row").nn > 50


@pytest.mark.parametrize("spelling", ["int4:row", "int8:row:affine", "flint4:row", "nf4:g64", "ant4:row", "mxfp4"])
def test_other_formats_have_no_pairs(spelling: str) -> None:
    x = torch.randn(2, 32)
    assert pair_statistics(x, encode(x, spelling)) is None
