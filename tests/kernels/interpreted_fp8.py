"""FP8: Triton's kernels in Triton's interpreter, on CPU tensors. test_triton.py runs this file too.

Codes and scales are the numerics' to the bit. Sums are float32 in an order of the kernel's own, so results are held to
a bound, (8 + K/8)·2⁻²⁴ of Σ|x·w|, which the interpreter's float32 sums keep. A tensor core sums less exactly: on a GPU
the bound has to be looked at anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreted_triton import FLOATS, INF, NAN, _same, _weight
from torch import nn

from evenbits.kernels import dispatch, pair_fp8, use_backend
from evenbits.kernels.activations import ACTIVATIONS
from evenbits.kernels.ops import linear_pair_fp8
from evenbits.kernels.pair_codes import e4m3_codes
from evenbits.numerics import ovp
from evenbits.numerics.codebook import Codebook
from evenbits.numerics.fake import fake_quantize
from evenbits.numerics.format import Format
from evenbits.numerics.qtensor import QTensor

assert os.environ.get("TRITON_INTERPRET") == "1", "run it through test_triton.py"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # numpy's, about NaN and infinity
FORMATS = ["int4:row", "int4:tensor", "flint4:row", "fp4:row", "pot4:row", "mxfp4", "nvfp4", "int4:g128", "int4:g24"]
FORMATS += ["ovp4-int:row", "ovp4-flint:row", "ovp4-flint_i8:row", "ovp4-int:g16", "ovp4-flint:g64", "flint4:g8"]
FORMATS += ["int4:g1000", "ovp4-flint_i8:g40"]
E4M3, ROWS = Codebook.parse("fp8"), Format.parse("fp8:row")


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


def _run(x: torch.Tensor, q: QTensor, bias: torch.Tensor | None = None, **words: Any) -> torch.Tensor:
    return linear_pair_fp8(x, q.packed, q.scale, q.format, bias, global_scale=q.global_scale, **words)


def _codes(x: torch.Tensor, multiplier: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel makes of rows, columns in their order again; those that fill two planes up are zeros."""
    from evenbits.kernels.triton import calls

    codes, scale = calls.quantize_e4m3(x, multiplier)
    plane = codes.shape[1] // 2
    found = torch.stack([codes[:, :plane], codes[:, plane:]], dim=2).flatten(1)
    assert not found[:, x.shape[1] :].any()
    return found[:, : x.shape[1]], scale


def _agree(x: torch.Tensor, multiplier: torch.Tensor | None = None) -> None:
    found, scale = _codes(x, multiplier)
    balanced = x.float() if multiplier is None else x.float() * multiplier
    values, expected = pair_fp8.quantize_e4m3(balanced)
    assert _same(scale, expected) and found.equal(E4M3.quantize(values))
    assert _same(E4M3.decode(found) * scale, fake_quantize(balanced, ROWS))


@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_are_those_of_the_numerics(dtype: torch.dtype) -> None:
    decades = 3 if dtype == torch.float16 else 34
    for m, k in ((1, 1), (40, 37), (5, 301), (1, 16500), (2, 33000)):
        x = (torch.randn(m, k) * 10.0 ** torch.randint(-decades, decades + 1, (m, 1))).to(dtype)
        x[0, 0] = 0.0
        for factors in (None, torch.rand(k) + 0.5):
            _agree(x, factors)


def test_every_code_and_every_tie() -> None:
    """Under the scale 1: all values, their midpoints and what lies beside these, of both signs."""
    values = torch.tensor(sorted({abs(value) for value in E4M3.values if value == value}))
    middles = (values[1:] + values[:-1]) / 2
    beside = [torch.nextafter(middles, torch.tensor(end)) for end in (0.0, 500.0)]
    row = torch.cat([values, middles, *beside])
    x = torch.stack([row, -row])
    assert _codes(x)[1].tolist() == [[1.0], [1.0]]
    _agree(x)
    _agree(torch.linspace(-448, 448, 4001).reshape(1, -1))


def test_rows_at_the_ends_of_float32() -> None:
    x = torch.randn(8, 20)
    for row, size in enumerate((1e-45, 1e-40, 1e-38, 1e-36, 3e-34, 1e36, 3.4028234663852886e38, 0.0)):
        x[row] = x[row] / x[row].abs().max() * size
    _agree(x)


def test_broken_rows() -> None:
    x = torch.randn(6, 20)
    x[1, 3], x[2, 4], x[3, 5], x[4] = NAN, INF, -INF, 0.0
    _agree(x)
    assert _run(x, _weight(7, 20, "int4:row")).isnan().all(1).tolist() == [False, True, True, True, False, False]


def _by_hand(
    x: torch.Tensor, q: QTensor, bias: torch.Tensor, multiplier: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact result, and how far from it float32 sums may be, and the one rounding to the activations' type."""
    rounded = fake_quantize(x.float() if multiplier is None else x.float() * multiplier, ROWS).double()
    decoded, k = q.dequantize().double(), x.shape[-1]
    exact = rounded @ decoded.t() + bias.double()
    slack = (rounded.abs() @ decoded.abs().t() + bias.double().abs()) * (8 + k / 8) * 2.0**-24
    return exact, slack + (0 if x.dtype == torch.float32 else exact.abs() * torch.finfo(x.dtype).eps / 2 * 1.001)


@pytest.mark.parametrize("fmt", FORMATS)
def test_products(fmt: str) -> None:
    cases = [(3, 1, 1), (2, 5, 2), (17, 17, 65), (1, 33, 600 if ":row" in fmt else 257)]
    for m, n, k in cases:
        q, x, bias = _weight(n, k, fmt), torch.randn(m, k), torch.randn(n)
        if isinstance(e4m3_codes(q.format, k), str):  # pairs of an odd width get groups that no kernel has
            continue
        exact, slack = _by_hand(x, q, bias)
        assert ((_run(x, q, bias) - exact).abs() <= slack).all(), (m, n, k)
        with use_backend("reference"):
            assert ((_run(x, q, bias) - exact).abs() <= slack).all(), (m, n, k)


@pytest.mark.parametrize(("m", "n", "k", "fmt"), [(130, 5, 66, "ovp4-flint:row"), (70, 65, 256, "int4:g128")])
def test_many_rows(m: int, n: int, k: int, fmt: str) -> None:
    q, x, bias = _weight(n, k, fmt), torch.randn(m, k), torch.randn(n)
    exact, slack = _by_hand(x, q, bias)
    assert ((_run(x, q, bias) - exact).abs() <= slack).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fmt", ["ovp4-int:row", "ovp4-flint:g64"])
def test_the_steps_around_a_product(fmt: str, dtype: torch.dtype) -> None:
    q, factors, bias = _weight(33, 128, fmt), torch.rand(128) + 0.5, torch.randn(33).to(dtype)
    x = (torch.randn(6, 128) * 3).to(dtype)
    exact, slack = _by_hand(x, q, bias, factors)
    assert ((_run(x, q, bias, multiplier=factors) - exact).abs() <= slack).all()
    for activation in ACTIVATIONS:
        words: dict[str, Any] = {"bias": bias, "multiplier": factors, "activation": activation}
        found = _run(x.view(2, 3, 128), q, **words)
        with use_backend("reference"):
            expected = _run(x.view(2, 3, 128), q, **words)
        assert found.dtype == dtype
        tolerance = max(4e-6, torch.finfo(dtype).eps)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["int", "flint", "flint_i8"])
def test_every_byte_of_pairs(kind: str) -> None:
    """A row of each byte; illegal bytes are zeros, as in the numerics."""
    values, packed = ovp.decode_table(ovp.pair_kind(kind)), torch.arange(256, dtype=torch.uint8).reshape(256, 1)
    scale = torch.ones(256, 1, dtype=torch.float16)
    y = linear_pair_fp8(448 * torch.eye(2), packed, scale, f"ovp4-{kind}:row", None)
    assert (y / 448).equal(values.reshape(256, 2).t())


def test_no_rows_and_strided_inputs() -> None:
    q, every = _weight(33, 127, "int4:row"), torch.randn(8, 254)
    assert _run(torch.empty(0, 127), q).shape == (0, 33)
    for x in (every[::2, ::2], every[:, :127], torch.randn(127, 4).t()):
        assert _run(x, q).equal(_run(x.contiguous(), q))
    assert _run(every[:, :127].double(), q).dtype == torch.float64


def test_layers_say_that_they_are_served_and_are() -> None:
    import evenbits
    from evenbits.pipeline.variants import served

    assert dispatch.choice("cpu").reason.endswith("FP8 activations too")
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32)), torch.randn(5, 64)
    result = evenbits.quantize(
        model, scheme={"weights": "ovp4:row", "input_activations": "fp8:row"}, method="olive", data=[x]
    )
    assert result.backend == "FP8 product of packed weights by triton"
    assert set(served(model).values()) == {"linear_pair_fp8 by triton"}
    found = model(x)
    with use_backend("reference"):
        assert set(served(model).values()) == {"linear_pair_float by reference"}
        torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)


def test_torch_sees_through() -> None:
    q, x, bias = _weight(17, 65, "ovp4-int:row"), torch.randn(2, 3, 65), torch.randn(17)
    args = (x, q.packed, q.scale, q.global_scale, str(q.format), bias, None, "relu")
    torch.library.opcheck(torch.ops.evenbits.linear_pair_fp8, args, test_utils=("test_schema", "test_faketensor"))
