"""What a figure was measured with: machine, threads, commit, versions."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fused_nce._measure import cores, processor

LIBRARIES = ("torch", "torchvision", "accelerate", "scikit-learn", "numpy")


@functools.cache
def commit() -> str:
    """The commit of the code that runs, ", changed" where it is not what was committed; "unknown" if installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # in site-packages; a repository further up would be someone else's
        return "unknown"
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no", "--", "fused_nce"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (", changed" if changed else "")


def environment() -> dict[str, Any]:
    """Machine, thread count, instruction set, commit and versions, as one flat table."""
    import fused_nce

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table: dict[str, Any] = {
        "fused_nce": fused_nce.__version__,
        "commit": commit(),
        "device": device,
        "processor": processor(),
        "cores": cores(),
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
