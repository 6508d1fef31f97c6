"""Where a run takes place: the device of this process, its process group, and the folder of the data."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from evenbits.errors import EvenbitsError

DATA = "EVENBITS_TEST_DATA"


def data_folder(given: Path | None) -> Path:
    """The folder that was given, else that of the environment variable EVENBITS_TEST_DATA, else ./data.

    Raises EvenbitsError if there is none.
    """
    named = os.environ.get(DATA)
    folder = given or Path(named or "data")
    if folder.is_dir():
        return folder
    where = f"--data {given}" if given else f"{DATA}={named}" if named else f"{DATA} is not set, and ./data"
    raise EvenbitsError(
        f"no folder of data and weights: {where} is no folder. Name it with --data DIR, with the environment variable "
        f"{DATA}, or put it at ./data; nothing is downloaded. docs/training.md says what lies in it."
    )


def device_of(given: str) -> torch.device:
    """ "auto": a GPU of its own for every process of this machine, if there are as many, else the CPU; "cpu"; "cuda",
    which is GPU number LOCAL_RANK; or a device such as "cuda:1". Raises EvenbitsError for others, and for a GPU that
    is not there.
    """
    local, many = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if given == "auto":
        given = "cuda" if gpus >= many else "cpu"
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise EvenbitsError(f"unknown device {given!r}; allowed: auto, cpu, cuda, cuda:0 …") from error
    if device.type not in ("cpu", "cuda"):
        raise EvenbitsError(f"training runs on cpu or cuda; given --device {given}.")
    if device.type == "cpu":
        return device
    number = local if device.index is None else device.index
    if number >= gpus:
        raise EvenbitsError(
            f"--device {given} is GPU {number} for this process, and torch sees {gpus}; use fewer processes per "
            "machine, or --device cpu."
        )
    return torch.device("cuda", number)


def join(device: torch.device, timeout: float) -> None:
    """The process group of torchrun's environment: gloo for processes on CPUs, NCCL for GPUs. A link that stalls is an
    error after `timeout` seconds. Raises EvenbitsError if the group does not come together.
    """
    if timeout <= 0:
        raise EvenbitsError(f"--timeout is a number of seconds above 0; given {timeout:g}.")
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout), device_id=device if gpu else None
        )
    except (dist.DistError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EvenbitsError(f"the processes did not come together within {timeout:g} s: {first}") from error
