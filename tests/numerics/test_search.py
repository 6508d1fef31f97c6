"""The scale search against spanning the range, against a dense grid, and its cost."""

from __future__ import annotations

import math

import pytest
import torch

from evenbits.numerics import elements
from evenbits.numerics.blocks import Block
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format
from evenbits.numerics.ovp import POLICIES
from evenbits.numerics.scales import store
from evenbits.numerics.search import counting_cost, round_scale, search_released, search_scale

TYPES = ["int2", "int3", "int4", "int5", "int8", "flint3", "flint4", "flint5", "pot3", "pot4", "fp4", "fp6_e3m2", "fp8"]
TYPES += ["nf3", "nf4", "ovp4-int", "ovp4-flint", "ovp4-flint_i8", "ovp8"]
DATA = ["gaussian", "laplace", "student"]


def _sample(name: str, *shape: int) -> torch.Tensor:
    distribution = {
        "gaussian": torch.distributions.Normal(0.0, 1.0),
        "laplace": torch.distributions.Laplace(0.0, 1.0),
        "student": torch.distributions.StudentT(3.0),
    }[name]
    return distribution.sample(shape)


def _format(spelling: str) -> Format:
    return Format.parse(spelling if ":" in spelling else f"{spelling}:row:mse")


def _errors(x_NK: torch.Tensor, scale_N: torch.Tensor, fmt: Format, policy: str = "optimal") -> torch.Tensor:
    """Squared error of each row, written out."""
    scale = scale_N.reshape(-1, 1)
    decoded = elements.snap(x_NK / scale, fmt.dtype, policy, full_range=fmt.rule.full_range) * scale
    return (decoded - x_NK).double().square().sum(1)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", TYPES)
def test_within_a_hair_of_a_dense_grid(dtype: str, data: str) -> None:
    fmt, x = _format(dtype), _sample(data, 6, 512)
    scale, error = search_scale(Block(x.unsqueeze(1)), fmt, "optimal")
    assert error.flatten().tolist() == pytest.approx(_errors(x, scale, fmt).tolist(), rel=1e-4)
    spanning = x.abs().amax(1) / elements.largest(fmt.dtype)
    # Pairs: 400 steps up to where the largest number is normal; others: up to 1.6 times that.
    top = spanning if dtype.startswith("ovp") else spanning * 1.6
    dense = torch.stack([_errors(x, top * step / 400, fmt) for step in range(1, 401)]).amin(0)
    # Wide types: steps are so fine, and octaves of floats so alike, that the dense grid finds lucky scales anywhere.
    fine = dtype in ("int8", "fp6_e3m2", "fp8", "ovp8")
    assert 10 * math.log10(float(error.sum() / dense.sum())) <= (0.8 if fine else 0.15)
    assert fine or 10 * math.log10(float((error.flatten() / dense).max())) <= 0.8  # no row is left behind
    assert bool((error.flatten() <= _errors(x, spanning, fmt) * (1 + 1e-6)).all())


@pytest.mark.parametrize("spelling", ["int4:g32:mse", "flint4:g32", "ovp4-int:g32", "ovp4-flint:g16", "fp4:g32:mse"])
@pytest.mark.parametrize("data", DATA)
def test_small_groups(spelling: str, data: str) -> None:
    fmt = _format(spelling)
    x = _sample(data, 64, fmt.granularity.size)
    _, error = search_scale(Block(x.reshape(8, 8, -1)), fmt, "optimal")
    spanning = x.abs().amax(1) / elements.largest(fmt.dtype)
    top = spanning if spelling.startswith("ovp") else spanning * 1.6
    dense = torch.stack([_errors(x, top * step / 400, fmt) for step in range(1, 401)]).amin(0)
    assert 10 * math.log10(float(error.sum() / dense.sum())) <= 0.5  # few numbers: a jagged error
    assert bool((error.flatten() <= _errors(x, spanning, fmt) * (1 + 1e-6)).all())


@pytest.mark.parametrize("dtype", TYPES)
def test_one_scale_for_a_tensor(dtype: str) -> None:
    fmt, x = _format(dtype), _sample("laplace", 5, 64)
    scale, error = search_scale(Block(x.unsqueeze(1), shared=True), fmt, "optimal")
    assert scale.shape == error.shape == (1, 1)
    assert float(error) == pytest.approx(float(_errors(x, scale.expand(5, 1), fmt).sum()), rel=1e-4)
    flat, flat_error = search_scale(Block(x.reshape(1, 1, -1)), fmt, "optimal")
    assert float(flat) == pytest.approx(float(scale), rel=1e-6)
    assert float(flat_error) == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_search_minds_the_policy(policy: str) -> None:
    fmt, x = _format("ovp4-int"), _sample("student", 16, 256)
    own, error = search_scale(Block(x.unsqueeze(1)), fmt, policy)
    for other in POLICIES:
        scale, _ = search_scale(Block(x.unsqueeze(1)), fmt, other)
        assert float(error.sum()) <= float(_errors(x, scale, fmt, policy).sum()) * 1.01
    assert error.flatten().tolist() == pytest.approx(_errors(x, own, fmt, policy).tolist(), rel=1e-4)


def test_weights_and_groups_of_zeros() -> None:
    fmt, x = _format("flint4:g8"), torch.randn(3, 4, 8)
    x[1, 2] = 0
    weights = torch.rand(4, 8)
    scale, error = search_scale(Block(x, importance_Gg=weights), fmt, "optimal")
    assert float(scale[1, 2]) == 1
    assert float(error[1, 2]) == 0
    decoded = elements.snap((x / scale.unsqueeze(-1)).reshape(3, 32), fmt.dtype).reshape(3, 4, 8) * scale.unsqueeze(-1)
    expected = ((decoded - x).double().square() * weights).sum(-1)
    assert torch.allclose(error, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", ["int4", "flint4", "pot8", "ovp4-int", "ovp8"])
@pytest.mark.parametrize("power", [-100, -80, 80, 100])
def test_no_magnitude_overflows(dtype: str, power: int) -> None:
    fmt, x = _format(dtype), _sample("gaussian", 4, 64)
    if dtype == "pot8" and power < 0:
        return  # its scale would have to be below the smallest float32
    one, error = search_scale(Block(x.unsqueeze(1)), fmt, "optimal")
    other, far = search_scale(Block(x.unsqueeze(1) * 2.0**power), fmt, "optimal")
    assert (other.double() * 2.0**-power).flatten().tolist() == pytest.approx(one.double().flatten().tolist(), rel=1e-5)
    assert (far * 4.0**-power).flatten().tolist() == pytest.approx(error.flatten().tolist(), rel=1e-4)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["int", "flint"])
def test_the_released_search_takes_the_best_of_88(shared: bool, kind: str) -> None:
    grain = "tensor" if shared else "row"
    fmt, x = Format.parse(f"ovp4-{kind}:{grain}:3sigma"), _sample("student", 5, 128) + 0.1
    with counting_cost() as cost:
        found = search_released(Block(x.unsqueeze(1), shared), fmt, "reference")
    assert cost.passes == 88
    assert cost.elements == 88 * x.numel()
    rows = x.reshape(1, -1) if shared else x
    mean, deviation = rows.double().mean(1), rows.double().std(1)
    base = torch.maximum((mean + 3 * deviation).abs(), (mean - 3 * deviation).abs()) / elements.largest(fmt.dtype)
    ratios = (found.double().flatten() / base * 100).tolist()
    grid = [75 + 2 * step for step in range(88)]
    assert (grid[0], grid[-1]) == (75, 249)
    for row, ratio in zip(rows, ratios, strict=True):
        assert min(abs(ratio - point) for point in grid) < 0.01
        base_row = base[rows.tolist().index(row.tolist())].float()
        errors = [float(_errors(row.reshape(1, -1), base_row * (p / 100), fmt, "reference")) for p in grid]
        assert errors[grid.index(round(ratio))] <= min(errors) * (1 + 1e-5)


@pytest.mark.parametrize(
    ("dtype", "outlier"),
    [
        *[(dtype, 20) for dtype in ("int2", "int3", "int4", "flint4", "fp4")],
        ("int4", 100),
        ("flint4", 100),
        ("fp4", 100),
    ],
)
def test_a_far_outlier_does_not_hide_the_rest(dtype: str, outlier: float) -> None:
    """Where the outlier hardly counts, the best scale lies far below absmax, beyond the end of the grid."""
    fmt, x = _format(dtype), torch.randn(3, 1, 256)
    x[:, 0, 7] = outlier
    weights = torch.ones(1, 256)
    weights[0, 7] = 1e-9
    _, error = search_scale(Block(x, importance_Gg=weights), fmt, "optimal")
    rest = x.clone()
    rest[:, 0, 7] = 0
    _, alone = search_scale(Block(rest), fmt, "optimal")
    assert bool((error <= alone * 1.1 + 1e-9 * outlier**2).all())


def test_cost_is_counted_and_only_inside_the_block() -> None:
    x = torch.randn(4, 64)
    with counting_cost() as cost:
        encode(x, "flint4:row")
        first = (cost.passes, cost.elements)
        with counting_cost() as inner:
            encode(x, "ovp4-int:g32")
    assert 16 + 1 <= first[0] <= 16 + 5  # 16 candidates and the rounded one, and some below the grid
    assert first[1] == first[0] * 256
    assert (inner.passes, inner.elements) == (39 + 5, 44 * 256)  # E4M3: and two steps on each side
    assert (cost.passes, cost.elements) == first
    assert cost.seconds > 0
    with counting_cost() as nothing:
        encode(x, "int4:row")
    assert nothing.passes == 0


@pytest.mark.parametrize("spelling", ["nvfp4:mse", "mxfp4:mse", "ovp4-int:g32"])
def test_rounding_takes_the_best_of_the_steps_around(spelling: str) -> None:
    fmt, x = Format.parse(spelling), _sample("laplace", 4, 64)
    block = Block(x.reshape(4, -1, fmt.granularity.size))
    raw, _ = search_scale(block, fmt, "optimal")
    factor = None if spelling.startswith("mx") else raw.max().reshape(1) / 448
    stored, error = round_scale(block, raw, fmt, "optimal", factor)
    reach = 1 if spelling.startswith("mx") else 2
    codes = store(raw, fmt.storage, factor).view(torch.uint8).int()
    assert bool(((stored.view(torch.uint8).int() - codes).abs() <= reach).all())
    highest = 126 if factor is not None else 254
    for step in range(-reach, reach + 1):
        byte = (codes + step).clamp(1, highest).to(torch.uint8)
        scale = torch.exp2(byte.float() - 127) if factor is None else byte.view(torch.float8_e4m3fn).float() * factor
        other = _errors(block.x_RGg.reshape(-1, fmt.granularity.size), scale, fmt).reshape(error.shape)
        assert bool((error <= other * (1 + 1e-5)).all())


def _families() -> dict[str, torch.Tensor]:
    """Small tensors of the kinds that benchmarks/tensors.py has: tails of every weight, loud channels, loud pairs."""
    heavy = torch.distributions.StudentT(2.2).sample((16, 512))
    loud, adjacent, bert = (torch.randn(16, 512) for _ in range(3))
    loud[:, torch.randperm(512)[:6]] *= 20 + 80 * torch.rand(6)
    bert[:, torch.randperm(512)[:20]] *= 4 + 16 * torch.rand(20)
    adjacent[:, :20] *= 25
    outliers = torch.where(torch.rand(16, 512) < 0.003, torch.randn(16, 512) * 9, torch.randn(16, 512))
    return {
        **{name: _sample(name, 16, 512) for name in DATA},
        "t2.2": heavy,
        "outliers": outliers,
        "OPT": loud,
        "BERT": bert,
        "adjacent": adjacent,
        "product": torch.randn(16, 512) * torch.randn(16, 512),
        "GELU": torch.nn.functional.gelu(torch.randn(16, 512)),
        "GLU": torch.nn.functional.silu(torch.randn(16, 512)) * torch.randn(16, 512) * (0.5 * torch.randn(512)).exp(),
    }


@pytest.mark.parametrize("grain", ["tensor", "row", "g128", "g32"])
def test_never_behind_the_released_rule(grain: str) -> None:
    """Same bits, every family: our search and pairs against the released 88 scales and its rule."""
    for name, x in _families().items():
        ours, theirs = (
            float((encode(x, f"ovp4:{grain}{rule}").dequantize() - x).double().square().sum())
            for rule in ("", ":3sigma:reference")
        )
        assert ours <= theirs * (1 + 1e-6), name
