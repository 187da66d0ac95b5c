"""Functions run in real processes that talk over gloo, and what they return.

They are forked from a server that has imported torch and the package, and has done nothing else: an import of their own
would cost each a second or two.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(rank: int, size: int, folder: str, task: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.save(task(rank, *args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    # The interpreter's own end would race with gloo's threads, and abort now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(folder: Path, size: int, task: Callable[..., Any], *args: Any) -> list[Any]:
    """`task(rank, *args)` of each of `size` processes; what they return, by rank.

    Args:
        folder: an empty one.
        size: processes.
        task: a module's function.
        args: picklable.
    """
    mp.get_context("forkserver").set_forkserver_preload(["fused_nce.distributed", "tests.cases"])
    mp.start_processes(_enter, (size, str(folder), task, args), nprocs=size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
