"""Tensors that do not fit are refused by every operation, whichever backend would run: none is read beyond its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from evenbits.errors import EvenbitsError
from evenbits.kernels import use_backend
from evenbits.kernels.cpu import loader
from evenbits.kernels.ops import int8_matmul, linear_pair, linear_pair_float, linear_w8a8, quantize_rows

BACKENDS = ["torch_int_mm", "torch_fp32", "reference"] + ["c"] * (loader.status().library is not None)
M, K, N = 3, 64, 5
META = torch.device("meta")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def _common() -> dict[str, Any]:
    return {"x": torch.randn(M, K), "bias": torch.randn(N), "multiplier": torch.rand(K) + 0.5}


def _static() -> dict[str, Any]:
    zero, sums = torch.tensor([3], dtype=torch.int32), torch.ones(N, dtype=torch.int32)
    return {"fmt": "int8:tensor:affine", "scale": torch.tensor([0.05]), "zero_point": zero, "weight_sum": sums}


def w8a8(**given: Any) -> torch.Tensor:
    weight = torch.ones(N, K, dtype=torch.int8)
    words = {**_common(), **_static(), "weight_OI": weight, "weight_scale": torch.rand(N, 1), **given}
    return linear_w8a8(**words)


def _packed(group: int = 0) -> dict[str, Any]:
    fmt, groups = (f"int4:g{group}", K // group) if group else ("int4:row", 1)
    weight, factor = torch.ones(N, K // 2, dtype=torch.uint8), torch.tensor([2.0])
    scale = torch.rand(N, groups).half()
    return {"weight_OB": weight, "weight_scale": scale, "weight_format": fmt, "global_scale": factor}


def pair(**given: Any) -> torch.Tensor:
    return linear_pair(**{**_common(), **_static(), **_packed(), **given})


def pair_groups(**given: Any) -> torch.Tensor:
    return linear_pair(**{**_common(), **_packed(16), "fmt": "int8:row", **given})


def pair_float(**given: Any) -> torch.Tensor:
    return linear_pair_float(**{**_common(), **_packed(16), **given})


def rows(**given: Any) -> torch.Tensor:
    words = {**_common(), **_static(), **given}
    x, fmt = words.pop("x"), words.pop("fmt")
    return quantize_rows(x, fmt, **{name: words[name] for name in ("multiplier", "scale", "zero_point")})[0]


INTEGER = (w8a8, pair)
LINEAR = (*INTEGER, pair_groups, pair_float)
PACKED = (pair, pair_groups, pair_float)
GROUPS = (pair_groups, pair_float)
CASES: list[tuple[tuple[Callable[..., torch.Tensor], ...], str, torch.Tensor, str]] = [
    (LINEAR, "bias", torch.ones(N - 1), "bias is 5 numbers of .* given torch.float32 \\[4\\]"),
    (LINEAR, "bias", torch.ones(N, 1), "bias is 5 numbers"),
    (LINEAR, "bias", torch.ones(N, dtype=torch.int32), "bias is 5 numbers of float32"),
    (LINEAR, "bias", torch.ones(N, device=META), "meta"),
    ((*LINEAR, rows), "multiplier", torch.ones(K - 1), "multiplier is 64 numbers"),
    ((*LINEAR, rows), "multiplier", torch.ones(1), "multiplier is 64 numbers"),
    ((*LINEAR, rows), "multiplier", torch.ones(K, dtype=torch.int64), "multiplier is 64 numbers"),
    ((*LINEAR, rows), "multiplier", torch.ones(K, device=META), "meta"),
    ((*LINEAR, rows), "x", torch.ones(M, K, dtype=torch.int32), "activations are floating-point"),
    (LINEAR, "x", torch.ones(M, K - 8), "int8 \\[M, K\\]|columns of int4"),
    ((*INTEGER, rows), "scale", torch.ones(2), "scale is 3 numbers of float32"),
    ((*INTEGER, rows), "scale", torch.ones(1, dtype=torch.float64), "scale is 1 numbers of float32"),
    ((*INTEGER, rows), "scale", torch.ones(1, device=META), "meta"),
    ((*INTEGER, rows), "zero_point", torch.ones(1), "zero_point is 1 numbers of int32"),
    ((*INTEGER, rows), "zero_point", torch.ones(1, dtype=torch.int64), "zero_point is 1 numbers of int32"),
    (INTEGER, "weight_sum", torch.ones(N, dtype=torch.int64), "weight_sum is 5 numbers of int32"),
    (INTEGER, "weight_sum", torch.ones(N - 2, dtype=torch.int32), "weight_sum is 5 numbers of int32"),
    (INTEGER, "weight_sum", torch.ones(N, dtype=torch.int32, device=META), "meta"),
    (INTEGER, "weight_scale", torch.ones(3, 1), "weight_scale is 5 numbers"),
    (GROUPS, "weight_scale", torch.ones(1), "weight_scale is 20 numbers"),
    (GROUPS, "weight_scale", torch.ones(N, 3), "weight_scale is 20 numbers"),
    (INTEGER, "weight_scale", torch.ones(N, 1, dtype=torch.float64), "weight_scale is 5 numbers of .* torch.float64"),
    (GROUPS, "weight_scale", torch.ones(N, 4, dtype=torch.float64), "weight_scale is 20 numbers of .* torch.float64"),
    (PACKED, "weight_scale", torch.ones(N, 1, device=META), "meta|weight_scale is 20"),
    (PACKED, "global_scale", torch.ones(1, dtype=torch.float64), "global_scale is 1 numbers of float32"),
    (PACKED, "global_scale", torch.ones(2), "global_scale is 1 numbers of float32"),
    (PACKED, "weight_OB", torch.ones(N, K // 2, dtype=torch.uint8, device=META), "meta"),
    ((w8a8,), "weight_OI", torch.ones(N, K, dtype=torch.int8, device=META), "meta"),
]
EVERY = [(call, *rest) for calls, *rest in CASES for call in calls]


@pytest.mark.parametrize("call", [*LINEAR, rows])
def test_what_fits_is_taken(call: Callable[..., torch.Tensor]) -> None:
    assert call().shape == ((M, K) if call is rows else (M, N))


@pytest.mark.parametrize(
    ("call", "name", "tensor", "says"), EVERY, ids=[f"{c.__name__}-{n}-{i}" for i, (c, n, *_) in enumerate(EVERY)]
)
def test_what_does_not_fit_is_refused(
    call: Callable[..., torch.Tensor], name: str, tensor: torch.Tensor, says: str
) -> None:
    with pytest.raises(EvenbitsError, match=says):
        call(**{name: tensor})


def test_powers_of_two_have_no_factor() -> None:
    scale = torch.full((N, 2), 127, dtype=torch.uint8)
    with pytest.raises(EvenbitsError, match="no global_scale"):
        pair_groups(weight_scale=scale, weight_format="mxfp4")


def test_two_devices_are_refused() -> None:
    with pytest.raises(EvenbitsError, match="meta"):
        int8_matmul(torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 3, dtype=torch.int8, device=META))


@pytest.mark.parametrize("columns", [65536, 131072])
def test_affine_sums_that_may_not_fit_int32_are_refused(columns: int) -> None:
    """(code − zero) · weight reaches 255 · 127 a column: twice what symmetric codes reach."""
    weight, scale, sums = torch.full((1, columns), 127, dtype=torch.int8), torch.ones(1), torch.tensor([127 * columns])
    words = {"weight_sum": sums.to(torch.int32), "scale": scale, "zero_point": torch.tensor([-128], dtype=torch.int32)}
    with pytest.raises(EvenbitsError, match=r"(131072|262144) int8 products may not fit"):
        linear_w8a8(torch.ones(1, columns), weight, scale, None, "int8:tensor:affine", **words)
    packed = torch.full((1, columns // 2), 0x77, dtype=torch.uint8)
    with pytest.raises(EvenbitsError, match="may not fit"):
        linear_pair(torch.ones(1, columns), packed, scale, "int4:row", None, "int8:tensor:affine", **words)


def test_the_largest_affine_sum_is_right() -> None:
    columns = 65535
    weight, scale, sums = torch.full((1, columns), 127, dtype=torch.int8), torch.ones(1), torch.tensor([127 * columns])
    words = {"weight_sum": sums.to(torch.int32), "scale": scale, "zero_point": torch.tensor([-128], dtype=torch.int32)}
    y = linear_w8a8(torch.full((1, columns), 1e6), weight, scale, None, "int8:tensor:affine", **words)
    assert y.item() == torch.tensor(255.0 * 127 * columns).item()
