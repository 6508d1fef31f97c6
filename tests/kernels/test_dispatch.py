"""Which backend runs, that it is said aloud, and that forcing one never sticks."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from evenbits.errors import EvenbitsError
from evenbits.kernels import dispatch, report, use_backend
from evenbits.kernels.cpu import loader
from evenbits.kernels.ops import int8_matmul, linear_w8a8

needs_library = pytest.mark.skipif(loader.status().library is None, reason=loader.status().reason)


@pytest.fixture(autouse=True)
def _fresh_choices() -> Iterator[None]:
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


def _vnni(monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    """A machine without the CPU library, with or without VNNI."""
    monkeypatch.setattr(loader, "status", lambda: loader.Status(None, "the library is absent"))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: present)


def test_without_vnni_float32_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a = torch.randint(-128, 128, (5, 3000), dtype=torch.int8)
    b = torch.randint(-128, 128, (7, 3000), dtype=torch.int8)
    exact = (a.long() @ b.long().t()).tolist()
    _vnni(monkeypatch, False)
    monkeypatch.setattr(torch, "_int_mm", None)  # calling it would be an error
    with caplog.at_level(logging.WARNING, "evenbits.kernels"):
        assert int8_matmul(a, b).tolist() == exact
        assert int8_matmul(a, b).tolist() == exact
    assert [(r.name, r.levelname) for r in caplog.records] == [("evenbits.kernels", "WARNING")]
    assert "no VNNI" in caplog.text
    assert "no speed-up" in caplog.text
    assert dispatch.choice("cpu").backend == "torch_fp32"
    assert "no VNNI" in dispatch.choice("cpu").reason


def test_results_are_identical_with_and_without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(6, 2500), torch.randint(-127, 128, (9, 2500), dtype=torch.int8)
    args = (x, weight, torch.rand(9, 1), torch.randn(9), "int8:row")
    with use_backend("reference"):
        expected = linear_w8a8(*args)
    for present in (True, False) if torch.cpu._is_vnni_supported() else (False,):
        _vnni(monkeypatch, present)
        dispatch._choose.cache_clear()
        assert linear_w8a8(*args).equal(expected)


def test_an_absent_library_is_said_aloud_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _vnni(monkeypatch, True)
    with caplog.at_level(logging.DEBUG, "evenbits.kernels"):
        assert dispatch.choice("cpu").backend == "torch_int_mm"
        assert dispatch.choice("cpu").backend == "torch_int_mm"
    assert [(r.name, r.levelname) for r in caplog.records] == [("evenbits.kernels", "WARNING")]
    assert "the library is absent" in caplog.text
    assert "the library is absent" in dispatch.choice("cpu").reason
    with pytest.raises(EvenbitsError, match="'c' is not there: the library is absent"), use_backend("c"):
        pytest.fail("an absent backend was entered")


@needs_library
def test_the_library_runs_silently_and_names_its_variant(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "evenbits.kernels"):
        assert dispatch.choice("cpu").backend == "c"
        with loader.use_variant("portable"):
            assert dispatch.choice("cpu").reason.endswith("variant portable")
    assert caplog.records == []


def test_cuda_needs_no_vnni_and_other_devices_say_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With Triton or without (test_triton.py)."""
    _vnni(monkeypatch, False)
    assert dispatch.choice("cuda").backend in ("triton", "torch_int_mm")
    assert "VNNI" not in caplog.text
    assert dispatch.choice("mps").backend == "torch_fp32"
    assert "no integer matrix product on mps" in caplog.text


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[needs_library] if n == "c" else []) for n in dispatch.BACKENDS if n != "triton"],
)
def test_forcing_a_backend_calls_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls: list[str] = []

    def spy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append(name)
        return torch.zeros(len(a), len(b), dtype=torch.int32)

    monkeypatch.setitem(dispatch.BACKENDS, name, spy)
    ones = torch.ones(2, 3, dtype=torch.int8)
    with use_backend(name):
        chosen = dispatch.choice("cpu")
        assert (chosen.device, chosen.backend) == ("cpu", name)
        assert chosen.reason.startswith("forced by use_backend")
        int8_matmul(ones, ones)
    assert calls == [name]


def test_forcing_nests_and_ends_with_the_block_even_on_an_error() -> None:
    before = dispatch.choice("cpu")
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        with use_backend("torch_fp32"):
            assert dispatch.choice("cpu").backend == "torch_fp32"
        assert dispatch.choice("cpu").backend == "reference"
        raise RuntimeError("inside")
    assert dispatch.choice("cpu") == before
    assert dispatch._forced == []


def test_unknown_backend() -> None:
    with pytest.raises(EvenbitsError, match=r"unknown kernel backend 'torch_fp16'. Did you mean 'torch_fp32'\?"):
        with use_backend("torch_fp16"):
            pytest.fail("an unknown backend was entered")
    assert dispatch._forced == []


def test_report_has_a_line_for_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [line.device for line in report()] == ["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [line.device for line in report()] == ["cpu", "cuda"]
    assert all(line.reason for line in report())
