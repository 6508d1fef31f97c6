"""Finding, checking and refusing the CPU library; choosing a variant; what a failed build says."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from evenbits.errors import EvenbitsError
from evenbits.kernels.cpu import build, loader

needs_library = pytest.mark.skipif(loader.status().library is None, reason=loader.status().reason)


@pytest.fixture(autouse=True)
def _fresh_status() -> Iterator[None]:
    loader.status.cache_clear()
    yield
    loader.status.cache_clear()


def test_an_absent_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVENBITS_CPU_LIBRARY", str(tmp_path / "absent.so"))
    status = loader.status()
    assert status.library is None
    assert "was not built" in status.reason and "make kernels" in status.reason and "C compiler" in status.reason


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_file_that_is_no_library_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.so").write_bytes(content)
    monkeypatch.setenv("EVENBITS_CPU_LIBRARY", str(tmp_path / "broken.so"))
    status = loader.status()
    assert status.library is None
    assert "does not load" in status.reason


@needs_library
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "source_hash", lambda: "0123456789abcdef")
    with pytest.raises(EvenbitsError, match=r"built from other sources than those beside it; run `make kernels`"):
        loader.status()


def test_the_hash_follows_sources_and_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    (tmp_path / "a.c").write_text("int a;")
    first = build.source_hash()
    (tmp_path / "a.c").write_text("int b;")
    second = build.source_hash()
    monkeypatch.setattr(build, "_COMMON", ["-O0"])
    assert len({first, second, build.source_hash()}) == 3


@needs_library
def test_the_variant_comes_from_the_processor_the_environment_or_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    library = loader.status().library
    assert library is not None
    monkeypatch.delenv(loader.VARIABLE, raising=False)
    assert loader.variant() == next(iter(library.variants))
    assert "portable" in library.variants
    loader.status.cache_clear()
    monkeypatch.setenv(loader.VARIABLE, "portable")
    assert loader.variant() == "portable"
    with loader.use_variant(next(iter(library.variants))):
        assert loader.variant() == next(iter(library.variants))
    assert loader.variant() == "portable"
    loader.status.cache_clear()
    monkeypatch.setenv(loader.VARIABLE, "sse9")
    with pytest.raises(EvenbitsError, match=r"unknown CPU kernel variant .* 'sse9'"):
        loader.variant()
    monkeypatch.delenv(loader.VARIABLE)
    with pytest.raises(EvenbitsError, match="'avx1024'"), loader.use_variant("avx1024"):
        pytest.fail("an unknown variant was entered")
    assert loader._forced == []


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CC", "/nonexistent/cc")
    with pytest.raises(build.BuildError, match="was not found"):
        build.build(tmp_path)
    assert build.main(["--sanitize", str(tmp_path)]) == 1
    assert "torch's own operations run" in capsys.readouterr().err
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="no C compiler"):
        build.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_compiler_is_quoted_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho it broke >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(build.BuildError, match="failed:\nit broke"):
        build.build(tmp_path)
    assert list(tmp_path.iterdir()) == [compiler]


@pytest.mark.skipif(not build._VARIANTS.get(platform.machine()), reason="no variants for this processor")
def test_a_variant_that_does_not_compile_is_left_out_with_a_word(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(iter(build._VARIANTS[platform.machine()]))
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, sources)
    (sources / f"{name}.c").write_text("this is no C")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "_VARIANTS", {platform.machine(): {name: build._VARIANTS[platform.machine()][name]}})
    monkeypatch.setattr(build, "_COMMON", ["-O0", *build._COMMON[2:]])
    monkeypatch.setenv("EVENBITS_CPU_LIBRARY", str(build.build(tmp_path)))
    assert f"the library goes without the variant {name}: " in capsys.readouterr().err
    library = loader.status().library
    assert library is not None
    assert list(library.variants) == ["portable"]
