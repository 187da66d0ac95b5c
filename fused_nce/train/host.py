"""What a figure was measured with: machine, threads, versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "torchvision", "accelerate", "scikit-learn", "numpy")


def processor() -> str:
    """The CPU's marketing name where the system tells it, else its architecture."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Machine, thread count, instruction set and versions, as one flat table."""
    import fused_nce

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table: dict[str, Any] = {
        "fused_nce": fused_nce.__version__,
        "device": device,
        "processor": processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    for name in LIBRARIES:
        try:
            table[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            table[name] = "not installed"
    return table
