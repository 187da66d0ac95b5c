"""Processes that read, which may die or get stuck: either ends the wait for a batch, and none is left behind."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from fused_nce.train.machine.interrupt import ENDING, PREEMPTION

T = TypeVar("T")
LIMIT_S = 300  # a stuck reader is an error, not a wait for ever
LOOK_S = 1  # a wait for a batch; only at its end does torch look whether the readers live
RAN_OUT = "DataLoader timed out"  # what it then says if they do


class Readers(Generic[T]):
    """Batches of a dataset, an iterator. Without processes of its own this one reads.

    torch hears of a death by SIGCHLD too, but its handler may strike between two instructions of an update or a save,
    and another's may stand in its place. So a wait is short, and begins anew until the limit is over.

    Args:
        dataset: is given one key after the other.
        keys: of each batch.
        workers: processes, which start with the first batch.
        seed: of theirs, drawn from a generator of its own: a resumed run starts them once more.
        then: makes of what was read what is given out.

    Raises:
        RuntimeError: of `next`: a process died, or no batch came within `LIMIT_S`; it begins with "DataLoader".
        ValueError: of `next`: what the dataset raised, in one line.
    """

    def __init__(
        self, dataset: Dataset[Any], keys: Iterable[list[Any]], workers: int, seed: int, then: Callable[[Any], T]
    ) -> None:
        self._loader: DataLoader[Any] | None = DataLoader(
            dataset,
            batch_sampler=keys,
            num_workers=workers,
            timeout=LOOK_S if workers else 0,  # fault: reader-death-missed
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator().manual_seed(seed),
        )
        self._then = then
        self._batches: Iterator[Any] | None = None
        self._processes: set[multiprocessing.process.BaseProcess] = set()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._batches is None and self._loader is not None:
            others = set(multiprocessing.active_children())
            try:
                self._batches = iter(self._loader)
            finally:  # some may have started
                self._processes = set(multiprocessing.active_children()) - others
        return self._then(self._read())

    def _read(self) -> Any:
        until = time.monotonic() + LIMIT_S
        while self._batches is not None:
            try:
                return next(self._batches)
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # they hold torch's iterator, which `close` lets go
                said = str(error)
                if isinstance(error, ValueError):  # a process's has its traceback for a message
                    raise ValueError(said.strip().rpartition("\n")[2].removeprefix("ValueError: ")) from error
                if said.startswith("DataLoader worker"):
                    raise RuntimeError(": ".join([said, *self._ends()])) from error
                if not said.startswith(RAN_OUT):  # fault: slow-reader-refused
                    raise
                if time.monotonic() > until:
                    raise RuntimeError(f"DataLoader: no batch within {LIMIT_S} s") from error
        raise StopIteration

    def _ends(self) -> list[str]:
        codes = {process.exitcode for process in self._processes}
        names = {-number: number.name for number in signal.Signals}
        return [names.get(code, f"exit status {code}") for code in codes if code]

    def close(self) -> None:
        """All processes end; one that cannot is killed. There are no more batches."""
        self._loader = self._batches = None  # torch asks them, waits, and sends a SIGTERM, which they ignore
        for process in self._processes:
            process.kill()  # fault: stuck-reader-stays


def _ignore_interrupts(worker: int) -> None:
    """A signal may reach every process of the terminal or job: the readers must live until the loop has saved."""
    for number in (*ENDING, *PREEMPTION):
        signal.signal(number, signal.SIG_IGN)
