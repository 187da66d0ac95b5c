"""The targets against one JSON: value, target, pass or miss, and what in the numbers explains a miss."""

from __future__ import annotations

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
    why: str  # a miss explained, empty for a pass

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
    ours = time_ms(row, "ours")
    found = [_bound_cell(row, target)]
    if "naive" in have:
        found.append(_naive_cell(row, target))
    if "compile" in have:
        ratio = time_ms(row, "compile") / ours
        why = f"compile runs at {time_ms(row, 'compile') / time_ms(row, 'bound'):.2f}× the bound"
        found.append(Cell("compile / ours", ratio, "> 1", ratio > 1, "" if ratio > 1 else why))
    if {"naive", "chunked"} <= have.keys():
        ratio = time_ms(row, "naive") / time_ms(row, "chunked")
        why = f"chunked runs at {time_ms(row, 'chunked') / time_ms(row, 'bound'):.2f}× the bound"
        found.append(Cell("naive / chunked", ratio, "> 1", ratio > 1, "" if ratio > 1 else why))
    peak = have["ours"]["peak_memory_mib"]
    fits = peak <= target.peak_mib
    why = f"the scores alone are {row['scores_bytes_float32'] / 2**20:.0f} MiB"
    found.append(Cell("peak MiB", peak, f"≤ {target.peak_mib:g}", fits, "" if fits else why))
    found += _bf16_cell(record, row, ours)
    return found


def _bound_cell(row: Row, target: Target) -> Cell:
    ours, floor = time_ms(row, "ours"), time_ms(row, "bound")
    ratio = ours / floor
    passed = ratio <= target.ours_over_bound
    # Whatever is not GEMM, spread over the scores: a tanh, an exp and their sums cost one core about 0.5 ns a score.
    per_score_ns = (ours - floor) * 1e6 / case_of(row).scores
    why = f"{ours - floor:.1f} ms above the GEMMs, {per_score_ns:.2f} ns a score"
    return Cell("ours / bound", ratio, f"≤ {target.ours_over_bound:g}", passed, "" if passed else why)


def _naive_cell(row: Row, target: Target) -> Cell:
    naive, floor = time_ms(row, "naive"), time_ms(row, "bound")
    ratio, ceiling = naive / time_ms(row, "ours"), naive / floor
    passed = ratio >= target.naive_over_ours
    why = f"naive itself runs at {ceiling:.2f}× the bound here, so {ceiling:.2f}× is what the bound would reach"
    if ceiling > target.naive_over_ours:
        why += (
            f"; at the allowed {target.ours_over_bound:g}× the bound it would be {ceiling / target.ours_over_bound:.2f}"
        )
    return Cell("naive / ours", ratio, f"≥ {target.naive_over_ours:g}", passed, "" if passed else why)


def _bf16_cell(record: Row, row: Row, ours_ms: float) -> list[Cell]:
    if "avx512_bf16" not in record["host"]["isa_flags"]:
        return []
    same = [r for r in judged(record, cases.BFLOAT16) if all(r[key] == row[key] for key in ("n_a", "n_c", "d"))]
    return [
        Cell(
            "fp32 / bf16",
            ratio := ours_ms / time_ms(twin, "ours"),
            f"≥ {cases.BF16_SPEEDUP:g}",
            passed := ratio >= cases.BF16_SPEEDUP,
            ""
            if passed
            else f"in bf16 ours takes {time_ms(twin, 'ours') / time_ms(twin, 'bound'):.2f}× its three GEMMs",
        )
        for twin in same
        if "ours" in twin["rivals"]
    ]


def linear_fit(xs: list[float], ys: list[float]) -> tuple[float, float, float]:
    """Least squares y ≈ intercept + slope·x: (intercept, slope, largest |residual|)."""
    n = len(xs)
    mean_x, mean_y = sum(xs) / n, sum(ys) / n
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    intercept = mean_y - slope * mean_x
    return intercept, slope, max(abs(y - intercept - slope * x) for x, y in zip(xs, ys, strict=True))
