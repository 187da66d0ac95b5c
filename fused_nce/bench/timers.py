"""Clocks, each of which runs a call once and says how many milliseconds it took, and interleaved rounds of them."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Call = Callable[[], Any]
Timer = Callable[[Call], float]


def wall_ms(call: Call) -> float:
    """Until the call returns. What it returned is freed off the clock."""
    begin = time.perf_counter()
    result = call()
    elapsed = 1e3 * (time.perf_counter() - begin)
    del result
    return elapsed


def synchronized_wall_ms(call: Call) -> float:
    """Until the GPU has finished: what a training step waits for, launches included."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    elapsed = 1e3 * (time.perf_counter() - begin)
    del result
    return elapsed


class DeviceTimer:
    """Time between two CUDA events, with the whole call queued behind a spinning kernel.

    Without the spin, a call of many short kernels would be timed by the speed at which Python launches them. The spin
    lasts a little longer than the host took to launch the call before; where the host was slower this time, the sample
    is taken again. A call that waits for the GPU itself never gets ahead of it, and one of more launches than the
    driver queues waits until there is room: after `ATTEMPTS` its gaps count, and it is not asked again.
    """

    MARGIN_MS = 0.05
    LONGEST_SPIN_MS = 30.0
    QUEUE_MS = 6.0  # in which a host fills the queue, of about 1,024 launches
    ATTEMPTS = 4

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._host_ms: dict[int, float] = {}
        self._behind: dict[int, Call] = {}
        self._cycles_per_ms = self._calibrate()

    def __call__(self, call: Call) -> float:
        """Milliseconds of device time."""
        behind = id(call) in self._behind
        for _ in range(1 if behind else self.ATTEMPTS):
            longest = self.QUEUE_MS if behind else self.LONGEST_SPIN_MS
            spin_ms = min(longest, 1.5 * self._host_ms.get(id(call), 0.0) + self.MARGIN_MS)
            torch.cuda.synchronize()
            torch.cuda._sleep(int(spin_ms * self._cycles_per_ms))
            begin = time.perf_counter()
            self._begin.record()
            result = call()
            self._end.record()
            self._host_ms[id(call)] = host_ms = 1e3 * (time.perf_counter() - begin)
            self._end.synchronize()
            elapsed = float(self._begin.elapsed_time(self._end))
            del result
            if host_ms <= spin_ms:
                self._behind.pop(id(call), None)
                break
        else:
            self._behind[id(call)] = call
        return elapsed

    def _calibrate(self) -> float:
        """Cycles that a spin of one millisecond takes, at the clock of a GPU that is awake."""
        cycles = 20_000_000
        for _ in range(3):  # the first ones load the module and raise the clock
            self._begin.record()
            torch.cuda._sleep(cycles)
            self._end.record()
            self._end.synchronize()
        return cycles / float(self._begin.elapsed_time(self._end))


def interleave(calls: Mapping[Any, Callable[[], Any]], rounds: int, timer: Timer = wall_ms) -> dict[Any, list[float]]:
    """Milliseconds of each call in each round; the order within a round is random, and the same in every run."""
    order, shuffle = list(calls), random.Random(0).shuffle
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        shuffle(order)
        for key in order:
            times[key].append(timer(calls[key]))
    return times


def spread(times_ms: list[float], clock: str = "time") -> dict[str, float]:
    """Median, interquartile range and minimum, the clock's name in the keys."""
    low, median, high = statistics.quantiles(times_ms, n=4, method="inclusive")
    return {
        f"{clock}_ms_median": round(median, 4),
        f"{clock}_ms_iqr": round(high - low, 4),
        f"{clock}_ms_min": round(min(times_ms), 4),
    }


@contextmanager
def without_gc() -> Iterator[None]:
    """No garbage collection inside: its pauses would fall on whoever is being timed."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
