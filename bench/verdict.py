"""The targets against one JSON: value, target, pass or miss, and what in the numbers explains a miss."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from bench import cases
from bench.cases import Case, Target

Row = dict[str, Any]


class Cell(NamedTuple):
    """One number and what was asked of it."""

    name: str
    value: float
    target: str
    passed: bool
    why: str  # what explains a miss

    @property
    def text(self) -> str:
        """As the table shows it: what passed, and what missed which target."""
        return f"{self.value:.2f} ✓" if self.passed else f"**{self.value:.2f}** ✗ ({self.target})"


def case_of(row: Row) -> Case:
    """The case that a JSON row measured."""
    return Case(row["n_a"], row["n_c"], row["d"], row["dtype"])


def time_ms(row: Row, rival: str) -> float:
    """Median of a rival, or of the bound."""
    found = row["bound"] if rival == "bound" else row["rivals"][rival]
    return float(found["time_ms_median"])


def judged(record: Row, dtype: str = cases.FLOAT32) -> list[Row]:
    """The rows of the table, in its order; a bf16 run repeats their shapes."""
    shapes = [(r["n_a"], r["n_c"], r["d"]) for r in record["cases"] if r["judged"]]
    return [r for r in record["cases"] if r["dtype"] == dtype and (r["n_a"], r["n_c"], r["d"]) in shapes]


def cells(record: Row, row: Row) -> list[Cell]:
    """Every target of one float32 row whose rivals were measured."""
    table = cases.AVX2_TABLE if record["host"]["torch_cpu_capability"] == "AVX2" else cases.TABLE
    target = table.get(case_of(row), Target(float("inf"), 0.0))
    have = row["rivals"]
    if "ours" not in have:
        return []
    ours, floor = time_ms(row, "ours"), time_ms(row, "bound")
    # Whatever is not GEMM, spread over the scores: a tanh, an exp and their sums cost one core about 0.5 ns a score.
    per_score_ns = (ours - floor) * 1e6 / case_of(row).scores
    above = f"{ours - floor:.1f} ms above the GEMMs, {per_score_ns:.2f} ns a score"
    found = [at_most("ours / bound", ours / floor, target.ours_over_bound, above)]
    if "naive" in have:
        found.append(_naive_cell(row, target))
    for slow, fast, named in (("compile", "ours", "compile"), ("naive", "chunked", "chunked")):
        if {slow, fast} <= have.keys():
            ratio = time_ms(row, slow) / time_ms(row, fast)
            why = f"{named} runs at {time_ms(row, named) / floor:.2f}× the bound"
            found.append(Cell(f"{slow} / {fast}", ratio, "> 1", ratio > 1, why))
    why = f"the scores alone are {row['scores_bytes_float32'] / 2**20:.0f} MiB"
    found.append(at_most("peak MiB", have["ours"]["peak_memory_mib"], target.peak_mib, why))
    return found + _bf16_cell(record, row, ours)


def at_most(name: str, value: float, limit: float, why: str) -> Cell:
    """A number that must not be above a limit; NaN is."""
    return Cell(name, value, f"≤ {limit:g}", value <= limit, why)


def at_least(name: str, value: float, limit: float, why: str) -> Cell:
    """A number that must not be below a limit; NaN is."""
    return Cell(name, value, f"≥ {limit:g}", value >= limit, why)


def _naive_cell(row: Row, target: Target) -> Cell:
    ours, naive, floor = (time_ms(row, name) for name in ("ours", "naive", "bound"))
    least, ceiling = target.naive_over_ours, naive / floor
    why = f"naive itself runs at {ceiling:.2f}× the bound here, so {ceiling:.2f}× is what the bound would reach"
    if ceiling > least:
        allowed = target.ours_over_bound
        why += f"; at the allowed {allowed:g}× the bound it would be {ceiling / allowed:.2f}"
    return at_least("naive / ours", naive / ours, least, why)


def _bf16_cell(record: Row, row: Row, ours_ms: float) -> list[Cell]:
    if "avx512_bf16" not in record["host"]["isa_flags"]:
        return []
    same = [r for r in judged(record, cases.BFLOAT16) if all(r[key] == row[key] for key in ("n_a", "n_c", "d"))]
    twins = [(time_ms(twin, "ours"), time_ms(twin, "bound")) for twin in same if "ours" in twin["rivals"]]
    why = "in bf16 ours takes {:.2f}× its three GEMMs"
    return [at_least("fp32 / bf16", ours_ms / ms, cases.BF16_SPEEDUP, why.format(ms / gemms)) for ms, gemms in twins]


def linear_fit(xs: list[float], ys: list[float]) -> tuple[float, float, float]:
    """Least squares y ≈ intercept + slope·x: (intercept, slope, largest |residual|)."""
    slope, intercept = statistics.linear_regression(xs, ys)
    return intercept, slope, max(abs(y - intercept - slope * x) for x, y in zip(xs, ys, strict=True))
