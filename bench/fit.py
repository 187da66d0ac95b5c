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
from bench.text import markdown, number
from fused_nce.backends.triton import plan
from fused_nce.core import cost
from fused_nce.core.cost import Call, Measured, Table

CALLS = {
    "both gradients": Call(),
    "both gradients, penalty": Call(penalised=True),
    "gradient of the rows": Call(k=False),
    "one tensor in both roles": Call(k=False, shared=True),
    "column statistics": Call(columns=True),
}
MANY = 32768  # rows and columns: a launch is nothing beside them
WIDTHS = range(16, 2561)
EQUAL = 1.02  # times that close are one: the counts know no better
DTYPES = {2: torch.bfloat16, 4: torch.float32}


def crossover(call: Call, costs: Table) -> int | None:
    """The width from which `cuda` is the faster in 16 bits, for many rows and columns; None where it never is."""

    def fastest(d: int) -> str:
        stored = not call.shared and (call.columns or d > plan.WIDE)
        return cost.fastest_first(call._replace(stored=stored), MANY, MANY, d, torch.bfloat16, costs)[0]

    return next((d for d in WIDTHS if fastest(d) == "cuda"), None)


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


def report(rows: Sequence[Measured], costs: Table) -> str:
    """Markdown."""
    errors: dict[tuple[str, int], float] = {}
    for row in rows:
        error = abs(costs[row.entry].time_us(row.gemms, row.n, row.m, row.d) / row.time_us - 1)
        errors[row.entry] = max(error, errors.get(row.entry, 0.0))
    fitted = [
        [f"{key[0]}, {key[1]} bytes", number(costs[key].launch_us),
         ", ".join(f"{width}: {number(ps)}" for width, ps in sorted(costs[key].gemm_ps.items())), f"{error:.0%}"]
        for key, error in errors.items()
    ]  # fmt: skip
    widths = [[name, *(str(crossover(call, table)) for table in (cost.table(), costs))] for name, call in CALLS.items()]
    wrong = wrong_choices(rows, costs)
    return "\n\n".join(
        [
            markdown(["cost", "launch, µs", "a score and GEMM, ps, by D", "largest error"], fitted),
            markdown(["`cuda` is the faster from D", "shipped", "fitted"], widths),
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
    # A card's times serve plain calls too: none of a record's are those of counts.
    kept = {key: x for key, x in cost.table().items() if options.record is None or not key[0].endswith(cost.PLAIN)}
    costs = kept | cost.fit(rows)
    print(report(rows, costs))
    if options.write:
        cost.write(costs, source)
        print(f"wrote {cost.PATH}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
