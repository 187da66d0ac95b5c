"""`python -m bench.fit [RECORD.json]`: the rule by which a backend is chosen, fitted to times.

From a record that `python -m bench.gpu` wrote on a card, or, without one, from what is counted (`bench/counted.py`).
Prints the fitted costs, how well they explain the times, and the widths at which the choice would change; `--write`
makes them the shipped table. An element size without times keeps the costs that it had.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import counted
from bench.gpu import verdict
from bench.gpu.problems import MANY, MOST
from bench.text import markdown, number
from fused_nce.backends.triton import plan
from fused_nce.core import cost
from fused_nce.core.cost import Call, Measured, Table

CALLS = {
    "both gradients": Call(),
    "both gradients, penalty": Call(penalised=True),
    "gradient of the rows": Call(k=False),
    "gradient of the rows, penalty": Call(k=False, penalised=True),
    "one tensor in both roles": Call(k=False, shared=True),
    "column statistics": Call(columns=True),
    "column statistics, gradient of the rows": Call(k=False, columns=True),
}
WIDTHS = range(16, 2561)
EQUAL = 1.02  # times that close are one: the counts know no better
DTYPES = {2: torch.bfloat16, 4: torch.float32}


def crossovers(call: Call, costs: Table, n: int = MANY) -> list[int]:
    """The widths from which another backend than before is the faster, first `triton`, in 16 bits, of n².

    Of two that are EQUAL neither is.
    """
    found: list[int] = []
    before = "triton"
    for d in WIDTHS:
        stored = not call.shared and (call.columns or d > plan.WIDE)
        times = cost.times_us(call._replace(stored=stored), n, n, d, torch.bfloat16, costs)
        best = min(times, key=times.__getitem__)
        if times[before] > EQUAL * times[best]:
            found, before = [*found, d], best
    return found


def choice_table() -> str:
    """The Markdown table of the shipped choice."""
    sizes = 8192, MANY, MOST
    rows = [
        [name, *(", ".join(map("{:,}".format, crossovers(call, cost.table(), n))) for n in sizes)]
        for name, call in CALLS.items()
    ]
    return markdown(["bfloat16: `cuda` is chosen from D", *(f"{n:,}²" for n in sizes)], rows)


def wrong_choices(rows: Sequence[Measured], costs: Table) -> list[str]:
    """The shapes at which the rule takes a backend that was slower than the fastest."""
    found = []
    shapes: dict[tuple[int, int, int, int, Call], dict[str, float]] = {}
    for row in rows:
        shapes.setdefault((row.n, row.m, row.d, row.element_bytes, row.call), {})[row.backend] = row.time_us
    for (n, m, d, size, call), here in sorted(shapes.items()):
        order = cost.fastest_first(call, n, m, d, DTYPES[size], costs)
        guess, best = next(name for name in order if name in here), min(here, key=here.__getitem__)
        lost = here[guess] / here[best]
        if lost > EQUAL:
            found.append(f"{n} × {m}, D {d}: {guess} takes {lost:.2f}× as long as {best}")
    return found


def report(rows: Sequence[Measured], costs: Table, fitted: Sequence[Measured]) -> str:
    """Markdown, of all rows and those that the costs are fitted to."""
    errors: dict[tuple[str, int], float] = {}
    for row in fitted:
        error = abs(costs[row.entry].time_us(row.gemms, row.n, row.m, row.d) / row.time_us - 1)
        errors[row.entry] = max(error, errors.get(row.entry, 0.0))
    lines = [
        [f"{key[0]}, {key[1]} bytes", number(costs[key].launch_us), number(costs[key].score_ps),
         ", ".join(f"{width}: {number(ps)}" for width, ps in sorted(costs[key].gemm_ps.items())), f"{error:.0%}"]
        for key, error in errors.items()
    ]  # fmt: skip
    tables = cost.table(), costs
    widths = [
        [name, *(", ".join(map(str, crossovers(call, table))) or "none" for table in tables)]
        for name, call in CALLS.items()
    ]
    wrong = wrong_choices(rows, costs)
    return "\n\n".join(
        [
            markdown(["cost", "launch, µs", "a score, ps", "a score and GEMM, ps, by D", "largest error"], lines),
            markdown([f"{MANY:,}²: `cuda` is the faster from D", "shipped", "fitted"], widths),
            "\n".join(["Not the fastest:", *(f"- {line}" for line in wrong)]) if wrong else "The fastest everywhere.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Read, fit, print, write; 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.fit", description=__doc__)
    parser.add_argument("record", nargs="?", type=Path, help="bench/results/gpu-….json; without one, what is counted")
    parser.add_argument("--write", action="store_true", help=f"into {cost.PATH.name}, the shipped table")
    options = parser.parse_args(argv)
    rows, source = counted.cost_times(), "fitted to counts, no measurement: " + counted.assumptions()
    if options.record is not None:
        record = json.loads(options.record.read_text(encoding="utf-8"))
        rows = verdict.cost_times(record["cases"], record["clock"])
        card, code = record["card"]["name"], record["code"]["commit"][:7]
        source = f"fitted to {options.record.name}: {card}, commit {code}, {record['date_utc'][:10]}"
    if not rows:
        parser.error(f"record: got {options.record} without times, need one that `python -m bench.gpu` wrote on a GPU")
    # A card's times serve plain calls too, and thin strips: none of a record's are those of counts.
    own = (cost.PLAIN, cost.THIN)
    kept = {key: x for key, x in cost.table().items() if options.record is None or not key[0].endswith(own)}
    fitted = [row for row in rows if options.record is not None or counted.has_rate(row)]
    costs = kept | cost.fit(fitted)
    print(report(rows, costs, fitted))
    if options.write:
        cost.write(costs, source)
        print(f"wrote {cost.PATH}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
