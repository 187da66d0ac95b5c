"""Signals while a run trains: which end it, and when they may."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from fused_nce.train.machine.slurm import PREEMPTION

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_S = 1.0  # two signals within it are one: Ctrl-C reaches a process from its terminal and from torchrun


class Interrupt:
    """The first signal of `ENDING` asks the loop to finish its step and save; a second ends the process.

    A context manager; `requested` turns true at the first signal. In a SLURM job those of `slurm.PREEMPTION` ask too;
    `preempted` is the one that came. Within `held`, which a save is, a second one changes nothing. A SIGHUP that is
    ignored already (nohup) stays so. Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self.preempted: int | None = None
        self._at, self._held, self._active = 0.0, False, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._active = True
            in_job = "SLURM_JOB_ID" in os.environ and os.environ.get("FUSED_NCE_SLURM") != "0"
            for number in (*ENDING, *PREEMPTION) if in_job else ENDING:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: set in C, it could not be set back
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._active = {}, False

    @contextmanager
    def held(self) -> Iterator[None]:
        """While something is saved."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While batches are asked for: torch, which starts the readers then, sets a handler of SIGCHLD that raises.

        It is put aside, or a reader's death would break off an update or a save; `data.readers` looks for it.
        """
        try:
            yield
        finally:
            handler = signal.getsignal(signal.SIGCHLD)
            if self._active and handler not in (signal.SIG_DFL, None):  # None: set in C
                self._before[signal.SIGCHLD] = handler
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # fault: reader-death-strikes

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and not self._held and now - self._at > SAME_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.requested:
            self.requested, self._at = True, now
            self.preempted = number if number in PREEMPTION else None
