"""The calibrated search of an activation's scale against brute force in numpy, and what must not confuse it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evenbits.errors import EvenbitsError
from evenbits.numerics.encode import encode
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.format import Format
from evenbits.observers.scale_search import ScaleSearch

INT4, FLINT4 = [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 6, 8, 16]
POT4 = [0, 1, 2, 4, 8, 16, 32, 64]
INT_OUTLIERS, FLINT_OUTLIERS = [12, 16, 24, 32, 48, 64, 96], [24, 32, 48, 64, 96, 128, 192]


def _activations(count: int = 3, rows: int = 40, columns: int = 64) -> list[torch.Tensor]:
    """Batches of unequal size with outlier channels, off centre."""
    spread = torch.where(torch.arange(columns) % 21 == 5, 14.0, 1.0)
    return [torch.randn(rows + 7 * i, columns) * spread + 0.1 for i in range(count)]


def _searched(spelling: str, batches: list[torch.Tensor]) -> tuple[Format, float]:
    search = ScaleSearch(Format.parse(spelling))
    for batch in batches:
        search.measure(batch)
    for batch in batches:
        search.update(batch)
    fmt, scale = search.best()
    assert scale.shape == (1,) and scale.dtype == torch.float32
    return fmt, float(scale)


def _nearest(u: np.ndarray, table: list[int]) -> np.ndarray:
    """|nearest value − u| of every number."""
    return np.abs(np.abs(u)[:, None] - np.array(table, np.float64)).min(axis=1)


def _error(x: np.ndarray, scale: float, table: list[int], outliers: list[int] | None = None) -> float:
    """Squared error of a matrix under a scale: numbers to the nearest value, pairs to the best of their three forms."""
    u = x.astype(np.float64) / scale
    normal = _nearest(u.reshape(-1), table).reshape(-1, 2) ** 2
    if outliers is None:
        return float(normal.sum()) * scale**2
    kept, lost = _nearest(u.reshape(-1), outliers).reshape(-1, 2) ** 2, u.reshape(-1, 2) ** 2
    forms = [normal.sum(axis=1), kept[:, 0] + lost[:, 1], lost[:, 0] + kept[:, 1]]
    return float(np.minimum.reduce(forms).sum()) * scale**2


@pytest.mark.parametrize(
    ("spelling", "table", "outliers", "step"),
    [
        ("int4:tensor:mse", INT4, None, 1.05),
        ("flint4:tensor", FLINT4, None, 1.05),
        ("pot4:tensor", POT4, None, 1.05),
        ("ovp4-int:tensor", INT4, INT_OUTLIERS, 1.13),
        ("ovp4-flint:tensor", FLINT4, FLINT_OUTLIERS, 1.13),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_within_a_step_of_brute_force(
    spelling: str, table: list[int], outliers: list[int] | None, step: float, seed: int
) -> None:
    torch.manual_seed(seed)
    batches = _activations()
    x = torch.cat(batches).numpy()
    fmt, scale = _searched(spelling, batches)
    assert str(fmt) == spelling
    scales = np.geomspace(0.02, 1.1, 240) * np.abs(x).max() / table[-1]
    errors = [_error(x, s, table, outliers) for s in scales]
    best = int(np.argmin(errors))
    assert _error(x, scale, table, outliers) <= errors[best] * 1.05
    # Nearer than a step to a scale that is as good as the best one (plateaus have several).
    good = scales[np.array(errors) <= errors[best] * 1.01]
    assert np.abs(np.log(good / scale)).min() <= np.log(step)


def test_the_error_that_was_minimised_is_the_layers() -> None:
    """`fake_quantize` is what the layer does with the found format and scale; no other candidate does better."""
    batches = _activations()
    x = torch.cat(batches)
    for spelling in (
        "ovp4:tensor",
        "ovp4-i8:tensor:paper",
        "ant4:tensor",
        "int4:tensor:mse",
    ):
        fmt, scale = _searched(spelling, batches)

        def error(factor: float, fmt: Format = fmt, scale: float = scale) -> float:
            y = fake_quantize(x, fmt, scale=torch.tensor([scale * factor]))
            return float((y - x).double().square().sum())

        assert error(1) <= min(error(factor) for factor in (0.6, 0.75, 1.3, 1.6)) * 1.001, spelling
        static, dynamic = error(1), float((encode(x, spelling).dequantize() - x).double().square().sum())
        assert static <= dynamic * 1.1, spelling  # the encoder searches the same tensor more finely


@pytest.mark.parametrize(
    "spelling", ["ovp8:tensor", "ovp4:tensor", "ovp4-int:tensor", "int4:tensor:mse", "ant4:tensor"]
)
def test_never_worse_than_spanning(spelling: str) -> None:
    batches = _activations()
    x = torch.cat(batches)
    errors = []
    for rule in (spelling, spelling.removesuffix(":mse") + ":minmax"):
        fmt, scale = _searched(rule, batches)
        errors.append(float((fake_quantize(x, fmt, scale=torch.tensor([scale])) - x).double().square().sum()))
    assert errors[0] <= errors[1] * (1 + 1e-6)


@pytest.mark.parametrize("cuts", [[1], [20], [3, 4, 60]])
def test_batches_and_their_order_do_not_matter(cuts: list[int]) -> None:
    x = torch.cat(_activations())
    parts = list(torch.tensor_split(x, cuts))
    for spelling in ("ovp4:tensor", "ant4:tensor", "int4:tensor:mse", "ovp4:tensor:reference:3sigma"):
        whole = _searched(spelling, [x])
        for order in (parts, parts[::-1]):
            fmt, scale = _searched(spelling, order)
            assert fmt == whole[0] and scale == pytest.approx(whole[1], rel=1e-6)


def test_each_candidates_errors_add_up_over_batches() -> None:
    batches, fmt = _activations(), Format.parse("ovp4:tensor")
    together = ScaleSearch(fmt)
    alone = [ScaleSearch(fmt) for _ in batches]
    for search in (together, *alone):
        for batch in batches:
            search.measure(batch)
    for batch, search in zip(batches, alone, strict=True):
        together.update(batch)
        search.update(batch)
    assert len(together._errors) == 2 * 67  # two kinds, 67 scales; nothing else is kept
    for candidate, error in together._errors.items():
        assert error == pytest.approx(sum(search._errors[candidate] for search in alone), rel=1e-9)


def test_choices_are_resolved_by_what_was_seen() -> None:
    uniform = [torch.rand(50, 64) * 2 - 1]
    assert str(_searched("ant4:tensor", uniform)[0]) == "int4:tensor:mse"
    far = torch.randn(50, 64)
    far[:, ::16] *= 20
    assert _searched("ant4:tensor", [far])[0].dtype.name in ("pot4", "flint4")
    for spelling, allowed in (
        ("ovp4:tensor", {"ovp4-int", "ovp4-flint"}),
        ("ovp4-i8:tensor", {"ovp4-int", "ovp4-flint_i8"}),
    ):
        for x in (uniform, [far]):
            fmt, scale = _searched(spelling, x)
            assert fmt.dtype.name in allowed
            other = (allowed - {fmt.dtype.name}).pop()
            mine, others = (
                float((fake_quantize(x[0], f, scale=torch.tensor([s])) - x[0]).double().square().sum())
                for f, s in ((fmt, scale), _searched(f"{other}:tensor", x))
            )
            assert mine <= others


@pytest.mark.parametrize("kind", ["int", "flint"])
@pytest.mark.parametrize("policy", ["optimal", "paper", "reference"])
def test_the_released_search_under_each_policy(policy: str, kind: str) -> None:
    """Of the 88 scales around three standard deviations, the one of least error under the format's own policy."""
    x = torch.distributions.StudentT(3.0).sample((60, 64))
    x = torch.where(torch.rand_like(x) < 0.1, x * 4, x)  # so many outliers that they meet: who stays moves the scale
    fmt, scale = _searched(f"ovp4-{kind}:tensor:3sigma" + ("" if policy == "optimal" else f":{policy}"), [x])
    assert fmt.rule.policy == policy and fmt.rule.range == "3sigma" and fmt.dtype.name == f"ovp4-{kind}"
    exact = x.double()
    mean, deviation = float(exact.mean()), float(exact.std(correction=0))
    base = max(abs(mean + 3 * deviation), abs(mean - 3 * deviation)) / {"int": 7, "flint": 16}[kind]
    candidates = [base * percent / 100 for percent in range(75, 250, 2)]
    errors = [float((fake_quantize(x, fmt, scale=torch.tensor([s])) - x).double().square().sum()) for s in candidates]
    assert len(candidates) == 88
    assert scale == pytest.approx(candidates[int(np.argmin(errors))], rel=1e-6)
    if kind == "int" and policy != "optimal":
        assert scale != _searched("ovp4-int:tensor:3sigma", [x])[1]


@pytest.mark.parametrize(
    "spelling", ["int8:tensor:minmax", "ovp4-int:tensor:minmax", "ovp4:tensor:minmax", "ant4:tensor:minmax"]
)
def test_minmax_spans_what_was_seen(spelling: str) -> None:
    batches = _activations()
    fmt, scale = _searched(spelling, batches)
    top = {"int8": 127, "ovp4-int": 7, "ovp4-flint": 16, "int4": 7, "pot4": 64, "flint4": 16}[fmt.dtype.name]
    assert scale == pytest.approx(float(torch.cat(batches).abs().max()) / top, rel=1e-6)


@pytest.mark.parametrize(
    "spelling", ["ovp4:tensor", "ant4:tensor", "int4:tensor:mse", "pot8:tensor", "ovp4:tensor:reference:3sigma"]
)
def test_nothing_but_zeros_gets_scale_one(spelling: str) -> None:
    """As everywhere: a tiny scale would wipe out whatever comes later, and zero would divide by zero."""
    zeros = [torch.zeros(3, 4), torch.zeros(1, 4)]
    fmt, scale = _searched(spelling, zeros)
    assert scale == 1
    assert fake_quantize(zeros[0], fmt, scale=torch.tensor([scale])).equal(zeros[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factor", [1e-4, 1.0, 3e2])
def test_sizes_and_float_types(dtype: torch.dtype, factor: float) -> None:
    batches = [(batch * factor).to(dtype) for batch in _activations()]
    for spelling in ("ovp4:tensor", "ant4:tensor"):
        fmt, scale = _searched(spelling, batches)
        unit_fmt, unit_scale = _searched(spelling, [batch.float() / factor for batch in batches])
        assert fmt == unit_fmt and scale / factor == pytest.approx(unit_scale, rel=1e-3)


@pytest.mark.parametrize("value", [1e-42, 1e-30, 1e30])
def test_extreme_sizes_stay_finite(value: float) -> None:
    x = torch.tensor([[1.0, -0.5, 0.25, 2.0]]) * value
    for spelling in ("ovp4:tensor", "ant4:tensor", "int4:tensor:mse", "pot8:tensor"):
        fmt, scale = _searched(spelling, [x])
        assert 0 < scale < float("inf")
        assert torch.isfinite(fake_quantize(x, fmt, scale=torch.tensor([scale]))).all()


def test_any_rank_and_odd_columns() -> None:
    x = torch.randn(2, 3, 5, 7)
    flat = _searched("ovp4-int:tensor", [x.reshape(-1, 7)])
    assert _searched("ovp4-int:tensor", [x]) == flat
    padded = _searched("ovp4-int:tensor", [torch.nn.functional.pad(x, (0, 1)) * 1.0])
    assert flat[1] != 0 and padded[1] != 0
    assert _searched("ovp4-int:tensor", [torch.randn(9)])[1] > 0


def test_the_input_is_left_alone() -> None:
    x = torch.randn(8, 6)
    before = x.clone()
    _searched("ovp4:tensor", [x])
    assert x.equal(before)


def test_never_used() -> None:
    with pytest.raises(EvenbitsError, match="no calibration data reached this layer"):
        ScaleSearch(Format.parse("ovp4:tensor")).best()
    measured = ScaleSearch(Format.parse("ovp4:tensor"))
    measured.measure(torch.ones(2, 2))
    with pytest.raises(EvenbitsError, match="no calibration data reached this layer"):
        measured.best()


def test_empty_batches_are_no_data() -> None:
    empty = torch.zeros(0, 64)
    with pytest.raises(EvenbitsError, match="no calibration data reached this layer"):
        _searched("ovp4:tensor", [empty, torch.zeros(2, 0, 64)])
    batches = _activations()
    assert _searched("ovp4:tensor", [empty, *batches, empty]) == _searched("ovp4:tensor", batches)


@pytest.mark.parametrize(
    "spelling", ["uint8:tensor:affine:mse", "uint8:tensor:affine", "int8:tensor:p99.9", "ovp4:tensor:p99"]
)
def test_what_is_not_searched_is_refused(spelling: str) -> None:
    with pytest.raises(EvenbitsError, match="a calibrated scale is searched for symmetric formats"):
        ScaleSearch(Format.parse(spelling))


def test_negative_numbers_in_an_unsigned_format_are_refused() -> None:
    search = ScaleSearch(Format.parse("uint4:tensor:mse"))
    search.measure(torch.rand(4, 4))
    with pytest.raises(EvenbitsError, match="cannot hold negative values"):
        search.measure(torch.randn(4, 4))
