"""Interleaved timing: each round runs every rival once, in an order drawn anew, so that drift hits all alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fused_nce import last_path

from . import rivals
from .cases import Case
from .host import BusyMeter
from .rivals import bound

WARMUPS = 2  # after the one that compiles; the last of them tells how many rounds the budget allows
NOISY_SHARE = 0.05  # of all cores, in use by others: one burst of it moved a median of five rounds by half
ATTEMPTS = 3


def case_times(case: Case, names: list[str], rounds: int, budget_s: float, min_rounds: int = 5) -> dict[str, Any]:
    """Times of the named rivals and of the bound on one case.

    Args:
        case: what to run.
        names: of `rivals.RIVALS`.
        rounds: as many as this, fewer where they would take longer than `budget_s`, never fewer than `min_rounds`.
        budget_s: seconds for the timed rounds.
        min_rounds: the floor.

    Returns:
        The case's record for the JSON: rounds, share of the cores that others used, `rivals` and `bound`, each with
        `time_ms_median`, `time_ms_iqr` and `time_ms_min`.
    """
    a, c = case.inputs()
    steps = {name: rivals.prepare(name, a, c) for name in names}
    rivals.check_agreement(case, steps, a, c)
    if "ours" in steps:
        steps["ours"]()
    path = last_path() if "ours" in steps else None
    gemms = bound.gemms(a, c)
    calls: dict[Any, Callable[[], Any]] = {**steps, **gemms}

    def reset() -> None:
        rivals.clear(a, c)

    with without_gc():
        interleave(calls, WARMUPS - 1, reset)
        begin = time.perf_counter()
        interleave(calls, 1, reset)
        affordable = budget_s / (time.perf_counter() - begin)
        rounds = int(min(rounds, max(min_rounds, affordable)))
        times, busy = quietest(calls, rounds, reset)
    return {
        "rounds": rounds,
        "others_cpu_share": round(busy, 4),
        "ours_backend": path.backend if path else None,
        "rivals": {name: summary(times[name], case) for name in names},
        "bound": bound_summary({key: times[key] for key in gemms}, case),
    }


def quietest(
    calls: Mapping[Any, Callable[[], Any]], rounds: int, reset: Callable[[], None]
) -> tuple[dict[Any, list[float]], float]:
    """Times and the others' share of the cores; all rounds again, up to `ATTEMPTS` times, where others were busy."""
    tried = []
    for _ in range(ATTEMPTS):
        meter = BusyMeter()
        tried.append((interleave(calls, rounds, reset), meter.share()))
        if tried[-1][1] <= NOISY_SHARE:
            break
    return min(tried, key=lambda found: found[1])


def interleave(
    calls: Mapping[Any, Callable[[], Any]], rounds: int, reset: Callable[[], None]
) -> dict[Any, list[float]]:
    """Milliseconds of each call in each round; the order within a round is random, and the same in every run."""
    order, shuffle = list(calls), random.Random(0).shuffle
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        shuffle(order)
        for key in order:
            reset()  # freeing the last gradients belongs to nobody
            begin = time.perf_counter()
            result = calls[key]()
            times[key].append((time.perf_counter() - begin) * 1e3)
            del result
    return times


def summary(times_ms: list[float], case: Case) -> dict[str, float]:
    """Median, spread and rate of one rival."""
    low, median, high = statistics.quantiles(times_ms, n=4, method="inclusive")
    return {
        "time_ms_median": round(median, 4),
        "time_ms_iqr": round(high - low, 4),
        "time_ms_min": round(min(times_ms), 4),
        "useful_gflop_per_s": round(case.flop / median / 1e6, 1),
    }


def bound_summary(times: dict[tuple[str, str], list[float]], case: Case) -> dict[str, Any]:
    """Each GEMM at its faster library; the bound's round is the sum of the winners' times in that round."""
    libraries = {gemm: [library for g, library in times if g == gemm] for gemm in bound.GEMMS}
    winner = {
        gemm: min(found, key=lambda library: statistics.median(times[gemm, library]))
        for gemm, found in libraries.items()
    }
    rounds_ms = [sum(parts) for parts in zip(*(times[gemm, winner[gemm]] for gemm in bound.GEMMS), strict=True)]
    return {
        **summary(rounds_ms, case),
        "gemms": {
            gemm: {
                "winner": winner[gemm],
                "time_ms_median": {name: round(statistics.median(times[gemm, name]), 4) for name in libraries[gemm]},
                "gflop_per_s": {
                    name: round(case.flop / 3 / statistics.median(times[gemm, name]) / 1e6, 1)
                    for name in libraries[gemm]
                },
            }
            for gemm in bound.GEMMS
        },
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
