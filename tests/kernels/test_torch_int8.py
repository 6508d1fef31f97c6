"""Every integer backend against exact integers, where float32 is right and where it is not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.kernels import reference, torch_int8
from evenbits.kernels.cpu import loader
from evenbits.kernels.dispatch import BACKENDS

needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="torch._int_mm saturates without VNNI")
needs_library = pytest.mark.skipif(loader.status().library is None, reason=loader.status().reason)
MARKS = {"torch_int_mm": [needs_vnni], "c": [needs_library]}
# Those of a CPU: Triton's interpreter has tests of its own (interpreted_triton.py).
EACH = [pytest.param(name, marks=MARKS.get(name, [])) for name in BACKENDS if name != "triton"]


def _exact(a: torch.Tensor, b: torch.Tensor) -> list[list[int]]:
    """Python integers."""
    return [[sum(x * y for x, y in zip(p, q, strict=True)) for q in b.tolist()] for p in a.tolist()]


def _codes(*shape: int, low: int = -128) -> torch.Tensor:
    return torch.randint(low, 128, shape, dtype=torch.int8)


def test_there_are_backends_to_test() -> None:
    assert {"c", "triton", "torch_int_mm", "torch_fp32", "reference"} == set(BACKENDS)


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 5, 3), (2, 1, 7), (3, 3, 8), (17, 9, 31), (16, 16, 16), (5, 33, 65), (1, 64, 129), (33, 7, 257)],
)
def test_odd_shapes(backend: str, m: int, n: int, k: int) -> None:
    a, b = _codes(m, k), _codes(n, k)
    product = BACKENDS[backend](a, b)
    assert product.dtype == torch.int32
    assert product.tolist() == _exact(a, b)


@pytest.mark.parametrize("backend", EACH)
@given(data=st.data())
def test_any_small_product(backend: str, data: st.DataObject) -> None:
    m, n, k = (data.draw(st.integers(1, 9)) for _ in range(3))
    codes = st.integers(-128, 127) | st.sampled_from([-128, -127, 127])
    a, b = (
        torch.tensor(data.draw(st.lists(codes, min_size=rows * k, max_size=rows * k)), dtype=torch.int8).view(rows, k)
        for rows in (m, n)
    )
    assert BACKENDS[backend](a, b).tolist() == _exact(a, b)


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("k", [1, 3, 64, 1023, 1024, 1025, 2049, 8191, 131071])
@pytest.mark.parametrize(("left", "right"), [(127, 127), (-127, 127), (-128, -128), (-128, 127)])
def test_worst_case_data(backend: str, k: int, left: int, right: int) -> None:
    a = torch.full((3, k), left, dtype=torch.int8)
    b = torch.full((2, k), right, dtype=torch.int8)
    assert BACKENDS[backend](a, b).unique().tolist() == [left * right * k]


def _where_float32_fails(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All sums odd and far above 2²⁴: the last bit has no place in a float32 significand."""
    a, b = torch.full((4, k), 127, dtype=torch.int8), torch.full((3, k), 127, dtype=torch.int8)
    a[:, -1] = torch.tensor([1, 3, 5, 7], dtype=torch.int8)
    b[:, -1] = torch.tensor([1, 3, 5], dtype=torch.int8)
    return a, b


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("k", [1500, 4097, 14336, 65537])
def test_exact_where_float32_is_wrong(backend: str, k: int) -> None:
    a, b = _where_float32_fails(k if k % 2 else k + 1)
    exact = _exact(a, b)
    assert max(map(max, exact)) > 2**24
    naive = (a.float() @ b.float().t()).to(torch.int64)
    assert naive.tolist() != exact
    assert BACKENDS[backend](a, b).tolist() == exact
    assert (a.double() @ b.double().t()).to(torch.int64).tolist() == exact


@pytest.mark.parametrize("backend", EACH)
def test_long_random_rows_against_float64(backend: str) -> None:
    a, b = _codes(8, 20011), _codes(5, 20011)
    assert BACKENDS[backend](a, b).tolist() == (a.double() @ b.double().t()).to(torch.int64).tolist()


@pytest.mark.parametrize("backend", EACH)
def test_layouts(backend: str) -> None:
    a, b = _codes(40, 24), _codes(40, 24)
    pairs = [
        (a.t(), b.t()),
        (a[::3], b[1::2]),
        (a[:, ::2], b[:, ::2]),
        (a[:, 3:11], b[:, 5:13]),
        (a.flip(0), b.flip(1)),
        (a[:1].expand(6, 24), b),
        (a, b[:1].expand(3, 24)),
        (a[:, :1].expand(40, 24), b),
    ]
    for left, right in pairs:
        assert BACKENDS[backend](left, right).tolist() == _exact(left, right)


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("strides", [(0, 1), (1, 1), (3, 1), (512, 1), (700, 1)])
@pytest.mark.parametrize("others", [1, 2, 40])
def test_strides_of_a_dimension_of_size_one_mean_nothing(backend: str, strides: tuple[int, int], others: int) -> None:
    """torch._int_mm itself leaves its output unwritten for some of them (pytorch issue 195066)."""
    row, many = _codes(1, 512).as_strided((1, 512), strides), _codes(others, 512)
    assert BACKENDS[backend](row, many).tolist() == _exact(row, many)
    assert BACKENDS[backend](many, row).tolist() == _exact(many, row)
    column, columns = _codes(5, 1).as_strided((5, 1), (1, strides[0])), _codes(others, 1)
    assert BACKENDS[backend](column, columns).tolist() == _exact(column, columns)


@pytest.mark.parametrize("backend", EACH)
def test_operands_are_left_alone(backend: str) -> None:
    a, b = _codes(5, 9), _codes(4, 9)
    before = a.clone(), b.clone()
    BACKENDS[backend](a, b)
    assert a.equal(before[0])
    assert b.equal(before[1])


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_the_sums(backend: str, dtype: torch.dtype) -> None:
    a, b = _codes(3, 2000), _codes(5, 2000)
    with torch.autocast("cpu", dtype=dtype):
        assert BACKENDS[backend](a, b).tolist() == _exact(a, b)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_float32_precision_does_not_matter(precision: str) -> None:
    a, b = _codes(20, 3000), _codes(20, 3000)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch_int8.fp32(a, b).tolist() == _exact(a, b)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_reference_refuses_what_int32_cannot_hold() -> None:
    a = torch.full((1, 131072), -128, dtype=torch.int8)
    assert int(reference.int8_matmul(a[:, 1:], a[:, 1:])) == 2**31 - 2**14
    with pytest.raises(EvenbitsError, match="over K = 131072 does not fit into int32"):
        reference.int8_matmul(a, a)


class _PickyIntMM:
    """torch._int_mm as CUDA has it: refuses M <= 16 and K or N that are no multiples of 8."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int, int]] = []

    def __call__(self, a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
        (m, k), n = a_MK.shape, b_KN.shape[1]
        assert a_MK.dtype == b_KN.dtype == torch.int8
        assert m > 16
        assert k % 8 == 0
        assert n % 8 == 0
        assert b_KN.t().is_contiguous()
        self.shapes.append((m, n, k))
        return (a_MK.long() @ b_KN.long()).to(torch.int32)


@pytest.mark.parametrize("m", [1, 16, 17, 18, 40])
@pytest.mark.parametrize("n", [1, 8, 13])
@pytest.mark.parametrize("k", [1, 7, 8, 24, 33])
def test_cuda_shapes_are_padded_and_cut_back(monkeypatch: pytest.MonkeyPatch, m: int, n: int, k: int) -> None:
    picky = _PickyIntMM()
    monkeypatch.setattr(torch, "_int_mm", picky)
    a, b = _codes(m, k), _codes(n, k)
    assert torch_int8._padded(a, b).tolist() == _exact(a, b)
    assert picky.shapes == [(max(m, 17), -(-n // 8) * 8, -(-k // 8) * 8)]  # and no more than is needed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["triton", "torch_int_mm", "torch_fp32"])
def test_on_a_gpu(backend: str) -> None:
    """Not "c", which is the CPU's, nor "reference": CUDA has no int64 matrix product."""
    for m, n, k in [(1, 1, 1), (5, 3, 9), (16, 8, 8), (33, 65, 4097)]:
        a, b = _codes(m, k), _codes(n, k)
        assert BACKENDS[backend](a.cuda(), b.cuda()).tolist() == _exact(a, b)
