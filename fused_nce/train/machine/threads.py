"""As many threads as cores are free: `run.threads`.

The threads of a step meet dozens of times. Beside other busy processes all of them wait for the one that shares its
core, and spin meanwhile: on two cores with one busy loop, a step on two threads takes longer than on one.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from fused_nce import measure

log = logging.getLogger("fused_nce")

PERIOD_S = 0.5  # between two looks, at least
BAND = 0.5  # cores, so that a little noise changes nothing
WAIT_S, LONGEST_S = 5.0, 300.0  # of free cores before a thread is added; doubled each time they were soon gone again


class Usage(NamedTuple):
    """CPU time so far, in seconds."""

    at: float  # on the monotonic clock
    busy: float  # of the cores that this process may use
    own: float  # of this process and its children, which read images for it


def usage(proc: Path = Path("/proc")) -> Usage | None:
    """What the system says, or None where it does not: elsewhere than on Linux, or in a sandbox."""
    try:
        busy, _ = measure.core_ticks(proc)
        own, ours_too = 0, [str(os.getpid())]
        for process in ours_too:  # grandchildren too: a fork server's readers
            own += _ticks(proc / process / "stat")
            ours_too += [child for thread in _threads(proc / process) for child in thread.read_text().split()]
    except (OSError, AttributeError, ValueError):
        return None
    return Usage(time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), own / os.sysconf("SC_CLK_TCK"))


def _threads(process: Path) -> list[Path]:
    """The files that name the children of each of its threads; none if it has ended."""
    return [path for path in process.glob("task/*/children") if path.exists()]


def _ticks(path: Path) -> int:
    """Of a process with all its threads and its ended children; 0 if it has ended."""
    try:
        fields = path.read_text().rpartition(")")[2].split()  # its name, in brackets, may hold anything
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(map(int, fields[11:15]))


class Threads:
    """A context manager that sets torch's number of threads, and puts it back.

    Args:
        setting: the number, or "auto": as many as other processes leave cores free, at most what torch has at first
            (OMP_NUM_THREADS, or all cores).
    """

    current: Threads | None = None

    def __init__(self, setting: int | str) -> None:
        self.setting, self.cores = setting, measure.cores()
        self.most = torch.get_num_threads()
        # Under a quota of CPU time the host's other cores are none of this process's.
        limited = self.cores < measure.affinity()
        self.seen = usage() if setting == "auto" and self.most > 1 and not limited else None
        self.patience = 1  # looks that find too few cores before a thread goes; one may have met a burst
        self.scarce = 0  # looks in a row
        self.free_since: float | None = None
        self.wait_s, self.raised = WAIT_S, -LONGEST_S

    def __enter__(self) -> Threads:
        self.outer, Threads.current = Threads.current, self
        if self.setting != "auto":
            torch.set_num_threads(int(self.setting))
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        Threads.current = self.outer
        torch.set_num_threads(self.most)

    def look(self) -> None:
        """Between two steps: see what is free, if the last look is long enough ago."""
        before = self.seen
        if before is None or time.monotonic() - before.at < PERIOD_S:
            return
        self.seen = now = usage()
        if now is None:
            return
        others = max(0.0, now.busy - before.busy - (now.own - before.own)) / (now.at - before.at)  # cores
        have = torch.get_num_threads()
        want = self._wanted(have, min(self.cores - others, self.most), now.at)
        if want != have:
            torch.set_num_threads(want)
            log.warning(
                "threads: %d -> %d: other processes use %.1f of %d cores; the last digits of sums depend on the "
                "number, which run.threads fixes", have, want, others, self.cores,
            )  # fmt: skip

    def _wanted(self, have: int, free: float, now: float) -> int:
        """Fewer at once, more after a while, which grows while it turns out to be in vain."""
        self.scarce = self.scarce + 1 if free < have - BAND else 0
        if free < have + 1 - BAND / 2:
            self.free_since = None
        elif self.free_since is None:
            self.free_since = now
        want = have
        if self.scarce >= self.patience:  # fault: threads-stay
            self.wait_s = min(2 * self.wait_s, LONGEST_S) if now - self.raised < 2 * self.wait_s else WAIT_S
            want = max(1, round(free))
        elif self.free_since is not None and now - self.free_since >= self.wait_s:
            self.raised, want = now, round(free)
        self.patience = 2
        return want


def look() -> None:
    """The innermost `Threads` looks, if there is one."""
    if Threads.current is not None:
        Threads.current.look()
