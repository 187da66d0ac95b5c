"""The scaling model against real processes: AMDIM's loss among 1 to 4 of them, on the CPU over gloo.

What the model says of W processes comes from one: its time for the same rows against W times the keys, shared among the
cores there are; in a ring one GEMM in three more, for its two rounds; and the bytes at the rate of a plain all-gather.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench import host
from fused_nce import amdim_nce, tile_loss
from fused_nce.core.spec import Block, Spec, TanhClip
from fused_nce.core.tails import Nce
from fused_nce.distributed import Processes

N, N_C, D, ROUNDS = 256, 25, 128, 7
RING_WORK = 4 / 3


def _median_s(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(ROUNDS):
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _loss(group: Processes) -> Callable[[], None]:
    a, c = torch.randn(N, D).requires_grad_(), torch.randn(N, N_C, D).requires_grad_()

    def call() -> None:
        amdim_nce(a, c, group=group).loss.backward()

    call()
    return call


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = {way: _median_s(_loss(Processes(ring=way == "ring"))) for way in ("gather", "ring")}
    x = torch.randn(N * N_C, D)
    everyone = [torch.empty_like(x) for _ in range(world)]
    found["all_gather"] = _median_s(lambda: dist.all_gather(everyone, x))
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure() -> dict[str, Any]:
    """Seconds measured and modelled, by number of processes and way."""
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    block = 4 * N * N_C * D
    rows = []
    for world in (1, 2, 3, 4):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_process, (world, folder), nprocs=world)
            found = json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))
        compute_s = _median_s(_rows_against(world)) * max(1, world / cores)
        others = world - 1
        a_byte_s = found["all_gather"] / (others * block) if others else 0.0
        wire_s = {"gather": 2 * others * block * a_byte_s, "ring": 3 * others * block * a_byte_s}
        for way in ("gather", "ring"):
            again = RING_WORK if way == "ring" and others else 1.0
            modelled = again * compute_s + wire_s[way]
            rows.append({"processes": world, "way": way, "measured_s": found[way], "modelled_s": modelled})
    return {
        "rows": rows,
        "cores": cores,
        "busy_share": host.busy_now(),
        "shape": [N, N_C, D],
        "torch": torch.__version__,
    }


def _rows_against(world: int) -> Callable[[], None]:
    """One process's rows, with the keys of all."""
    q, k = torch.randn(N, D).requires_grad_(), torch.randn(world * N * N_C, D).requires_grad_()
    spec, tail = Spec(Block(N_C), TanhClip(20.0)), Nce(penalty=0.05)

    def call() -> None:
        tile_loss(q, k, spec, tail, scale=D**-0.5).loss.backward()

    call()
    return call


def write(path: Path) -> str:
    """Measure, save, and a table of it."""
    found = measure()
    host.write(path, found)
    lines = [
        f"{r['processes']} {r['way']:6}: measured {1e3 * r['measured_s']:.1f}, modelled {1e3 * r['modelled_s']:.1f} ms"
        for r in found["rows"]
    ]
    return "\n".join([*lines, f"wrote {path}; others used {found['busy_share']:.0%} of the cores"])
