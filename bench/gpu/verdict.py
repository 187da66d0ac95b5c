"""The targets against one GPU record, cell by cell, and the times that the rule of the choice is fitted to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from bench.gpu import problems
from bench.gpu.problems import Problem
from bench.gpu.rivals import NAIVE, THEIRS
from bench.verdict import Cell, at_least, at_most
from fused_nce.core import cost
from fused_nce.core.cost import Measured

Record = dict[str, Any]
Row = dict[str, Any]
PROBLEMS: dict[str, Problem] = {p.label: p for p in problems.ALL}


def time_ms(row: Row, rival: str, clock: str) -> float | None:
    """A rival's median on a clock, or the bound's; None where it was not measured."""
    found = row["bound"] if rival == "bound" else row["rivals"].get(rival)
    return None if found is None else found.get(f"{clock}_ms_median")


def floor_ms(record: Record, row: Row) -> float:
    """The least GEMMs at the rate of the card's best GEMM: no kernel is faster."""
    return float(row["flop"] / record["card"]["gemm_tflop_per_s"] / 1e9)


def problem_of(row: Row) -> Problem | None:
    """What a row measured, a tiny one's full size; None for a record of other problems than these."""
    return PROBLEMS.get(row["label"].removeprefix(problems.TINY))


def cells(record: Record, row: Row) -> list[Cell]:
    """Each target of a row that has any; what could not be measured is a miss that says so."""
    clock, problem = record["clock"], problem_of(row)
    ours = time_ms(row, "ours", clock)
    if problem is None or (problem.target is None and problem != problems.BOUNDED):
        return []
    target = problem.target
    if ours is None:
        asked = "a time" if target is None else f"≤ {target.device_ms:g} ms"
        return [Cell("time", math.nan, asked, False, row["refused"].get("ours", "not run"))]
    if target is None:  # the same shape in less memory: at most so much slower
        whole = [time_ms(r, "ours", clock) for r in record["cases"] if problem_of(r) == problems.GLOBAL]
        ratio = ours / whole[0] if whole and whole[0] is not None else None
        return [_most("slower than unbounded", ratio, problems.BOUNDED_SLOWDOWN, "smaller buffers, more passes")]
    bound = time_ms(row, "bound", clock)
    why = f"{ours / floor_ms(record, row):.2f}× the least GEMMs at the card's best rate"
    why += "" if bound is None else f", {ours / bound:.2f}× them at these shapes"
    found = [_most("time, ms", ours, target.device_ms, why)]
    if target.graph_ms is not None:
        graph = time_ms(row, "ours", "graph")
        why = "the kernels, and the gaps between them"
        why = why if graph is not None else row["rivals"]["ours"].get("graph_refused", "no graph here")
        found.append(_most("in a graph, ms", graph, target.graph_ms, why))
    for rival, least in zip(NAIVE, (target.naive_over_ours, target.compile_over_ours), strict=True):
        found.append(_ratio(row, rival, ours, least, clock))
    peak = row["rivals"]["ours"]["peak_memory_mb"]
    scores = f"the bf16 scores alone are {2 * row['steps'] * row['n'] * row['m'] / 1e6:.1f} MB"
    return [*found, _most("extra MB", peak, target.peak_mb, "not measured" if peak is None else scores)]


def _most(name: str, value: float | None, limit: float, why: str) -> Cell:
    return at_most(name, math.nan if value is None else value, limit, why)


def _ratio(row: Row, rival: str, ours_ms: float, least: float, clock: str) -> Cell:
    theirs, bound = time_ms(row, rival, clock), time_ms(row, "bound", clock)
    name = f"{rival} / ours"
    if theirs is None:
        reason = row["refused"].get(rival, "not run")
        # A rival that this card has no memory for is beaten; anything else that kept it from running is no pass.
        return Cell(name, math.nan, f"≥ {least:g}", reason == "out of memory", f"{rival}: {reason}")
    why = "" if bound is None else f"{rival} runs at {theirs / bound:.2f}× the bound"
    return at_least(name, theirs / ours_ms, least, why)


def backends_ms(row: Row, clock: str) -> dict[str, float]:
    """Our backends' times on a row; the automatic choice under the name of the backend that it took."""
    ours = {name: times for name, times in row["rivals"].items() if name not in THEIRS}
    return {
        row["ours_backend"] if name == "ours" else name: times[f"{clock}_ms_median"] for name, times in ours.items()
    }


def best_other(row: Row, clock: str) -> tuple[str, float] | None:
    """The fastest library, or compiler's option, that computes this loss too, and its time."""
    times = {name: time_ms(row, name, clock) for name in THEIRS if name not in NAIVE and name in row["rivals"]}
    known = {name: ms for name, ms in times.items() if ms is not None}
    return min(known.items(), key=lambda found: found[1]) if known else None


def cost_times(rows: Iterable[Row], clock: str) -> list[Measured]:
    """Times of both backends: what the rule of the choice is fitted to."""
    return [
        Measured(name, 2, problem.call(), row["n"], row["m"], row["d"], round(1e3 * ms, 2))
        for row in rows
        if (problem := problem_of(row)) is not None and problem.fits_cost
        for name, ms in backends_ms(row, clock).items()
        if (name, 2) in cost.table()
    ]
