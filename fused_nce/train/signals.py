"""Ctrl-C and SIGTERM: the first asks the loop to finish its step and save, the second ends the process at once."""

import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Context manager; `requested` turns true at the first signal.

    The usual handlers come back with it, so that a second signal is not caught. Outside the main thread, where Python
    allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._on_signal)
            except ValueError:
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
