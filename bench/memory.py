"""Peak memory of one loss with its gradients, as the high-water mark of a process that does nothing else.

    peak = VmHWM − (file-backed + shared pages at the end) − anonymous pages before − gradients

The process is forked from a server that has imported torch and run nothing, warmed up on a tiny shape, and given its
inputs; then the mark is reset and one step runs. Anonymous pages are the memory that somebody allocated, what a library
keeps for its next call included; file-backed ones are program code paged in, which is not the loss's. The inputs are
among the pages "before". A compiled rival is warmed up on its real shape, or the compiler's own memory would count.
"""

from __future__ import annotations

import gc
import multiprocessing
from multiprocessing.connection import Connection

import torch

from bench import rivals
from bench.cases import Case
from fused_nce.measure import reset_peak, status_bytes

TINY = {"n_a": 4, "n_c": 3, "d": 16}
MIB = 2**20


def peak(rival: str, case: Case, threads: int) -> dict[str, float]:
    """One rival's peak on one case, measured in a process of its own.

    Returns:
        `peak_memory_mib` and the parts it was computed from, all in MiB.

    Raises:
        RuntimeError: if the process died, which for the naive loss mostly means that the memory was not there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "fused_nce"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, rival, case, threads))
    process.start()
    sender.close()
    try:
        found: dict[str, float] = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"memory of {rival} on {case.name}: the process ended with {process.exitcode}") from None
    process.join()
    return found


def _child(sender: Connection, rival: str, case: Case, threads: int) -> None:
    torch.set_num_threads(threads)
    _step(rival, Case(**TINY, dtype=case.dtype))
    a, c = case.inputs()
    step = rivals.prepare(rival, a, c)
    if rivals.RIVALS[rival].recompiles:
        step()
        rivals.clear(a, c)
    gc.collect()
    reset_peak()
    before = status_bytes("RssAnon") / MIB
    step()
    high = status_bytes("VmHWM") / MIB
    code = (status_bytes("RssFile") + status_bytes("RssShmem")) / MIB
    sender.send(
        {
            "peak_memory_mib": round(high - code - before - case.inputs_bytes / MIB, 2),
            "high_water_mib": round(high, 2),
            "file_backed_mib": round(code, 2),
            "anonymous_before_mib": round(before, 2),
            "gradients_mib": round(case.inputs_bytes / MIB, 2),
        }
    )


def _step(rival: str, case: Case) -> None:
    rivals.prepare(rival, *case.inputs())()
