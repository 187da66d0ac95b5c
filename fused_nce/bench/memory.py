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
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Protocol

import torch

from fused_nce.measure import reset_peak, status_bytes

MIB = 2**20


class Subject(Protocol):
    """What is measured: a step on its real inputs, and what must have run before. Picklable."""

    @property
    def name(self) -> str:
        """For the error's text."""

    @property
    def gradients_bytes(self) -> int:
        """That a step leaves behind."""

    def prepare(self) -> Callable[[], object]:
        """A step on its real inputs, made here; whatever must be compiled has been."""

    def warm_up(self) -> None:
        """Run something tiny of the same kind."""


def peak(subject: Subject, threads: int, preload: Sequence[str] = ()) -> dict[str, float]:
    """The peak of one step, measured in a process of its own.

    Args:
        subject: what is measured.
        threads: of torch.
        preload: modules that take long to import, in the server that all such processes are forked from.

    Returns:
        `peak_memory_mib` and the parts it was computed from, all in MiB.

    Raises:
        RuntimeError: if the process died, which for an eager loss mostly means that the memory was not there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "fused_nce", *preload])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, subject, threads))
    process.start()
    sender.close()
    try:
        found: dict[str, float] = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"memory of {subject.name}: the process ended with {process.exitcode}") from None
    process.join()
    return found


def _child(sender: Connection, subject: Subject, threads: int) -> None:
    torch.set_num_threads(threads)
    subject.warm_up()
    step = subject.prepare()
    gc.collect()
    reset_peak()
    before = status_bytes("RssAnon") / MIB
    kept = step()  # the gradients, so that they are still there
    high = status_bytes("VmHWM") / MIB
    code = (status_bytes("RssFile") + status_bytes("RssShmem")) / MIB
    gradients = subject.gradients_bytes / MIB
    del kept
    sender.send(
        {
            "peak_memory_mib": round(high - code - before - gradients, 2),
            "high_water_mib": round(high, 2),
            "file_backed_mib": round(code, 2),
            "anonymous_before_mib": round(before, 2),
            "gradients_mib": round(gradients, 2),
        }
    )
