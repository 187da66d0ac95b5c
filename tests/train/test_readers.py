"""Readers that die, are slow or get stuck, whatever becomes of their signals."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from torch.utils.data import Dataset, _utils

from fused_nce.train.data import readers
from fused_nce.train.machine.interrupt import Interrupt


class Numbers(Dataset):
    """Gives key after key, but `act`s at the fourth, as soon as it is asked for."""

    def __init__(self, act, asked):
        self.act, self.asked = act, asked

    def __getitem__(self, key):
        if key == 3:
            self.asked.wait()  # until then this process lives, from which the batches before it are taken over
            self.act()
        return torch.tensor(key)


def started(act, then=torch.flatten):
    """Readers of 0, 1, 2 … whose first three numbers are read, without a handler of SIGCHLD."""
    asked = multiprocessing.get_context("fork").Event()
    numbers = readers.Readers(Numbers(act, asked), [[i] for i in range(8)], 1, 0, then)
    assert [next(numbers).item() for _ in range(3)] == [0, 1, 2]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    threading.Timer(0.5, asked.set).start()  # the wait has begun
    return numbers


@pytest.fixture
def quick(monkeypatch):
    """A limit that a test can wait for, and torch's patience with its processes; SIGCHLD stays as it was."""
    monkeypatch.setattr(readers, "LIMIT_S", 20)
    monkeypatch.setattr(readers, "LOOK_S", 0.5)
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSEGV, 7])
def test_a_death_that_no_signal_tells_is_noticed(quick, end):
    act = (lambda: os.kill(os.getpid(), end)) if isinstance(end, signal.Signals) else (lambda: os._exit(end))
    numbers, begin = started(act), time.monotonic()
    said = end.name if isinstance(end, signal.Signals) else f"exit status {end}"
    with pytest.raises(RuntimeError, match=rf"^DataLoader worker \(pid\(s\) \d+\) exited unexpectedly: {said}$"):
        next(numbers)
    assert time.monotonic() - begin < 10
    numbers.close()
    assert list(numbers) == []


def test_a_slow_reader_is_waited_for(quick):
    numbers = started(lambda: time.sleep(2))
    assert torch.cat(list(numbers)).tolist() == [3, 4, 5, 6, 7]


def test_a_stuck_reader_is_refused_and_leaves_no_process(quick, monkeypatch):
    numbers, others = started(lambda: time.sleep(600)), set(multiprocessing.active_children())
    monkeypatch.setattr(readers, "LIMIT_S", 2)
    with pytest.raises(RuntimeError, match=r"^DataLoader: no batch within 2 s$") as kept:
        next(numbers)
    numbers.close()
    for child in others:
        child.join(10)  # of a SIGTERM it would know nothing
        alive = child.is_alive()
        child.kill()  # or it would keep the tests from ending
        assert not alive
    assert kept.value is not None  # an error that somebody keeps, keeps no reader


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_what_a_reader_raises_is_not_taken_for_its_death(quick, error):
    def act():
        raise error("DataLoader timed out")

    numbers = started(act)
    said = "^DataLoader timed out$" if error is ValueError else "^Caught RuntimeError in DataLoader worker process 0"
    with pytest.raises(error, match=said):
        next(numbers)
    assert [x.item() for x in numbers] == [4, 5, 6, 7]


def test_a_handler_of_deaths_stands_aside_until_the_run_has_ended(quick):
    def strike(number, frame):
        raise RuntimeError("in the middle of an update")

    def run():
        with Interrupt() as watch:
            with watch.reading():
                pass
            os.kill(os.getpid(), signal.SIGCHLD)
            raise OSError("of the run")

    signal.signal(signal.SIGCHLD, strike)
    with pytest.raises(OSError, match="of the run"):
        run()
    assert signal.getsignal(signal.SIGCHLD) is strike
