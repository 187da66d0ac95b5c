"""The targets against one GPU record, cell by cell, and the times that the cost model is fitted to."""

from __future__ import annotations

from typing import Any

from bench.gpu import problems
from bench.gpu.problems import Target
from bench.verdict import Cell
from fused_nce.core import cost

Record = dict[str, Any]
Row = dict[str, Any]
TARGETS: dict[str, Target] = {p.label: p.target for p in problems.TABLE if p.target is not None}


def time_ms(row: Row, rival: str, clock: str) -> float | None:
    """A rival's median on a clock, or the bound's; None where it was not measured."""
    found = row["bound"] if rival == "bound" else row["rivals"].get(rival)
    return None if found is None else found.get(f"{clock}_ms_median")


def floor_ms(record: Record, row: Row) -> float:
    """The least GEMMs at the rate of the card's best GEMM: no kernel is faster."""
    return float(row["flop"] / record["card"]["gemm_tflop_per_s"] / 1e9)


def cells(record: Record, row: Row) -> list[Cell]:
    """Each target of a row that has any; what could not be measured is a miss that says so."""
    clock = record["clock"]
    label = row["label"].removeprefix(problems.TINY)
    if label == problems.BOUNDED.label:
        return [_bounded(record, row, clock)]
    target = TARGETS.get(label)
    if target is None:
        return []
    ours = time_ms(row, "ours", clock)
    if ours is None:
        return [Cell("time", float("nan"), f"≤ {target.device_ms:g} ms", False, row["refused"].get("ours", "not run"))]
    peak = row["rivals"]["ours"]["peak_memory_mb"]
    found = [_most("time, ms", ours, target.device_ms, _why_slow(record, row, ours, clock))]
    if target.graph_ms is not None:
        graph = time_ms(row, "ours", "graph")
        why = "the kernels, and the gaps between them"
        if graph is None:
            why = row["rivals"]["ours"].get("graph_refused", "no graph here")
        found.append(_most("in a graph, ms", graph, target.graph_ms, why))
    for rival, least in (("naive", target.naive_over_ours), ("compile", target.compile_over_ours)):
        found.append(_ratio(row, rival, ours, least, clock))
    scores = f"the bf16 scores alone are {2 * row['steps'] * row['n'] * row['m'] / 1e6:.1f} MB"
    found.append(_most("extra MB", peak, target.peak_mb, "not measured" if peak is None else scores))
    return found


def _most(name: str, value: float | None, limit: float, why: str) -> Cell:
    passed = value is not None and value <= limit
    return Cell(name, float("nan") if value is None else value, f"≤ {limit:g}", passed, "" if passed else why)


def _ratio(row: Row, rival: str, ours_ms: float, least: float, clock: str) -> Cell:
    theirs = time_ms(row, rival, clock)
    name = f"{rival} / ours"
    if theirs is None:
        reason = row["refused"].get(rival, "not run")
        # A rival that this card has no memory for is beaten; anything else that kept it from running is no pass.
        return Cell(name, float("nan"), f"≥ {least:g}", reason == "out of memory", f"{rival}: {reason}")
    ratio, floor = theirs / ours_ms, time_ms(row, "bound", clock)
    ceiling = "" if floor is None else f"{rival} runs at {theirs / floor:.2f}× the bound"
    return Cell(name, ratio, f"≥ {least:g}", ratio >= least, "" if ratio >= least else ceiling)


def _why_slow(record: Record, row: Row, ours_ms: float, clock: str) -> str:
    parts = [f"{ours_ms / floor_ms(record, row):.2f}× the least GEMMs at the card's best rate"]
    bound = time_ms(row, "bound", clock)
    if bound is not None:
        parts.append(f"{ours_ms / bound:.2f}× them at these shapes")
    return ", ".join(parts)


def _bounded(record: Record, row: Row, clock: str) -> Cell:
    """The same shape in less memory: at most so much slower."""
    names = (problems.GLOBAL.label, problems.TINY + problems.GLOBAL.label)
    whole = [time_ms(r, "ours", clock) for r in record["cases"] if r["label"] in names]
    ours = time_ms(row, "ours", clock)
    limit, name = problems.BOUNDED_SLOWDOWN, "slower than unbounded"
    if not whole or whole[0] is None or ours is None:
        return Cell(name, float("nan"), f"≤ {limit:g}", False, row["refused"].get("ours", "not run"))
    ratio = ours / whole[0]
    return Cell(name, ratio, f"≤ {limit:g}", ratio <= limit, "" if ratio <= limit else "smaller buffers, more passes")


# ---- the cost model ---------------------------------------------------------------------------------------------


def backends_ms(row: Row, clock: str) -> dict[str, float]:
    """Our backends' times on a row; the automatic choice under the name of the backend that it took."""
    found = {}
    for name, times in row["rivals"].items():
        if name not in ("naive", "compile"):
            found[row["ours_backend"] if name == "ours" else name] = float(times[f"{clock}_ms_median"])
    return found


def cost_times(record: Record) -> list[dict[str, Any]]:
    """The times of AMDIM's loss on each backend with a cost: what the model of the choice is fitted to."""
    return [
        {
            "backend": name,
            "element_bytes": 2,
            "gemms": problems.CALLS[row["loss"]].gemms(name),
            "n": row["n"],
            "m": row["m"],
            "d": row["d"],
            "time_us": round(1e3 * ms, 2),
        }
        for row in record["cases"]
        if row["loss"] == problems.SWEPT_LOSS and row["workspace_limit_mib"] is None
        for name, ms in backends_ms(row, record["clock"]).items()
        if (name, 2) in cost.table()
    ]
