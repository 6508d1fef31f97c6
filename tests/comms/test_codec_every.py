"""The contract, for every codec: sizes, bounds, zeros, determinism, refusals. Bounds come from the tensor alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenbits
from evenbits.comms.codecs import CODECS, Codec, get
from evenbits.comms.codecs.base import FLOATS, Meta
from evenbits.errors import EvenbitsError
from evenbits.numerics.metrics import sqnr_db

GROUPED = [
    *(f"int{bits}:{grain}" for bits in range(2, 9) for grain in ("g32", "row")),
    *("int8:tensor", "int4:g128", "int3:tensor", "int8:g1", "int4:g7:stochastic", "int4:row:affine:stochastic"),
    *(f"{u}int{bits}:g32:affine" for bits in range(1, 9) for u in ("", "u")),
    *(f"uint{bits}:g32:offset" for bits in range(1, 9)),
    *("int4:row:offset:stochastic", "int8:tensor:offset", "uint4:g7:offset"),
    *("int8:tensor:affine", "uint8:row:affine", "uint8:tensor:affine:free", "int4:g32:affine:free"),
    *("int9:g32", "int16:tensor", "uint16:g32", "uint11:g32:affine", "int16:row:affine", "int12:g7:stochastic"),
    *("uint10:tensor:affine:free", "uint16:tensor:affine:free", "int9:row:affine:free"),
    *("uint1:g64:affine:free", "uint1:row:affine:free", "int5:tensor:affine:free:stochastic"),
]
SIGNS = ["sign", "sign:row", "sign:g32", "int1:g128", "int1:tensor"]
CASTS = ["raw", "fp16", "bf16", "fp8"]
FORMATS = ["ovp4:g32", "ovp4-mix:g16", "ant4:g32", "flint4:row", "nf4:g64", "fp8:g32", "fp4:tensor", "mxfp4", "nvfp4"]
FORMATS += ["int4:g32:mse", "int4:row:7.5", "ovp8:row", "uint4:g32:affine:p99"]
MULTI = [
    *(f"multi{b}x{p}{cut}" for b, p in ((8, 8), (4, 16), (1, 2), (2, 4), (3, 1)) for cut in ("", ":cuberoot", ":dp"))
]
TABLES = ["lloyd1", "lloyd4", "lloyd8", "lloyd4:free"]
OTHERS = ["lowrank1", "lowrank4", "hadamard+int8:g32", "hadamard+int4:g128", "hadamard16+fp8", "hadamard4+int4:row"]
TOP = ["top0.1+int8:g128", "top0.5+multi8x8", "top0.01+fp16", "top1+raw", "top0.3+uint4:g32:affine", "top0.25+int1:g32"]
TOP += ["top0.2+hadamard+int4:g32", "top0.5+nf4:g64"]
EVERY = [*GROUPED, *SIGNS, *CASTS, *FORMATS, *MULTI, *TABLES, *OTHERS, *TOP]
SHAPES = [
    (0,),
    (3, 0, 2),
    (),
    (1,),
    (7,),
    (2, 5),
    (3, 33),
    (2, 3, 17),
    (130,),
    (4, 100),
    (1, 1, 1),
    (513,),
    (2, 4, 3, 3),
]
EPS = {torch.float64: 0.0, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
TINY = 2.0**-126


def tensor(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """One tensor of each kind that has ever gone wrong somewhere."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    made: dict[str, Callable[[], torch.Tensor]] = {
        "gauss": lambda: x,
        "tails": lambda: x * torch.exp(2 * torch.randn(shape, generator=generator)),
        "relu": lambda: x.relu(),
        "gradient": lambda: x * 1e-6,
        "zeros": lambda: torch.zeros(shape),
        "constant": lambda: torch.full(shape, -0.3),
        "far": lambda: 100 + x * 1e-3,
        "denormal": lambda: x * 1e-39,
        "huge": lambda: x.clamp(-3, 3) * (1e35 if dtype != torch.float16 else 2e4),
        "ties": lambda: (x * 2).round() / 2,
    }
    return made[kind]().to(dtype)


KINDS = ["gauss", "tails", "relu", "gradient", "zeros", "constant", "far", "denormal", "huge", "ties"]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    arguments = (st.sampled_from(KINDS), st.sampled_from(SHAPES), st.sampled_from(FLOATS), st.integers(0, 99))
    return tensor(*(draw(argument) for argument in arguments))


def groups(x: torch.Tensor, grain: str) -> list[slice]:
    """Slices of the flattened tensor that share a scale."""
    width = {"tensor": x.numel(), "row": x.shape[-1] if x.ndim else 1}.get(grain) or int(grain[1:])
    return [slice(start, start + width) for start in range(0, x.numel(), width)]


def grouped_bound(x: torch.Tensor, spec: str) -> torch.Tensor:
    """Half a step per element (stochastic: a step), with a step that was rounded up to bfloat16."""
    match = re.fullmatch(r"(u?)int(\d+):(\w+)(.*)", spec)
    assert match is not None
    levels, options = (1 << int(match[2])) - 1, match[4]
    flat, bound = x.double().flatten(), torch.zeros(x.numel(), dtype=torch.float64)
    for part in groups(x, match[3]):
        lo, hi = float(flat[part].min()), float(flat[part].max())
        slack = 0.0
        if "free" in options:
            slack = abs(lo) * 2**-7
            step = (hi - lo + slack) / levels
        elif "offset" in options:
            step = max((hi - lo) / max(1, levels - ("stochastic" in options)), max(hi, -lo) / 32000)
        elif "affine" in options:
            step = (max(hi, 0) - min(lo, 0)) / (levels - ("stochastic" in options))
        else:
            step = max(hi, -lo) / (levels // 2 if not match[1] else levels)
        bound[part] = max(step, TINY) * (1 + 2**-7) * (1 if "stochastic" in options else 0.5) + 2**-22 * max(
            abs(lo), abs(hi)
        )
    return bound


def multi_bound(x: torch.Tensor, spec: str) -> torch.Tensor:
    """Of the sorted form: half the step of the chunk that an element is in. Of the others: of the whole range."""
    match = re.fullmatch(r"multi(\d)x(\d+)(.*)", spec)
    assert match is not None
    flat, levels = x.double().flatten(), (1 << int(match[1])) - 1
    noise = 2**-21 * flat.abs().max() + 2**-140
    if match[3]:
        return torch.full_like(flat, float((flat.max() - flat.min()) / levels / 2 + noise))
    bound, order = torch.zeros_like(flat), flat.argsort(descending=True, stable=True)
    for part in order.chunk(int(match[2])):
        bound[part] = (flat[part].max() - flat[part].min()) / levels / 2 + noise
    return bound


def bound_of(x: torch.Tensor, spec: str) -> torch.Tensor:
    """What |x̂ − x| of each element may be at most, float64 [n]; the rounding to x's own type not counted."""
    flat = x.double().flatten()
    size = flat.abs()
    top = float(size.max())
    if spec in GROUPED:
        return grouped_bound(x, spec)
    if spec in MULTI:
        return multi_bound(x, spec)
    if spec in CASTS:
        limit = {"raw": math.inf, "fp16": 65504.0, "bf16": 3.38e38, "fp8": math.inf}[spec]
        relative, absolute = {
            "raw": (0.0, 0.0),
            "fp16": (2**-11, 2**-25),
            "bf16": (2**-8, 2**-133),
            "fp8": (2**-4, top * 2**-17 + 2**-134),
        }[spec]
        return size * relative + absolute + (size - limit).clamp(min=0)
    if spec in SIGNS:
        return size + top * (1 + 2**-7)
    if spec in TABLES:
        # One number at least lies within the range, so an element is off by no more than the range (or zero).
        return torch.full_like(flat, float(flat.clamp(min=0).max() - flat.clamp(max=0).min()) * 1.01 + TINY)
    if spec.startswith("lowrank"):
        return torch.full_like(flat, float(flat.norm()) * 1.001 + TINY)
    assert spec.startswith("hadamard")
    # |y| ≤ ‖block‖, and an error of y is one of x of equal norm: √m halves of a step at most.
    steps = {"hadamard+int8:g32": 127, "hadamard+int4:g128": 7, "hadamard16+fp8": 8, "hadamard4+int4:row": 7}[spec]
    return torch.full_like(flat, float(flat.norm()) * math.sqrt(128) / steps + 128 * TINY)


def own_type(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far rounding to a type may move y."""
    return y.double().abs().flatten() * EPS[dtype] + torch.finfo(dtype).tiny * EPS[dtype] * 2


def within(x: torch.Tensor, y: torch.Tensor, spec: str) -> None:
    error = (x.double() - y.double()).abs().flatten()
    worst = error - bound_of(x, spec) - own_type(y, x.dtype)
    assert bool((worst <= 0).all()), f"{spec}: {float(worst.max())} beyond the bound, largest {float(x.abs().max())}"


def fits(x: torch.Tensor, spec: str) -> torch.Tensor:
    """x as the codec wants it: symmetric unsigned types take magnitudes."""
    return x.abs() if re.match(r"uint\d+:\w+(:stochastic)?$", spec) else x


def sent(x: torch.Tensor, spec: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoded and decoded, with what must hold of both."""
    codec, meta = get(spec), Meta.of(x)
    payload = codec.encode(x, generator=torch.Generator().manual_seed(1))
    assert payload.dtype == torch.uint8 and payload.ndim == 1 and payload.is_contiguous()
    assert payload.numel() == codec.payload_bytes(meta)
    y = codec.decode(payload, meta)
    assert y.dtype == x.dtype and y.shape == x.shape and bool(y.isfinite().all())
    assert 0 <= codec.true_bits(payload, meta) <= 8 * payload.numel() / max(1, x.numel()) + 1e-9
    if codec.keeps_zero:
        assert bool((y[x == 0] == 0).all())
    if not bool(x.any()):
        assert not bool(y.any())
    return payload, y


@pytest.mark.parametrize("spec", [*GROUPED, *MULTI, *CASTS, *SIGNS, *TABLES, *OTHERS])
@settings(max_examples=12)
@given(x=tensors())
def test_sizes_zeros_and_bounds(spec: str, x: torch.Tensor) -> None:
    x = fits(x, spec)
    _, y = sent(x, spec)
    if x.numel():
        within(x, y, spec)


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_number_formats_travel_unchanged(spec: str, kind: str) -> None:
    for shape in ((3, 33), (2, 3, 17), (130,), ()):
        for dtype in (torch.float32, torch.bfloat16):
            x = tensor(kind, shape, dtype, 5)
            _, y = sent(x, spec)
            as_encoded = x if ":row" in spec else x.flatten()
            assert y.equal(evenbits.encode(as_encoded, spec).dequantize().view(shape))
    sent(torch.zeros(0), spec)


@pytest.mark.parametrize("spec", FORMATS)
@settings(max_examples=5)
@given(x=tensors())
def test_number_formats_have_fixed_sizes_zeros_and_bounds(spec: str, x: torch.Tensor) -> None:
    """No element is off by more than a quarter above its tensor's largest magnitude."""
    _, y = sent(x, spec)
    assert bool(torch.isfinite(y).all())
    if x.numel():
        top = float(x.double().abs().max())
        assert float((x.double() - y.double()).abs().max()) <= 1.25 * top + 2**-120


@pytest.mark.parametrize("spec", TOP)
@settings(max_examples=12)
@given(x=tensors())
def test_top_keeps_the_largest_and_codes_them_alone(spec: str, x: torch.Tensor) -> None:
    payload, y = sent(x, spec)
    codec, meta = get(spec), Meta.of(x)
    mask = codec.mask_of(payload, meta)
    assert mask is not None and mask.dtype == torch.bool and mask.shape == x.shape
    ratio, inner = spec.removeprefix("top").split("+", 1)
    assert int(mask.sum()) == math.ceil(round(float(ratio) * x.numel(), 6))
    assert not bool(y[~mask].any())
    if bool(mask.any()) and not bool(mask.all()):
        assert float(x[mask].abs().min()) >= float(x[~mask].abs().max())
    values = get(inner).encode(x[mask])
    assert y[mask].equal(get(inner).decode(values, Meta.of(x[mask])))


@pytest.mark.parametrize("spec", EVERY)
def test_equal_input_gives_equal_bytes_and_codecs_keep_no_state(spec: str) -> None:
    codec = get(spec)
    first, second = (
        fits(tensor("tails", (4, 100), torch.float32, 1), spec),
        fits(tensor("gauss", (513,), torch.float32, 2), spec),
    )
    before = dict(vars(codec))
    payloads = [codec.encode(x, generator=torch.Generator().manual_seed(3)) for x in (first, second, first.clone())]
    codec.decode(payloads[1], Meta.of(second))
    assert payloads[0].equal(payloads[2])
    assert vars(codec) == before
    unused: Codec = get.__wrapped__(spec)
    assert unused.encode(first, generator=torch.Generator().manual_seed(3)).equal(payloads[0])
    strided = torch.stack([first, first], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert codec.encode(strided, generator=torch.Generator().manual_seed(3)).equal(payloads[0])
    leaf = first.clone().requires_grad_()
    assert not codec.encode(leaf, generator=torch.Generator().manual_seed(3)).requires_grad


@pytest.mark.parametrize("spec", EVERY)
def test_a_spelling_names_the_codec_that_spells_it(spec: str) -> None:
    codec = get(spec)
    assert get(codec.spec).spec == codec.spec
    meta = Meta((4, 100), torch.float32)
    assert get(codec.spec).payload_bytes(meta) == codec.payload_bytes(meta)


def test_every_codec_is_tested() -> None:
    words = {re.match(r"[a-z]*", spec)[0] for spec in EVERY} | set(EVERY)  # type: ignore[index]
    assert set(CODECS) <= words


@pytest.mark.parametrize("spec", [spec for spec in EVERY if spec != "raw"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(spec: str, bad: float) -> None:
    for dtype in FLOATS:
        x = tensor("relu", (4, 100), torch.float32, 1).to(dtype)
        x[2, 17] = bad
        with pytest.raises(EvenbitsError, match="NaN or infinite"):
            get(spec).encode(x)


@pytest.mark.parametrize("spec", EVERY)
def test_other_types_and_other_lengths_are_refused(spec: str) -> None:
    codec, x = get(spec), fits(tensor("gauss", (4, 100), torch.float32, 1), spec)
    for wrong in (torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(EvenbitsError, match="codecs carry float32"):
            codec.encode(wrong)
    payload, meta = codec.encode(x), Meta.of(x)
    for foreign in (payload[:-1], torch.cat([payload, payload[:1]]), payload.to(torch.int8), payload[None]):
        with pytest.raises(EvenbitsError, match="bytes"):
            codec.decode(foreign, meta)


@pytest.mark.parametrize("spec", EVERY)
def test_foreign_bytes_decode_to_something_or_are_refused(spec: str) -> None:
    codec, refused = get(spec), 0
    for shape in ((4, 100), (513,)):
        meta = Meta(shape, torch.float32)
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)
            junk = torch.randint(0, 256, (codec.payload_bytes(meta),), generator=generator, dtype=torch.uint8)
            try:
                assert codec.decode(junk, meta).shape == shape
            except EvenbitsError:
                refused += 1
    if spec.startswith("top"):
        assert refused == 16


@pytest.mark.parametrize("spec", EVERY)
def test_a_payload_inside_a_larger_message_is_read_where_it_lies(spec: str) -> None:
    codec, x = get(spec), fits(tensor("tails", (3, 33), torch.float32, 1), spec)
    payload, meta = codec.encode(x), Meta.of(x)
    message = torch.cat([torch.zeros(3, dtype=torch.uint8), payload, torch.zeros(5, dtype=torch.uint8)])
    assert codec.decode(message[3 : 3 + len(payload)], meta).equal(codec.decode(payload, meta))


@pytest.mark.parametrize(
    "spec",
    ["int4:g128", "uint5:g128:offset", "sign:g128", "fp8", "multi6x4", "multi4x16:dp", "top0.1+int8:g128", "lloyd4"],
)
def test_large_and_odd_tensors_keep_what_small_ones_do(spec: str) -> None:
    large = torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(0))
    small = large[: 1 << 14]
    quality = [sqnr_db(x, sent(x, spec)[1]) for x in (large, small)]
    assert quality[0] == pytest.approx(quality[1], abs=1.5) and quality[0] > 2


@pytest.mark.parametrize("spec", EVERY)
def test_what_has_no_elements_needs_no_bytes(spec: str) -> None:
    assert get(spec).payload_bytes(Meta((0, 5), torch.float32)) == 0


@pytest.mark.parametrize("spec", ["raw", "fp16", "bf16", "fp8", "top0.1+raw", "top0.3+bf16"])
@settings(max_examples=12)
@given(x=tensors())
def test_what_was_decoded_is_coded_without_loss(spec: str, x: torch.Tensor) -> None:
    _, once = sent(x, spec)
    assert sent(once, spec)[1].equal(once)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int17:row", "data type 'int17'"),
        ("int4", "TYPE:GRANULARITY"),
        ("int4:g0", "unknown granularity"),
        ("int4:g128:free", "the grid of integers is"),
        ("int4:g128:affine:affine", "given once"),
        ("int4:g128:affine:offset", "the grid of integers is"),
        ("int4:g128:stochastic:stochastic", "given once"),
        ("int1:g128:stochastic", "no fraction"),
        ("uint1:g128:affine:stochastic", "both signs"),
        ("uint1:g128:offset:stochastic", "both signs"),
        ("int4:g128+raw", "nothing may follow"),
        ("multi8x3", "multiBxP"),
        ("multi9x8", "multiBxP"),
        ("multi8x8+int8:row", "nothing may follow"),
        ("top0+raw", "0 < R <= 1"),
        ("top1.5+raw", "0 < R <= 1"),
        ("top0.1", "topR\\+CODEC"),
        ("top0.1+top0.1+raw", "one index set"),
        ("top0.1+nothing", "unknown codec 'nothing'"),
        ("hadamard24+int4:g32", "power of two"),
        ("hadamard", "hadamard\\+CODEC"),
        ("lloyd9", "lloydB"),
        ("lowrank0", "lowrankR"),
        ("sign:axis0", "sign:gN"),
        ("signs", "Did you mean 'sign'"),
        ("fp32", "unknown codec 'fp32'. Did you mean"),
        ("raw:row", "cast codec"),
        ("", "unknown codec"),
    ],
)
def test_misspellings_are_refused_with_a_hint(spec: str, message: str) -> None:
    with pytest.raises(EvenbitsError, match=message):
        get(spec)


def test_a_codec_is_named_by_a_string() -> None:
    with pytest.raises(EvenbitsError, match="named by a string"):
        get(8)  # type: ignore[arg-type]
