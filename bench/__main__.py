"""`python -m bench`: measure this machine, print the verdict, write JSON, a Markdown table and pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import cases, host, measure, plots, rivals, tables
from bench.cases import Case
from fused_nce.bench import memory

SCHEMA = 1


def main(argv: Sequence[str] | None = None) -> Path:
    """Run, print, write; returns the JSON's path."""
    options = _parse(argv)
    host.restart_with(options.isa, "bench", argv)
    torch.set_num_threads(options.threads)
    load = host.busy_now()
    if load > host.BUSY_SHARE:
        message = f"others use {load:.0%} of the cores, need <= {host.BUSY_SHARE:.0%} for times that mean anything"
        if not options.force:
            raise SystemExit(f"bench: {message}; wait, or measure anyway with --force")
        print(f"WARNING: {message}", file=sys.stderr)
    record = collect(options) | {"others_cpu_share_before": round(load, 4)}
    options.out.mkdir(parents=True, exist_ok=True)
    path: Path = options.out / f"cpu-{record['host']['slug']}.json"
    host.write(path, record)
    text = tables.report(record)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n")
    noisy = [row for row in record["cases"] if row["others_cpu_share"] > measure.NOISY_SHARE]
    if noisy:
        worst = max(row["others_cpu_share"] for row in noisy)
        print(f"WARNING: others used up to {worst:.0%} of the cores during {len(noisy)} cases", file=sys.stderr)
    for file in [path, path.with_suffix(".md"), *plots.draw(record, path)]:
        print(f"wrote {file}")
    return path


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements as one JSON object, units in the keys."""
    table = [Case(*shape) for shape in options.shapes] or list(cases.QUICK_TABLE if options.quick else cases.TABLE)
    sweep = list(() if options.shapes else cases.QUICK_SWEEP if options.quick else cases.SWEEP)
    # Without AVX-512 torch multiplies bfloat16 by a loop, minutes a case.
    wide = [] if host.narrowed() else table
    bf16 = [Case(case.n_a, case.n_c, case.d, cases.BFLOAT16) for case in wide]
    plan: list[tuple[Case, list[str]]] = [(case, options.rivals) for case in dict.fromkeys([*table, *sweep])]
    plan += [(case, [name for name in options.rivals if name == "ours"]) for case in bf16]
    rows = []
    steps = sum(1 + len(names) for _, names in plan)
    with tqdm(total=steps, unit="measurement", disable=None, dynamic_ncols=True) as bar:
        for case, names in plan:
            bar.set_description(f"{case.name} {case.dtype}")
            # The table's rows are judged, so they get every round; the sweep's large ones are only drawn.
            rounds, budget_s = (options.rounds, float("inf")) if case in table else (options.rounds, options.sweep_s)
            row = describe(case, judged=case in table) | measure.case_times(case, names, rounds, budget_s)
            bar.update()
            for name in names:
                row["rivals"][name] |= memory.peak(rivals.subject(name, case), options.threads)
                bar.update()
            rows.append(row)
    return {
        "schema": SCHEMA,
        **host.provenance(),
        "counting": {
            "time": "loss + both gradients into fresh memory; median and interquartile range over interleaved rounds; "
            "compilation, warm-up and garbage collection excluded",
            "flop": "3 GEMMs of 2·N·M·D; useful_gflop_per_s = flop / median time, whatever else was computed",
            "bound": "per GEMM the library with the smaller median; a round's bound is the sum of the winners' times",
            "memory": "peak = high_water - file_backed - anonymous_before - gradients; inputs lie in anonymous_before",
        },
        "cases": rows,
    }


def describe(case: Case, judged: bool) -> dict[str, Any]:
    """What was run, and the bytes and FLOP that it counts."""
    return {
        "judged": judged,
        "n_a": case.n_a,
        "n_c": case.n_c,
        "d": case.d,
        "dtype": case.dtype,
        "flop": case.flop,
        "scores_bytes_float32": 4 * case.scores,
        "inputs_bytes": case.inputs_bytes,
        "gradients_bytes": case.inputs_bytes,
    }


def _shape(text: str) -> tuple[int, int, int]:
    try:
        n_a, n_c, d = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, need n_a x n_c x D such as 128x49x1024") from None
    if n_a < 2 or n_c < 1 or d < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, need n_a >= 2, n_c >= 1, D >= 1")
    return n_a, n_c, d


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute: few shapes, 5 rounds, no torch.compile")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[], metavar="NxCxD", help="these alone, no sweep")
    parser.add_argument("--rivals", nargs="+", choices=list(rivals.RIVALS), help="default: all")
    parser.add_argument("--rounds", type=int, help="interleaved rounds a shape; default 21, 5 with --quick")
    parser.add_argument(
        "--sweep-s", type=float, default=12.0, help="seconds a shape of the batch sweep, at least 5 rounds"
    )
    parser.add_argument("--threads", type=int, default=host.facts()["cores"], help="default: all cores")
    parser.add_argument("--out", type=Path, help="default: bench/results, runs/bench with --quick or --shapes")
    host.add_isa(parser)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (5 if options.quick else 21)
    if options.rounds < 2:
        parser.error(f"--rounds: got {options.rounds}, need at least 2 for a spread")
    if options.out is None:
        options.out = host.ROOT / ("runs/bench" if options.quick or options.shapes else "bench/results")
    if options.rivals is None:
        options.rivals = [name for name in rivals.RIVALS if not (options.quick and rivals.RIVALS[name].compiles)]
    return options


if __name__ == "__main__":
    main()
