"""What a figure is measured with: the machine's name, the memory of a step, and the loss that ours is compared with."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def cpuinfo(key: str) -> str:
    """The first value that Linux's /proc/cpuinfo has under a key; empty where there is none."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def processor() -> str:
    """The CPU's marketing name where the system tells it, else its architecture."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def status_bytes(key: str) -> int:
    """A line of /proc/self/status, such as VmRSS.

    Raises:
        OSError: the system has no such line.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {key}")


def reset_peak() -> None:
    """Let the high-water mark (VmHWM) start from what the process holds now.

    Raises:
        OSError, AttributeError: the system has no resettable mark (`/proc/self/clear_refs`), or another libc.
    """
    ctypes.CDLL(None).malloc_trim(0)  # freed pages that the allocator keeps would hide what the next step needs
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(run: Callable[[], Any]) -> int:
    """How far the process's resident memory rises above its start while `run` runs.

    Raises:
        OSError, AttributeError: as `reset_peak`.
    """
    reset_peak()
    before = status_bytes("VmRSS")
    run()
    return max(0, status_bytes("VmHWM") - before)


def naive_amdim(
    antecedents: Tensor,  # (B, D), or (B, n_r, D): n_r rows an image
    consequents: Tensor,  # (B, n_c, D)
    clip: float = 20.0,
    penalty: float = 0.04,
) -> Tensor:
    """AMDIM's loss in the order its authors' code computes it, in today's torch: each step on the whole score tensor.

    The one naive loss of the project: reports and benchmarks measure against it.
    """
    images, n_c, width = consequents.shape
    rows = antecedents.reshape(-1, width)
    own = torch.eye(images, dtype=torch.float32, device=rows.device)
    if len(rows) > images:
        own = own.repeat_interleave(len(rows) // images, dim=0)
    own = own[:, :, None].expand(-1, -1, n_c)  # (rows, images, n_c)
    other = 1.0 - own
    raw = torch.mm(rows, consequents.flatten(0, 1).T).float().reshape(len(rows), images, n_c) / width**0.5
    square = penalty * (raw**2).mean()
    score = clip * torch.tanh(raw / clip)
    pos = (own * score).sum(dim=1)  # (rows, n_c)
    neg = (other * score - clip * own).flatten(1)  # (rows, images·n_c), the own image at the clip's floor
    peak = neg.amax(dim=1, keepdim=True)
    mass = (other.flatten(1) * torch.exp(neg - peak)).sum(dim=1, keepdim=True)
    shifted = pos - peak
    log_softmax = shifted - torch.log(torch.exp(shifted) + mass)
    return square - log_softmax.mean()
