"""Interleaved timing: each round runs every rival once, in an order drawn anew, so that drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from bench import rivals
from bench.cases import Case
from bench.host import BusyMeter
from bench.rivals import bound
from fused_nce import last_path
from fused_nce.bench.timers import interleave, spread, without_gc

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
    steps = {name: rivals.prepare(name, case) for name in names}
    rivals.check_agreement(case, steps)
    if "ours" in steps:
        steps["ours"]()
    path = last_path() if "ours" in steps else None
    gemms = bound.gemms(*case.inputs())
    calls: dict[Any, Callable[[], Any]] = {**steps, **gemms}

    with without_gc():
        interleave(calls, WARMUPS - 1)
        begin = time.perf_counter()
        interleave(calls, 1)
        affordable = budget_s / (time.perf_counter() - begin)
        rounds = int(min(rounds, max(min_rounds, affordable)))
        times, busy = quietest(calls, rounds)
    return {
        "rounds": rounds,
        "others_cpu_share": round(busy, 4),
        "ours_backend": path.backend if path else None,
        "rivals": {name: summary(times[name], case.flop) for name in names},
        "bound": bound_summary({key: times[key] for key in gemms}, case.flop),
    }


def quietest(
    calls: Mapping[Any, Callable[[], Any]], rounds: int, attempts: int = ATTEMPTS
) -> tuple[dict[Any, list[float]], float]:
    """Times and the others' share of the cores; all rounds again, up to so many times, where others were busy."""
    tried = []
    for _ in range(attempts):
        meter = BusyMeter()
        tried.append((interleave(calls, rounds), meter.share()))
        if tried[-1][1] <= NOISY_SHARE:
            break
    return min(tried, key=lambda found: found[1])


def summary(times_ms: list[float], flop: int, clock: str = "time") -> dict[str, float]:
    """Spread, and the rate at the median, of something that takes this many FLOP."""
    rate = flop / statistics.median(times_ms) / 1e6
    return spread(times_ms, clock) | {"useful_gflop_per_s": round(rate, 1)}


def bound_summary(times: dict[tuple[str, str], list[float]], flop: int, clock: str = "time") -> dict[str, Any]:
    """Each GEMM at its faster library; the bound's round is the sum of the winners' times in that round.

    Args:
        times: (GEMM, library) → milliseconds of each round.
        flop: of all GEMMs together, which are of one size.
        clock: the name for the keys.
    """
    gemms: dict[str, dict[str, float]] = {}
    for gemm, library in times:
        gemms.setdefault(gemm, {})[library] = statistics.median(times[gemm, library])
    winner = {gemm: min(found, key=lambda library: found[library]) for gemm, found in gemms.items()}
    rounds_ms = [sum(parts) for parts in zip(*(times[gemm, winner[gemm]] for gemm in gemms), strict=True)]
    return {
        **summary(rounds_ms, flop, clock),
        "gemms": {
            gemm: {
                "winner": winner[gemm],
                f"{clock}_ms_median": {library: round(ms, 4) for library, ms in found.items()},
                "gflop_per_s": {library: round(flop / len(gemms) / ms / 1e6, 1) for library, ms in found.items()},
            }
            for gemm, found in gemms.items()
        },
    }
