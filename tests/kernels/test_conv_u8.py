"""Byte convolutions against sums of Python-sized integers (int64), in both backends."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import EvenbitsError
from evenbits.kernels import conv_u8
from evenbits.kernels.conv_u8 import conv2d_u8, from_bytes, max_pool_u8, report_conv, to_bytes


@pytest.fixture(autouse=True)
def _said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The word about the float backend has a test of its own."""
    monkeypatch.setattr(conv_u8, "_warned", [True])


@pytest.fixture(params=["here", "float"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What this machine takes, and the float convolution, which is all that others have."""
    if request.param == "float":
        monkeypatch.setattr(conv_u8, "report_conv", lambda device="cpu": ("float", "the test asked"))
    yield request.param


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]  # N, C, H, W
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    zero: int
    seed: int

    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randint(0, 256, self.shape, dtype=torch.uint8, generator=generator)
        size = (self.outputs, self.shape[1] // self.groups, *self.kernel)
        return x, torch.randint(-128, 128, size, dtype=torch.int8, generator=generator)

    @property
    def where(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


def sums(case: Case, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Σ(x − zero)·w in int64 by windows: no convolution of torch's."""
    (ph, pw), (sh, sw), (dh, dw) = case.padding, case.stride, case.dilation
    n, c, h, w = case.shape
    padded = torch.zeros(n, c, h + 2 * ph, w + 2 * pw, dtype=torch.int64)
    padded[:, :, ph : ph + h, pw : pw + w] = x.long() - case.zero
    kh, kw = case.kernel
    rows, columns = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    total = torch.zeros(n, case.groups, case.outputs // case.groups, rows, columns, dtype=torch.int64)
    grouped = weight.long().view(case.groups, -1, c // case.groups, kh, kw)
    for i in range(kh):
        for j in range(kw):
            top, left = i * dh, j * dw
            part = padded[:, :, top : top + (rows - 1) * sh + 1 : sh, left : left + (columns - 1) * sw + 1 : sw]
            part = part.reshape(n, case.groups, 1, c // case.groups, rows, columns)
            total += (part * grouped[None, :, :, :, i, j, None, None]).sum(3)
    return total.view(n, case.outputs, rows, columns)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups, per_group = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 9))
    depthwise = draw(st.booleans())
    c = groups * per_group
    groups, outputs = (c, c * draw(st.integers(1, 2))) if depthwise else (groups, groups * draw(st.integers(1, 9)))
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    kernel, dilation = pair(1, 4), pair(1, 3)
    padding = pair(0, 3)
    reach = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    h, w = (max(1, r) + draw(st.integers(0, 6)) for r in reach)
    zero = draw(st.sampled_from([0, 1, 127, 128, 200, 255]))
    seed = draw(st.integers(0, 2**16))
    return Case((draw(st.integers(1, 3)), c, h, w), outputs, kernel, pair(1, 3), padding, dilation, groups, zero, seed)


def check_sums(case: Case) -> None:
    x, weight = case.operands()
    one = torch.ones(case.outputs)
    y = conv2d_u8(x, 1.0, case.zero, weight, one, None, *case.where)
    assert y.dtype == torch.float32
    assert y.equal(sums(case, x, weight).float())  # int32 → float32 rounds once, to nearest


@given(case=cases())
def test_sums_are_exact_here(case: Case) -> None:
    check_sums(case)


@given(case=cases())
def test_sums_are_exact_in_the_float_backend(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_u8, "report_conv", lambda device="cpu": ("float", "the test asked"))
        check_sums(case)


@pytest.mark.parametrize("channels", [3, 16, 64, 1200])
@pytest.mark.parametrize("zero", [0, 128, 255])
def test_the_largest_products_neither_saturate_16_bits_nor_round_in_float32(
    backend: str, channels: int, zero: int
) -> None:
    """Pairs of 255 · −128 overflow int16; 9 · 64 of them are just beyond 2²⁴, 9 · 1200 far."""
    case = Case((1, channels, 3, 5), 4, (3, 3), (1, 1), (0, 0), (1, 1), 1, zero, 0)
    x = torch.full(case.shape, 255 if zero != 255 else 0, dtype=torch.uint8)
    weight = torch.full((4, channels, 3, 3), -128, dtype=torch.int8)
    weight[1], weight[2, 0, 0, 0], weight[3, ::2] = 127, -127, 127
    expected = sums(case, x, weight)
    if channels == 1200 and zero != 128:
        assert int(expected.abs().max()) > 2**28
    y = conv2d_u8(x, 1.0, zero, weight, torch.ones(4), None, *case.where)
    if channels < 64:
        assert y.equal(expected.float())
    # Above 2²⁴ the zero point is taken off in float32: roundings of the sum before it, of what it takes, and after it.
    before = 2 * expected.abs().double() + 2 * taken(zero, weight)
    assert ((y.double() - expected).abs() <= 3 * 2.0**-24 * before).all()


@pytest.mark.parametrize("channels", [1, 8, 15, 16, 17, 32, 64])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 3), (0, 2)])
def test_borders(channels: int, width: int, padding: tuple[int, int]) -> None:
    """Windows in padding alone, few channels beside padding, outputs one column wide: oneDNN crashes or errs there."""
    for kernel, stride, dilation in (((1, 1), (2, 2), (1, 1)), ((3, 3), (1, 2), (1, 1)), ((2, 2), (1, 3), (2, 1))):
        reach = dilation[1] * (kernel[1] - 1) + 1
        if width + 2 * padding[1] >= reach:
            shape = (2, 2 * channels, 7, width)
            check_sums(Case(shape, 2 * 24, kernel, stride, padding, dilation, 2, 200, width))


def taken(zero: int, weight: torch.Tensor) -> torch.Tensor:
    """|zero · Σw| of each output, [1, O, 1, 1]."""
    return zero * weight.long().sum(dim=(1, 2, 3)).abs().double().view(1, -1, 1, 1)


@st.composite
def epilogues(draw: st.DrawFn) -> dict[str, Any]:
    grid = st.tuples(st.floats(0.01, 2.0), st.integers(0, 255))
    return {
        "activation": draw(st.sampled_from(conv_u8.ACTIVATIONS)),
        "out": draw(st.one_of(st.none(), grid)),
        "added": draw(st.one_of(st.none(), grid)),
        "bias": draw(st.booleans()),
        "x_scale": draw(st.floats(0.005, 0.1)),
    }


@pytest.mark.parametrize("forced", [False, True])
@given(case=cases(), how=epilogues())
def test_the_epilogue(forced: bool, case: Case, how: dict[str, Any]) -> None:
    """Float output to float32 rounding; bytes equal wherever the real value is no rounding tie."""
    x, weight = case.operands()
    generator = torch.Generator().manual_seed(case.seed + 1)
    weight_scale = torch.rand(case.outputs, generator=generator) * 0.02 + 0.001
    bias = torch.randn(case.outputs, generator=generator) if how["bias"] else None
    exact = sums(case, x, weight)
    expected = exact.double() * how["x_scale"] * weight_scale.double().view(1, -1, 1, 1)
    # The zero point is taken off in float32: the sum before that is rounded, and so is what is taken off.
    parts = exact.abs().double() + 2 * taken(case.zero, weight)
    size = parts * how["x_scale"] * weight_scale.double().view(1, -1, 1, 1)
    addend = None
    if bias is not None:
        expected, size = expected + bias.double().view(1, -1, 1, 1), size + bias.double().abs().view(1, -1, 1, 1)
    if how["added"] is not None:
        codes = torch.randint(0, 256, exact.shape, dtype=torch.uint8, generator=generator)
        addend = (codes, *how["added"])
        other = (codes.double() - how["added"][1]) * how["added"][0]
        # The zero point may be applied after the product, which rounds figures as large as zero · scale.
        expected, size = expected + other, size + (codes.double() + how["added"][1]) * how["added"][0]
    if how["activation"] != "none":
        expected = expected.clamp(0, 6 if how["activation"] == "relu6" else None)
    with pytest.MonkeyPatch.context() as patch:
        if forced:
            patch.setattr(conv_u8, "report_conv", lambda device="cpu": ("float", "the test asked"))
        kept = None if addend is None else addend[0].clone()
        y = conv2d_u8(
            x, how["x_scale"], case.zero, weight, weight_scale, bias, *case.where,
            activation=how["activation"], out=how["out"], addend=addend,
        )  # fmt: skip
    assert addend is None or addend[0].equal(kept)  # it is somebody else's tensor
    slack = size * 8 * 2.0**-24
    if how["out"] is None:
        assert y.dtype == torch.float32
        assert ((y.double() - expected).abs() <= slack + 1e-30).all()
        return
    scale, zero = how["out"]
    real = expected / scale
    tie = (real - real.floor() - 0.5).abs() <= 1e-4 + slack / scale
    codes = (real.round() + zero).clamp(0, 255)
    assert y.dtype == torch.uint8
    assert ((y.double() == codes) | tie).all()
    assert ((y.double() - codes).abs() <= 1).all()


def test_every_kind_of_memory_gives_the_same(backend: str) -> None:
    base, weight = Case((4, 6, 7, 5), 8, (3, 2), (1, 1), (0, 0), (1, 1), 1, 9, 3).operands()
    run = lambda x, w: conv2d_u8(x, 0.1, 9, w, torch.ones(8), None, (1, 1), (1, 1), (1, 1), 1, out=(4.0, 3))  # noqa: E731
    expected = run(base, weight)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(4, 6, 7, 10, dtype=torch.uint8)
    wide[..., ::2] = base
    for x in (base.to(memory_format=torch.channels_last), wide[..., ::2], base.transpose(2, 3).contiguous().mT):
        assert run(x, weight).equal(expected)
    assert run(base, weight.to(memory_format=torch.channels_last)).equal(expected)
    assert run(base, weight.flatten(1).clone().view(8, 6, 3, 2)).equal(expected)


@pytest.mark.parametrize("activation", conv_u8.ACTIVATIONS)
@pytest.mark.parametrize("out", [None, (0.5, 7)])
@pytest.mark.parametrize("added", [False, True])
def test_torch_takes_it_for_an_op(backend: str, activation: str, out: tuple[float, int] | None, added: bool) -> None:
    case = Case((2, 4, 6, 5), 6, (3, 3), (2, 1), (1, 1), (1, 1), 2, 100, 1)
    x, weight = case.operands()
    codes = torch.randint(0, 256, (2, 6, 3, 5), dtype=torch.uint8) if added else None
    args = (x, 0.02, 100, weight, torch.rand(6), torch.randn(6), [2, 1], [1, 1], [1, 1], 2, activation)
    tail = (*((0.0, 0) if out is None else out), codes, 0.3, 12)
    torch.library.opcheck(torch.ops.evenbits.conv2d_u8, (*args, *tail), test_utils=("test_schema", "test_faketensor"))


def simple(x: torch.Tensor, weight: torch.Tensor, zero: int = 3) -> torch.Tensor:
    return conv2d_u8(x, 1.0, zero, weight, torch.ones(len(weight)), None, (1, 1), (0, 0), (1, 1), 1)


def exact(x: torch.Tensor, weight: torch.Tensor, zero: int = 3) -> torch.Tensor:
    case = Case(tuple(x.shape), len(weight), tuple(weight.shape[2:]), (1, 1), (0, 0), (1, 1), 1, zero, 0)  # type: ignore[arg-type]
    return sums(case, x, weight).float()


def test_a_packed_weight_is_made_anew_when_the_weight_changes() -> None:
    x, weight = Case((1, 8, 5, 5), 8, (3, 3), (1, 1), (0, 0), (1, 1), 1, 3, 0).operands()
    flat = weight.flatten(1).clone()
    for tensor in (weight, flat.view(8, 8, 3, 3)):
        assert simple(x, tensor).equal(exact(x, tensor))
        tensor[2, 3] = -128
        assert simple(x, tensor).equal(exact(x, tensor))
        tensor.neg_()
        assert simple(x, tensor).equal(exact(x, tensor))
    flat.zero_()  # through what it is a view of
    assert simple(x, flat.view(8, 8, 3, 3)).count_nonzero() == 0


def test_one_weight_with_several_grids_and_scales() -> None:
    """What is packed once must not hold the zero point or the scales it was packed with."""
    x, weight = Case((1, 8, 5, 5), 8, (3, 3), (1, 1), (0, 0), (1, 1), 1, 3, 0).operands()
    for zero in (0, 17, 255, 0, 128):
        assert simple(x, weight, zero).equal(exact(x, weight, zero))
    for scale in (torch.ones(8), torch.arange(1.0, 9.0), torch.full((8,), 0.25)):
        y = conv2d_u8(x, 0.5, 3, weight, scale, None, (1, 1), (0, 0), (1, 1), 1)
        assert torch.allclose(y, exact(x, weight) * 0.5 * scale.view(1, -1, 1, 1), rtol=1e-6)


def test_no_stale_weight_after_the_tensor_died_and_nothing_is_kept() -> None:
    gc.collect()
    before = len(conv_u8._packed)
    x = Case((1, 8, 5, 5), 8, (3, 3), (1, 1), (0, 0), (1, 1), 1, 3, 0).operands()[0]
    places = set()
    for seed in range(30):  # the allocator hands the same memory, and Python the same id, out again
        weight = Case((1, 8, 5, 5), 8, (3, 3), (1, 1), (0, 0), (1, 1), 1, 3, seed).operands()[1]
        places.add((id(weight), weight.data_ptr()))
        assert simple(x, weight).equal(exact(x, weight))
        del weight
    assert len(places) < 30
    gc.collect()
    assert len(conv_u8._packed) == before


def test_under_inference_mode(backend: str) -> None:
    """Tensors made inside have no version that would tell of changes; those made outside may be read there."""
    x, outside = Case((1, 8, 5, 5), 8, (3, 3), (1, 1), (0, 0), (1, 1), 1, 3, 0).operands()
    with torch.inference_mode():
        inside = outside.clone()
        assert simple(x, outside).equal(exact(x, outside)) and simple(x, inside).equal(exact(x, inside))
        inside.neg_()
        assert simple(x, inside).equal(exact(x, inside))


def test_what_is_refused(backend: str) -> None:
    x, weight = Case((1, 4, 5, 5), 2, (3, 3), (1, 1), (0, 0), (1, 1), 1, 3, 0).operands()
    codes = torch.zeros(1, 2, 3, 3, dtype=torch.uint8)
    for bad in (x.to(torch.int8), x.float(), x[0]):
        with pytest.raises(EvenbitsError, match=r"takes uint8 \[N, C, H, W\]"):
            simple(bad, weight)
    for bad in (weight.to(torch.uint8), weight.float(), weight.int()):
        with pytest.raises(EvenbitsError, match="an int8 weight"):
            simple(x, bad)
    with pytest.raises(EvenbitsError, match="gelu"):
        conv2d_u8(x, 1.0, 0, weight, torch.ones(2), None, (1, 1), (0, 0), (1, 1), 1, activation="gelu")
    for bad in (codes.to(torch.int8), codes.float(), codes[:, :, :1, :1], codes[0], codes.expand(2, 2, 3, 3)):
        with pytest.raises(EvenbitsError, match=r"is uint8 \[1, 2, 3, 3\]"):
            conv2d_u8(
                x, 1.0, 0, weight, torch.ones(2), None, (1, 1), (0, 0), (1, 1), 1, out=(1.0, 0), addend=(bad, 1.0, 0)
            )


def test_the_slow_backend_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = Case((1, 4, 5, 5), 2, (3, 3), (1, 1), (0, 0), (1, 1), 1, 3, 0).operands()
    monkeypatch.setattr(conv_u8, "_warned", [])
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert report_conv("cpu")[0] == "float" and "saturate" in report_conv("cpu")[1]
    assert report_conv("cuda")[0] == "float"
    with pytest.warns(UserWarning, match="run as float ones: this CPU has no VNNI"):
        assert simple(x, weight).equal(exact(x, weight))
    simple(x, weight)  # a second warning would be an error


@given(scale=st.floats(1e-3, 10), zero=st.integers(0, 255), seed=st.integers(0, 999))
def test_bytes_and_back(scale: float, zero: int, seed: int) -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) * 100 * scale
    codes = to_bytes(x, scale, zero)
    real = x.double() / scale
    expected = (real.round() + zero).clamp(0, 255)
    tie = (real - real.floor() - 0.5).abs() < 1e-4
    assert ((codes.double() == expected) | tie).all()
    every = torch.arange(256, dtype=torch.uint8)
    assert to_bytes(from_bytes(every, scale, zero), scale, zero).equal(every)


@pytest.mark.parametrize(
    "kernel, stride, padding", [((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)), ((3, 2), (1, 3), (1, 0))]
)
def test_max_pooling_is_torchs(kernel: Any, stride: Any, padding: Any) -> None:
    codes = torch.randint(0, 256, (2, 3, 9, 8), dtype=torch.uint8)
    expected = torch.nn.functional.max_pool2d(codes.float(), kernel, stride, padding)
    assert max_pool_u8(codes, kernel, stride, padding).float().equal(expected)
