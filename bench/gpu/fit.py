"""`python -m bench.gpu.fit RECORD.json`: the table of `fused_nce/core/cost.py` from a measured record.

Prints the fitted costs, how well they explain the record's times, and the widths at which the choice would change;
`--write` makes them the shipped table. An element size that the record has no times of keeps the costs that it had.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.text import markdown, number
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


def measured_in(record: dict[str, Any]) -> list[Measured]:
    """Its times.

    Raises:
        ValueError: for a record without any.
    """
    if not record.get("cost_times"):
        raise ValueError("record: got one without cost_times, need one that `python -m bench.gpu` wrote on a GPU")
    return [Measured(**row) for row in record["cost_times"]]


def refit(record: dict[str, Any]) -> Table:
    """The shipped table with the costs that the record measured."""
    return cost.table() | cost.fit(measured_in(record))


def crossover(call: Call, costs: Table) -> int | None:
    """The width from which `cuda` is the faster in 16 bits, for many rows and columns; None where it never is."""
    fastest = (cost.fastest_first(call, MANY, MANY, d, torch.bfloat16, costs)[0] for d in WIDTHS)
    return next((d for d, name in zip(WIDTHS, fastest, strict=True) if name == "cuda"), None)


def wrong_choices(rows: Sequence[Measured], costs: Table) -> list[str]:
    """The shapes of the record at which the table takes a backend that was not the fastest."""
    shapes = sorted({(row.n, row.m, row.d) for row in rows})
    found = []
    for shape in shapes:
        here = {row.backend: row for row in rows if (row.n, row.m, row.d) == shape}
        guess = min(here, key=lambda name: costs[name, here[name].element_bytes].time_us(here[name].gemms, *shape))
        best = min(here, key=lambda name: here[name].time_us)
        if guess != best:
            lost = here[guess].time_us / here[best].time_us
            found.append(f"{shape[0]} × {shape[1]}, D {shape[2]}: {guess} takes {lost:.2f}× as long as {best}")
    return found


def report(record: dict[str, Any], costs: Table) -> str:
    """Markdown."""
    rows = measured_in(record)
    errors: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        guess = costs[row.backend, row.element_bytes].time_us(row.gemms, row.n, row.m, row.d)
        errors.setdefault((row.backend, row.element_bytes), []).append(abs(guess / row.time_us - 1))
    fitted = [
        [f"{backend}, {size} bytes", number(one.launch_us),
         ", ".join(f"{width}: {number(ps)}" for width, ps in sorted(one.gemm_ps.items())),
         f"{100 * max(errors[backend, size]):.0f} %"]
        for (backend, size), one in costs.items() if (backend, size) in errors
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
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.fit", description=__doc__)
    parser.add_argument("record", type=Path, help="bench/results/gpu-….json")
    parser.add_argument("--write", action="store_true", help=f"into {cost.PATH.name}, the shipped table")
    options = parser.parse_args(argv)
    record = json.loads(options.record.read_text(encoding="utf-8"))
    costs = refit(record)
    print(report(record, costs))
    if options.write:
        card, code = record["card"]["name"], record["code"]["commit"][:7]
        cost.write(costs, f"fitted to {options.record.name}: {card}, commit {code}, {record['date_utc'][:10]}")
        print(f"wrote {cost.PATH}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
