"""True bits counted from bytes, types that are a choice, and weights of the error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evenbits.errors import EvenbitsError
from evenbits.numerics import elements
from evenbits.numerics.elements import PairType
from evenbits.numerics.encode import encode
from evenbits.numerics.metrics import sqnr_db
from evenbits.numerics.ovp import POLICIES
from evenbits.numerics.qtensor import QTensor


def _bits(encoded: QTensor) -> float:
    parts = (encoded.packed, encoded.scale, encoded.zero_point, encoded.global_scale, encoded.kinds)
    stored = sum(len(part.contiguous().view(torch.uint8).numpy().tobytes()) for part in parts if part is not None)
    assert stored == encoded.nbytes
    return 8 * stored / np.prod(encoded.shape)


@pytest.mark.parametrize(
    ("spelling", "columns", "bits", "per_tensor"),
    [
        ("ovp4:row", 384, 4 + 16 / 384, 0),
        ("ovp4:row", 768, 4 + 16 / 768, 0),
        ("ovp4-int:g128", 768, 4.125, 0),
        ("ovp4:g64", 768, 4.25, 0),
        ("ovp4:g32", 768, 4.25, 32),
        ("ovp4-flint:g16", 768, 4.5, 32),
        ("ovp4-mix:g32", 768, 4.28125, 32),
        ("ovp4:tensor", 768, 4, 32),
        ("ovp8:row", 768, 8 + 16 / 768, 0),
        ("flint4:row", 384, 4 + 16 / 384, 0),
        ("nf4:g64", 384, 4.25, 0),
        ("fp4:g32", 384, 4.25, 32),
        ("mxfp4", 384, 4.25, 0),
        ("nvfp4", 384, 4.5, 32),
        ("int4:g128", 384, 4.125, 0),
        ("int4:g32", 384, 4.5, 0),
        ("ant4:row", 384, 4 + 16 / 384, 0),
        ("flint3:row", 384, 3 + 16 / 384, 0),
        ("mxfp4", 33, (32 + 2) * 8 / 33, 0),  # whole blocks
        ("nvfp4", 33, (24 + 3) * 8 / 33, 32),
    ],
)
def test_true_bits(spelling: str, columns: int, bits: float, per_tensor: int) -> None:
    rows = 6
    assert _bits(encode(torch.randn(rows, columns) * 0.02, spelling)) == pytest.approx(
        bits + per_tensor / (rows * columns), rel=1e-12
    )


def test_the_documented_figures() -> None:
    for columns, figure in ((384, "4.042"), (768, "4.021")):
        assert f"{_bits(encode(torch.randn(8, columns) * 0.02, 'ovp4:row')):.3f}" == figure
    assert f"{_bits(encode(torch.randn(512, 1024) * 0.02, 'ovp4-mix:g32')):.3f}" == "4.281"


def test_a_factor_is_counted() -> None:
    x = torch.randn(4, 64) * 1e-6
    assert encode(x, "int4:row").nbytes == 4 * 32 + 4 * 2 + 4
    assert encode(x * 1e6, "int4:row").nbytes == 4 * 32 + 4 * 2


@pytest.mark.parametrize("columns", [1, 3, 31, 33, 65])
def test_an_odd_row_of_pairs_is_padded(columns: int) -> None:
    x = torch.randn(3, columns)
    for spelling in ("ovp4:row", "ovp4:g32", "ovp4:tensor", "ovp4-mix:g16"):
        encoded = encode(x, spelling)
        assert encoded.packed.shape == (3, (columns + 1) // 2)
        assert encoded.stored_columns == columns + 1
        assert bool((encoded.packed[:, -1] >> 4 & 7 == 0).all())  # zero, or the identifier beside an outlier
        assert encoded.dequantize().shape == x.shape
    assert encode(x, "ovp8:row").packed.shape == (3, columns + 1)


def test_the_format_is_recorded_as_chosen() -> None:
    gauss, heavy = torch.randn(8, 256), torch.randn(8, 256)
    heavy[:, ::16] *= 30
    assert str(encode(gauss, "ovp4:g32").format) == "ovp4-int:g32"
    assert str(encode(gauss, "ovp4:row").format) == "ovp4-int:row"
    assert str(encode(heavy, "ovp4:row").format) == "ovp4-flint:row"
    assert str(encode(heavy, "ovp4:row:3sigma").format) == "ovp4-flint:row:3sigma"
    assert str(encode(torch.rand(8, 256) - 0.5, "ant4:row").format) == "int4:row:mse"
    assert str(encode(torch.randn(8, 256) ** 3, "ant4:row").format) in ("flint4:row", "pot4:row")
    powers = 2.0 ** torch.randint(0, 7, (8, 256))
    assert str(encode(powers, "ant4:row").format) == "pot4:row"
    assert torch.equal(encode(powers, "ant4:row").dequantize(), powers)
    assert str(encode(gauss, "ovp4-mix:g32").format) == "ovp4-mix:g32"


@pytest.mark.parametrize(
    ("spelling", "members"),
    [
        ("ant4:row", ["int4:row:mse", "pot4:row", "flint4:row"]),
        ("ant4:tensor", ["int4:tensor:mse", "pot4:tensor", "flint4:tensor"]),
        ("ant3:row", ["int3:row:mse", "pot3:row", "flint3:row"]),
        ("ant4:row:minmax", ["int4:row", "pot4:row:minmax", "flint4:row:minmax"]),
        ("ovp4:g32", ["ovp4-int:g32", "ovp4-flint:g32"]),
        ("ovp4:row", ["ovp4-int:row", "ovp4-flint:row"]),
        ("ovp4-i8:row", ["ovp4-int:row", "ovp4-flint_i8:row"]),
    ],
)
@pytest.mark.parametrize("power", [0.3, 1, 2, 3, 5])
def test_the_choice_is_the_least_summed_squared_error(spelling: str, members: list[str], power: float) -> None:
    for policy in POLICIES if spelling.startswith("ovp") else (None,):
        x = torch.randn(6, 96)
        x = x.sign() * x.abs() ** power
        errors = {
            member: float((encode(x, member, policy=policy).dequantize() - x).double().square().sum())
            for member in members
        }
        chosen = encode(x, spelling, policy=policy)
        name = str(chosen.format).removesuffix(f":{policy}")
        assert chosen.format.rule.policy == policy or policy is None
        assert errors[name] <= min(errors.values()) * (1 + 1e-6)
        best = encode(x, str(chosen.format), policy=policy)
        assert best.packed.equal(chosen.packed)
        assert best.scale.view(torch.uint8).equal(chosen.scale.view(torch.uint8))


@pytest.mark.parametrize("grain", ["g16", "g32", "g64"])
@pytest.mark.parametrize("power", [1, 2, 3])
def test_a_mix_is_at_least_as_good_as_either_kind(grain: str, power: int) -> None:
    """Group by group, as near as E4M3 allows: the two kinds share one factor, which shifts its steps a little."""
    x = torch.randn(32, 512)
    x = x.sign() * x.abs() ** power
    mixed = sqnr_db(x, encode(x, f"ovp4-mix:{grain}").dequantize())
    for kind in ("int", "flint"):
        assert mixed >= sqnr_db(x, encode(x, f"ovp4-{kind}:{grain}").dequantize())
    errors = [
        (encode(x, f"ovp4{kind}:{grain}").dequantize() - x).square().reshape(32, -1, int(grain[1:])).sum(-1)
        for kind in ("-int", "-flint", "-mix")
    ]
    assert float((errors[2] / torch.minimum(errors[0], errors[1])).median()) <= 1.001
    assert float(errors[2].sum() / torch.minimum(errors[0], errors[1]).sum()) <= 1.05


def test_a_mix_of_one_kind_is_that_kind() -> None:
    x = torch.cat([torch.arange(-7, 8).float(), torch.tensor([3.0])]).repeat(2, 2)
    encoded = encode(x, "ovp4-mix:g32")
    assert torch.equal(encoded.dequantize(), x)
    assert encoded.kinds is not None
    assert encoded.kinds.tolist() == [[0], [0]]
    assert encoded.packed.equal(encode(x, "ovp4-int:g32").packed)


@pytest.mark.parametrize(
    "spelling", ["ovp4-int:row", "ovp4:g32", "ovp4-mix:g32", "flint4:row", "int4:g32:mse", "nvfp4:mse"]
)
def test_importance_serves_the_important_columns(spelling: str) -> None:
    x, importance = torch.randn(32, 128), torch.rand(128) ** 6
    x = x.sign() * x.abs() ** 2
    weighted, plain = encode(x, spelling, importance=importance).dequantize(), encode(x, spelling).dequantize()

    def error(decoded: torch.Tensor, weights: torch.Tensor) -> float:
        return float(((decoded - x).square() * weights).sum())

    assert error(weighted, importance) < error(plain, importance) * 0.97
    assert error(weighted, torch.ones(128)) > error(plain, torch.ones(128))
    even = encode(x, spelling, importance=torch.full((128,), 3.0))
    assert even.packed.equal(encode(x, spelling).packed)


def test_importance_decides_a_pair() -> None:
    x = torch.tensor([[13.0, 6.0, 7.0, 7.0]])  # beside 7s the scale stays 1
    for importance, pair in (([1.0, 1.0], [7, 6]), ([4.0, 1.0], [12, 0]), ([1.0, 4.0], [7, 6])):
        weights = torch.tensor([*importance, 1.0, 1.0])
        found = elements.snap(x, PairType(4, "int"), "optimal", weights)
        assert found.tolist() == [[*pair, 7, 7]]


@pytest.mark.parametrize("spelling", ["ovp4:row", "ovp4:g32", "flint4:row", "mxfp4:mse"])
def test_importance_may_be_zero(spelling: str) -> None:
    x = torch.randn(3, 33)
    for importance in (torch.zeros(33), torch.cat([torch.zeros(20), torch.ones(13)])):
        assert bool(encode(x, spelling, importance=importance).dequantize().isfinite().all())


@pytest.mark.parametrize(
    "importance", [torch.ones(7), torch.ones(8, dtype=torch.int64), torch.ones(1, 8), -torch.ones(8), torch.ones(8) / 0]
)
def test_importance_that_does_not_fit(importance: torch.Tensor) -> None:
    with pytest.raises(EvenbitsError, match="importance must be 8 finite weights"):
        encode(torch.randn(3, 8), "ovp4:row", importance=importance)
