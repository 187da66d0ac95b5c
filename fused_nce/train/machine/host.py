"""The process on its machine: precision, memory, and the progress bar of its terminal."""

import ctypes
import logging
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

log = logging.getLogger("fused_nce")

# glibc's malloc.h. Larger blocks are mapped one by one; 32 MB is the most that glibc accepts.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES = -1, -3, 32 << 20
LOG_INTERVAL_S = 30.0  # between the lines of a progress bar in a log file
# What a launcher's environment may ask of accelerate: how a step is made, which the settings say, and other trainers.
STEERING = ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_")
OTHERS = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to train in bf16: asked for, or "auto" on hardware that multiplies it natively.

    On a CPU with AVX512-BF16 and AMX a step of a small encoder takes less than half the time of fp32.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The dtype that this machine's CPU autocasts to, as in training; None for the weights' own."""
    return torch.bfloat16 if use_bf16(precision, torch.device("cpu")) else None


def keep_memory() -> None:
    """Ask glibc to keep what a step frees for the next step, instead of giving it back to the system.

    Without it a step of 128 images (ndf 64, bf16) took 37,000 page faults, with it 220, and 428 ms instead of 482.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another libc
        return
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)


def peak_memory_mb(device: torch.device) -> float:
    """High-water mark: of the CUDA allocator, or of the resident process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / 2**20


@contextmanager
def own_settings() -> Iterator[None]:
    """Around the making of an `Accelerator`: the environment has no say in what the settings decide.

    Raises:
        ValueError: the environment asks for another trainer than this one.
    """
    for name in (f"ACCELERATE_USE_{other}" for other in OTHERS):
        if os.environ.get(name, "false").lower() in ("1", "true", "yes", "on"):
            raise ValueError(f"{name}: must be unset for this trainer, which uses DDP alone, got {os.environ[name]}")
    held = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(STEERING)}
    for name, value in held.items():
        if value.lower() not in ("", "1", "no", "default", "false"):  # `accelerate launch` sets all of them
            log.warning("%s=%s is not followed: the run's own settings decide", name, value)
    try:
        yield
    finally:
        os.environ |= held


def free_space(folder: Path) -> str:
    """Of the disk that a folder is on, or would be, in words."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        return f"{shutil.disk_usage(there).free >> 20} MB free"
    except OSError:
        return "free space unknown"


class Quiet:
    """A terminal that may be gone: what cannot be written to it is dropped, since a run goes on without."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        """Or not."""
        with suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        """Or not."""
        with suppress(OSError):
            self.stream.flush()


def progress_bar(*args: Any, **options: Any) -> Any:
    """`tqdm.tqdm(*args, **options)`: lively on a terminal; in a log a line every half minute, none for less."""
    if not sys.stderr.isatty():
        options |= {"mininterval": LOG_INTERVAL_S, "maxinterval": LOG_INTERVAL_S, "delay": LOG_INTERVAL_S}
    return tqdm(*args, file=Quiet(sys.stderr), **options)
