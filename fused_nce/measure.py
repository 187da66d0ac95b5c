"""What measurements share: the machine and versions of a figure, the peak memory of a call, AMDIM's naive loss."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_nce._version import __version__

CLIP, PENALTY = 20.0, 0.04  # of AMDIM's loss
LIBRARIES = ("torch", "torchvision", "accelerate", "scikit-learn", "numpy")
LOADED = time.time()


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


def able() -> set[int]:
    """The numbers of the cores that the system may run this process on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def affinity() -> int:
    """How many those are."""
    return len(able())


def cores(quota: Path = Path("/sys/fs/cgroup/cpu.max"), among: int | None = None) -> int:
    """The cores that this process may use: those that it may run on, or fewer where a container limits its time.

    Args:
        quota: where the system has the limit.
        among: those that several processes may run on, instead of its own.
    """
    among = affinity() if among is None else among
    try:
        most, period = quota.read_text(encoding="ascii").split()
        return max(1, min(among, int(most) // int(period)))
    except (OSError, ValueError):  # no control group, or "max"
        return among


def core_ticks(proc: Path = Path("/proc")) -> tuple[int, int]:
    """Busy and idle clock ticks so far of the cores that the system may run this process on; stolen ones are busy.

    Raises:
        OSError, AttributeError, ValueError: the system does not tell.
    """
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = (proc / "stat").read_text().splitlines()
    rows = [[int(ticks) for ticks in fields[1:9]] for line in lines if (fields := line.split()) and fields[0] in ours]
    # user, nice, system, (idle, waiting for disks,) interrupts, soft interrupts, stolen by other virtual machines
    return sum(sum(row[:3]) + sum(row[5:]) for row in rows), sum(sum(row[3:5]) for row in rows)


def started() -> float:
    """When this process started, in seconds since 1970; where the system does not say, when this module was loaded."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine's start
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return LOADED


@functools.cache
def commit() -> str:
    """The commit of the code that runs, ", changed" where it is not what was committed; "unknown" if installed."""
    root = Path(__file__).resolve().parents[1]
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
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table: dict[str, Any] = {
        "fused_nce": __version__,
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


def status_bytes(key: str) -> int:
    """A line of /proc/self/status, such as VmRSS."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(key + ":"))


def reset_peak() -> None:
    """Let the high-water mark (VmHWM) start from what the process holds now.

    Raises:
        OSError, AttributeError: no resettable mark (`/proc/self/clear_refs`, Linux), or another libc than glibc.
    """
    ctypes.CDLL(None).malloc_trim(0)  # freed blocks that malloc keeps would serve the next run unseen
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")


def peak_bytes(run: Callable[[], Any]) -> int:
    """How far the process's resident memory rises above its start while `run` runs.

    Raises:
        OSError, AttributeError: as `reset_peak`.
    """
    reset_peak()
    before = status_bytes("VmRSS")
    run()
    return max(0, status_bytes("VmHWM") - before)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """That many threads for torch meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def naive_loss(
    antecedents: Tensor,  # (B, D), or (B, n_r, D): n_r rows an image
    consequents: Tensor,  # (B, n_c, D)
    clip: float = CLIP,
    penalty: float = PENALTY,
) -> Tensor:
    """AMDIM's loss in the order its authors' code computes it, in today's torch: each step on the whole score tensor.

    The one naive loss of the project: reports and benchmarks measure against it.
    """
    images, n_c, width = consequents.shape
    rows = antecedents.reshape(-1, width)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    own = torch.eye(images, dtype=dtype, device=rows.device)
    if len(rows) > images:
        own = own.repeat_interleave(len(rows) // images, dim=0)
    own = own[:, :, None].expand(-1, -1, n_c)  # (rows, images, n_c)
    other = 1.0 - own
    raw = torch.mm(rows, consequents.flatten(0, 1).T).to(dtype).reshape(len(rows), images, n_c) / width**0.5
    square = penalty * (raw**2).mean()
    score = clip * torch.tanh(raw / clip)
    pos = (own * score).sum(dim=1)  # (rows, n_c)
    neg = (other * score - clip * own).flatten(1)  # (rows, images·n_c), the own image at the clip's floor
    peak = neg.amax(dim=1, keepdim=True)
    mass = (other.flatten(1) * torch.exp(neg - peak)).sum(dim=1, keepdim=True)
    shifted = pos - peak
    log_softmax = shifted - torch.log(torch.exp(shifted) + mass)
    return square - log_softmax.mean()
