"""Signals while a run trains: which end it, and when they may."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from fused_nce.train.slurm import PREEMPTION

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ASK_S = 5.0  # between two looks for readers that died, while one waits for them
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
        self._child: Callable[[int, FrameType | None], Any] | None = None

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
        if self._child is not None and kind is None:  # else it would strike while the error is on its way
            signal.signal(signal.SIGCHLD, self._child)
        self._before, self._active, self._child = {}, False, None

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
        """While batches are asked for: here alone a reader's death is an error, which torch raises from a signal.

        Anywhere else it would strike between two instructions of an update or a save.
        """
        done = threading.Event()
        if self._child is not None:
            signal.signal(signal.SIGCHLD, self._child)
            self._child(signal.SIGCHLD, None)  # for those who died meanwhile
            threading.Thread(target=_ask_again, args=(done,), daemon=True).start()
        try:
            yield
        finally:
            done.set()
            handler = signal.getsignal(signal.SIGCHLD)
            if self._active and callable(handler):
                self._child = handler
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and not self._held and now - self._at > SAME_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.requested:
            self.requested, self._at = True, now
            self.preempted = number if number in PREEMPTION else None


def _ask_again(done: threading.Event) -> None:
    """A signal that comes just before a wait begins does not end it: after a while, and again, one that comes later."""
    while not done.wait(ASK_S):  # fault: reader-death-missed
        os.kill(os.getpid(), signal.SIGCHLD)
