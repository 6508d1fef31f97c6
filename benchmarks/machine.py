"""What a measurement must say about where it was made."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import evenbits


def fingerprint() -> dict[str, object]:
    """Processor, cores, threads and versions, as plain data."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = lines[0] if lines else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "vnni": torch.cpu._is_vnni_supported(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "evenbits": evenbits.__version__,
    }
