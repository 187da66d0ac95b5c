"""Signals while batches are asked for."""

import signal
import time

import pytest

from fused_nce.train import interrupt


def test_a_reader_whose_signal_came_too_early_is_noticed(monkeypatch):
    """Between the last instruction and the wait itself Python only notes a signal: the wait would last to its limit."""
    monkeypatch.setattr(interrupt, "ASK_S", 0.2)
    asked, started = [], time.monotonic()

    def child(number, frame):
        asked.append(number)
        if len(asked) > 1:  # the first is asked as the wait begins
            raise RuntimeError("DataLoader worker is killed")

    before = signal.signal(signal.SIGCHLD, child)
    try:
        with interrupt.Interrupt() as watch:
            with watch.reading():
                pass
            with pytest.raises(RuntimeError, match="killed"), watch.reading():
                time.sleep(30)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert time.monotonic() - started < 20
