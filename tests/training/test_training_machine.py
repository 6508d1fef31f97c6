"""Which device and back end a process takes; GPUs are made up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from evenbits.errors import EvenbitsError
from evenbits.training.machine import device_of, join


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, local: int = 0, processes: int = 1) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))


@pytest.mark.parametrize(
    ("count", "local", "processes", "given", "expected"),
    [
        (0, 0, 1, "auto", "cpu"),
        (1, 0, 1, "auto", "cuda:0"),
        (1, 1, 2, "auto", "cpu"),  # one GPU is not shared by two
        (2, 1, 2, "auto", "cuda:1"),
        (2, 1, 2, "cuda", "cuda:1"),
        (2, 0, 1, "cuda:1", "cuda:1"),
        (2, 0, 1, "cpu", "cpu"),
    ],
)
def test_every_process_has_a_gpu_of_its_own_or_none_has(
    monkeypatch: pytest.MonkeyPatch, count: int, local: int, processes: int, given: str, expected: str
) -> None:
    gpus(monkeypatch, count, local, processes)
    assert device_of(given) == torch.device(expected)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1, local=1, processes=2)
    with pytest.raises(EvenbitsError, match="GPU 1 for this process, and torch sees 1"):
        device_of("cuda")
    with pytest.raises(EvenbitsError, match="cpu or cuda"):
        device_of("meta")


def test_gpus_talk_through_nccl_and_every_group_has_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda backend, *, timeout, device_id: calls.append((backend, timeout.total_seconds(), device_id)),
    )
    join(torch.device("cpu"), 120.0)
    join(torch.device("cuda", 1), 5.0)
    assert calls == [("gloo", 120.0, None), ("nccl", 5.0, torch.device("cuda", 1))]
    with pytest.raises(EvenbitsError, match="above 0"):
        join(torch.device("cpu"), 0.0)
