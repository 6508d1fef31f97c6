"""Real processes for the tests of comms/: each rank is a process with gloo on loopback, and none outlives its deadline.

Children are forked from a server that has imported torch once, so that a test costs tenths of a second per rank.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed.pipelining", "evenbits.comms.stages", "evenbits.comms.ddp", "evenbits.comms.fsdp"]
)

Result = tuple[str, Any]


def _child(
    pipe: Connection, work: Callable[..., Any], rank: int, world: int, store: str, timeout: float, args: tuple[Any, ...]
) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    faulthandler.dump_traceback_later(timeout + 5, file=sys.__stderr__)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    result: Result
    try:
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
        result = ("ok", work(rank, world, *args))
    except BaseException as error:
        lines = traceback.format_exception(error)
        result = (type(error).__name__, f"{error}\n{''.join(lines[-6:])}")
    pipe.send(result)
    pipe.close()
    os._exit(0)  # Whatever still waits in a thread of the process group goes with the process.


def run(
    work: Callable[..., Any],
    world: int,
    *args: Any,
    deadline: float = 60.0,
    link_timeout: float = 10.0,
    tcp: bool = False,
) -> list[Result]:
    """work(rank, world, *args) on `world` processes → per rank ("ok", value), (error's class, text) or ("killed", …).

    deadline: seconds after which every process that is still there is killed and the test fails.
    link_timeout: the process group's own.
    tcp: the store is held by rank 0, as with torchrun, and dies with it; otherwise it is a file.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = f"tcp://127.0.0.1:{_free_port()}" if tcp else f"file://{Path(folder) / 'store'}"
        pipes, processes = [], []
        for rank in range(world):
            mine, theirs = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_child, args=(theirs, work, rank, world, store, link_timeout, args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        try:
            return _collect(pipes, processes, time.monotonic() + deadline)
        finally:
            for process in processes:
                process.kill()
                process.join(10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _collect(pipes: list[Connection], processes: list[Any], until: float) -> list[Result]:
    results: list[Result] = []
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(max(0.0, until - time.monotonic())):
            raise AssertionError(f"rank {rank} did not answer before the deadline; so far: {results}")
        try:
            results.append(pipe.recv())
        except EOFError:
            results.append(("killed", None))
    return results


def values(results: list[Result]) -> list[Any]:
    """The values of a run in which every rank must have succeeded."""
    failed = "\n".join(f"rank {rank}: {kind}: {value}" for rank, (kind, value) in enumerate(results) if kind != "ok")
    assert not failed, failed
    return [value for _, value in results]
