"""Triton's kernels compiled for GPUs that are not there: what the compiler made of them, gated by counts.

The launches are those of calls.py, caught on their way; ptxas and nvdisasm come with Triton. Nothing here runs on a GPU
and nothing is timed: gates are on which instructions there are, and how many.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from evenbits.kernels.fused import Rows
from evenbits.kernels.linear import linear_pair, linear_w8a8
from evenbits.kernels.ops import linear_pair_float, linear_pair_fp8
from evenbits.numerics.encode import encode

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="TRITON IS NOT INSTALLED: no kernel of the GPU was compiled"
)
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.int32: "i32"}
TYPES[torch.uint8] = "u8"
GPUS = [80, 90]
INTEGER = {"PRMT", "LOP3", "SHF", "IADD3", "VIADD", "IMAD", "SEL", "LEA", "ISETP", "BFE", "BFI", "SGXT", "I2F", "I2FP"}


def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


class Compiled:
    """A kernel's PTX and SASS."""

    def __init__(self, kernel: Any) -> None:
        self.ptx: str = kernel.asm["ptx"]
        self.cubin: bytes = kernel.asm["cubin"]
        self.shared: int = kernel.metadata.shared

    def matrix(self) -> set[str]:
        """The matrix instructions of the PTX."""
        return set(re.findall(r"\b(?:wgmma\.mma_async|mma)\.[\w.]+", self.ptx))

    def spilled(self, folder: Path) -> int:
        """Bytes of a thread's stack: registers that did not suffice."""
        (folder / "kernel.cubin").write_bytes(self.cubin)
        command = [_tool("cuobjdump"), "--dump-resource-usage", folder / "kernel.cubin"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return sum(map(int, re.findall(r"STACK:(\d+)", text)))

    def loop(self, folder: Path) -> Counter[str]:
        """Instructions of the longest loop of the SASS, by name."""
        (folder / "kernel.cubin").write_bytes(self.cubin)
        command = [_tool("nvdisasm"), "-c", folder / "kernel.cubin"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        labels, found, longest = {}, [], []
        for line in text.splitlines():
            if label := re.match(r"(\.L_\w+):", line):
                labels[label[1]] = len(found)
            if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([^;]*);", line):
                found.append(instruction[1])
                back = re.match(r"BRA.*`\((\.L_\w+)\)", instruction[1])
                if back and back[1] in labels and len(found) - labels[back[1]] > len(longest):
                    longest = found[labels[back[1]] :]
        return Counter(re.split(r"[. ]", line)[0] for line in longest)


def _compiled(kernel: Any, arguments: tuple[Any, ...], meta: dict[str, Any], capability: int) -> Compiled:
    """As Triton compiles a launch: None and 1 are constants, what 16 divides is marked so, pointers too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, marks = {}, {}, {}
    options = {key: meta.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    for i, name in enumerate(kernel.arg_names):
        value = meta[name] if name in meta else arguments[i]
        if name in meta or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], marks[(i,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                marks[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, marks)
    assert options["enable_fp_fusion"] is False
    return Compiled(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options))


def _launches(call: Callable[[], Any]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What calls.py would launch. Nothing runs."""
    from evenbits.kernels import dispatch
    from evenbits.kernels.triton import calls

    caught: list[Any] = []

    class Spy:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **meta: caught.append((self.kernel, arguments, meta))

    names = ("quantize_kernel", "e4m3_kernel", "int8_kernel", "epilogue_kernel", "pair_kernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "fused", lambda _: calls)
        patch.setattr(dispatch, "e4m3", lambda _: calls)
        for name in names:
            patch.setattr(calls, name, Spy(getattr(calls, name)))
        call()
    return caught


def _catch(call: Callable[[], Any], kernel: str, capability: int) -> Compiled:
    (found,) = [launch for launch in _launches(call) if launch[0].fn.__name__ == kernel]
    return _compiled(*found, capability)


@cache
def _packed(fmt: str) -> Any:
    torch.manual_seed(0)
    return encode(torch.randn(128, 512), fmt)


def _pair(fmt: str, rows: int, dtype: torch.dtype, capability: int, activation: str = "none") -> Compiled:
    q, x, bias = _packed(fmt), torch.randn(rows, 512).bfloat16(), torch.randn(128)
    if dtype == torch.int8:
        how = (q.packed, q.scale, q.global_scale, str(q.format), bias, "int8:row", None, None, None, None, activation)
        return _catch(lambda: linear_pair(x, *how), "pair_kernel", capability)
    words = {"global_scale": q.global_scale, "activation": activation}
    if dtype == torch.float8_e4m3fn:
        call = lambda: linear_pair_fp8(x, q.packed, q.scale, q.format, bias, **words)  # noqa: E731
        return _catch(call, "pair_kernel", capability)
    call = lambda: linear_pair_float(x.to(dtype), q.packed, q.scale, q.format, bias, **words)  # noqa: E731
    return _catch(call, "pair_kernel", capability)


def _int8(rows: int, capability: int, activation: str = "none", kernel: str = "int8_kernel") -> Compiled:
    weight, scale, bias = torch.ones(128, 512, dtype=torch.int8), torch.ones(128, 1), torch.ones(128)
    words = (torch.randn(rows, 512).bfloat16(), weight, scale, bias, "int8:row", None, None, None, None, activation)
    return _catch(lambda: linear_w8a8(*words), kernel, capability)


def _s8(capability: int) -> str:
    return r"wgmma\.mma_async.*\.s32\.s8\.s8" if capability == 90 else r"mma\.sync.*\.s32\.s8\.s8\.s32"


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("rows", [1, 512])
def test_int8_products_are_matrix_instructions(rows: int, capability: int) -> None:
    compiled = _int8(rows, capability)
    kinds = compiled.matrix()
    # Tiles of 16 rows are below what a warp group multiplies: the older instruction serves them.
    assert kinds and all(re.search(_s8(80 if rows == 1 else capability), kind) for kind in kinds), kinds
    assert re.search(r"cp\.async\.cg\.shared\.global.*0x10", compiled.ptx)  # sixteen bytes a load


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize(("fmt", "rows"), [("int4:row", 1), ("ovp4-int:row:minmax", 512), ("ovp4-int:g128:minmax", 1)])
def test_packed_products_with_int8_are_matrix_instructions(fmt: str, rows: int, capability: int) -> None:
    compiled = _pair(fmt, rows, torch.int8, capability)
    kinds = compiled.matrix()
    assert kinds and all(re.search(_s8(capability), kind) for kind in kinds), kinds
    assert re.search(r"cp\.async\.cg\.shared\.global.*0x10", compiled.ptx)


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_products_with_floats_are_matrix_instructions(dtype: torch.dtype, capability: int) -> None:
    for fmt, rows in (("int4:g128", 1), ("ovp4-flint:row:minmax", 512)):
        compiled = _pair(fmt, rows, dtype, capability)
        name = TYPES[dtype].replace("fp", "f")
        kinds = compiled.matrix()
        assert kinds and all(re.search(rf"f32\.{name}\.{name}", kind) for kind in kinds), kinds
        assert re.search(r"cp\.async\.cg\.shared\.global.*0x10", compiled.ptx)


@pytest.mark.parametrize(("capability", "name"), [(89, r"mma\.sync.*"), (90, r"wgmma\.mma_async.*")])
@pytest.mark.parametrize(
    ("fmt", "rows", "most"),
    [
        ("ovp4-int:row:minmax", 1, 4.3),
        ("ovp4-flint:row:minmax", 1, 3.3),
        pytest.param("int4:row", 1, 2.6, marks=pytest.mark.slow),
        pytest.param("flint4:row:minmax", 1, 1.9, marks=pytest.mark.slow),
        pytest.param("ovp4-int:row:minmax", 512, 4.6, marks=pytest.mark.slow),
        pytest.param("ovp4-flint:g64:minmax", 1, 4.1, marks=pytest.mark.slow),
    ],
)
def test_products_with_e4m3(fmt: str, rows: int, most: float, capability: int, name: str, tmp_path: Path) -> None:
    """Matrix instructions of E4M3, few integer instructions for a weight, and sums of 64 products (Ada: of a tile)
    that go to float32 by additions of their own."""
    from evenbits.kernels.triton import calls

    compiled = _pair(fmt, rows, torch.float8_e4m3fn, capability)
    tile = calls.tiles(rows, True, _packed(fmt).format.granularity.size)
    kinds, loop = compiled.matrix(), compiled.loop(tmp_path)
    assert kinds and all(re.fullmatch(name + r"\.f32\.e4m3\.e4m3(\.f32)?", kind) for kind in kinds), kinds
    assert re.search(r"cp\.async\.cg\.shared\.global.*0x10", compiled.ptx) and "fma." not in compiled.ptx
    assert compiled.shared <= 99 * 1024 and compiled.spilled(tmp_path) == 0
    count = sum(number for instruction, number in loop.items() if instruction in INTEGER)
    assert count / (2 * tile.n * tile.k / (32 * tile.warps)) <= most, dict(loop)
    additions, sums = 2 * (max(tile.k // 64, 1) if capability == 90 else 1), tile.n * tile.m // (32 * tile.warps)
    assert loop["FADD"] >= additions * sums, dict(loop)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu"])
def test_no_product_and_sum_are_contracted(activation: str, tmp_path: Path) -> None:
    """Where bits are claimed. A division is one instruction of PTX; in SASS it is a few, correctly rounded."""
    for compiled in (
        _int8(64, 80, activation),
        _pair("int4:g128", 64, torch.int8, 80, activation),
        _pair("ovp4-flint:row:minmax", 1, torch.int8, 90, activation),
    ):
        assert not re.search(r"\bfma\.|\bmad\.\w*f32", compiled.ptx)
        assert not re.search(r"\b(?:div\.(?:full|approx)|ex2|rcp\.approx|tanh)", compiled.ptx)
        assert ("div.rn.f32" in compiled.ptx) == (activation != "none")


def test_rows_and_epilogues_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from evenbits.kernels.triton import calls, loader

    monkeypatch.setenv(loader.VARIABLE, "1")
    found = _int8(64, 80, "gelu", "epilogue_kernel")
    assert "fma." not in found.ptx and "cvt.rn.bf16" in found.ptx
    x = torch.randn(3, 512).half()
    for affine, factors in ((False, None), (True, torch.rand(512))):
        rows = Rows(calls, -127, 127, 127.0, affine, factors)  # type: ignore[arg-type]
        compiled = _catch(lambda rows=rows: calls.quantize(x, rows), "quantize_kernel", 80)  # type: ignore[misc]
        assert "fma." not in compiled.ptx and "div.rn.f32" in compiled.ptx
        assert ("div.rn.f64" in compiled.ptx) == affine
    compiled = _catch(lambda: calls.quantize_e4m3(x, torch.rand(512)), "e4m3_kernel", 80)
    assert "fma." not in compiled.ptx and "div.rn.f32" in compiled.ptx


@pytest.mark.parametrize(
    ("fmt", "dtype", "rows"),
    [
        ("ovp4-flint:row:minmax", torch.int8, 1),
        ("ovp4-flint:row:minmax", torch.int8, 512),
        ("ovp4-flint:row:minmax", torch.bfloat16, 512),
        ("ovp4-int:g128:minmax", torch.float32, 512),
        ("nf4:row", torch.float32, 1),
    ],
)
def test_tiles_fit_the_smaller_gpus(fmt: str, dtype: torch.dtype, rows: int, tmp_path: Path) -> None:
    """8.6 and 8.9 have 99 KB of shared memory for a block; nothing is spilled."""
    compiled = _pair(fmt, rows, dtype, 89)
    assert compiled.shared <= 99 * 1024 and compiled.spilled(tmp_path) == 0


def test_float32_products_are_not_cut_to_tf32() -> None:
    compiled = _pair("nf4:row", 1, torch.bfloat16, 80)
    assert "tf32" not in compiled.ptx and "fma.rn.f32" in compiled.ptx and not compiled.matrix()


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize(
    ("fmt", "dtype", "most"),
    [
        ("int4:row", torch.int8, 0.9),
        ("flint4:row:minmax", torch.int8, 2.6),
        ("ovp4-int:row:minmax", torch.int8, 4.8),
        ("int4:row", torch.float16, 2.6),
        ("ovp4-int:row:minmax", torch.float16, 6.0),
        ("ovp4-int:row:minmax", torch.bfloat16, 8.0),
    ],
)
def test_integer_instructions_for_a_weight(
    fmt: str, dtype: torch.dtype, most: float, capability: int, tmp_path: Path
) -> None:
    """All of the inner loop's at one row, addresses and masks too, counted in SASS: a naive decode takes ten."""
    from evenbits.kernels.triton import calls

    tile = calls.tiles(1, packed=True)
    weights = 2 * tile.n * tile.k / (32 * tile.warps)
    loop = _pair(fmt, 1, dtype, capability).loop(tmp_path)
    assert loop
    count = sum(number for name, number in loop.items() if name in INTEGER) / weights
    assert count <= most, dict(loop)
