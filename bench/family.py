"""`python -m bench.family`: every loss of the family at several sizes, beside whatever else here computes it.

One interleaved run a problem: eager torch, torch.compile, the compiler's own chunker, `F.linear_cross_entropy`,
installed libraries, and ours. Time, peak memory, and the error of value and gradients against float64. Writes
`bench/results/family-HOST.json`; `python -m bench.tables` makes the README's table and `docs/slower.md` of it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import host, measure
from bench.rivals import bound
from fused_nce import last_path
from fused_nce.bench import memory, timers
from fused_nce.bench.formulas import FORMULAS
from fused_nce.bench.rivals import RIVALS, Problem, Subject, errors, step
from fused_nce.measure import torch_threads

SCHEMA = 1
CALL_S = 5.0  # a call of another that takes longer is left out
Loss = Callable[..., Tensor]


def _problems() -> Iterator[Problem]:
    for n, d in ((32, 64), (64, 256), (256, 256), (1024, 64), (1024, 256), (1024, 1024), (4096, 256)):
        yield Problem("info_nce", f"InfoNCE {n:,}², D {d}", n, n, d)
    for n, d in ((128, 64), (128, 512), (128, 1024), (256, 512), (1024, 64), (1024, 512), (1024, 1024)):
        yield Problem("clip_loss", f"CLIP {n:,}², D {d}", n, n, d)
    for n in (2048, 4096):
        yield Problem("clip_loss", f"CLIP {n:,}², D 512", n, n, 512)
    for n in (256, 1024, 4096):
        yield Problem("siglip_loss", f"SigLIP {n:,}², D 512", n, n, 512)
    for n, d in ((256, 128), (1024, 64), (1024, 128), (1024, 1024), (4096, 128), (8192, 128), (4096, 512)):
        yield Problem("nt_xent", f"NT-Xent 2 × {n // 2:,}, D {d}", n, n, d)
    for n in (256, 1024, 4096):
        yield Problem("sup_con", f"SupCon {n:,}, D 128", n, n, 128)
    for n, m in ((64, 4096), (256, 16384), (256, 65536)):
        yield Problem("moco_nce", f"MoCo {n} × {m:,}, D 128", n, m, 128)
    for n in (64, 256, 1024):
        yield Problem("cpc_nce", f"CPC 4 × {n:,}², D 256", n, n, 256, steps=4)
    for n, d in ((16, 128), (64, 256), (256, 256)):
        yield Problem("amdim_nce", f"AMDIM {n} × 49, D {d}", n, n * 49, d, n_c=49)


PROBLEMS = tuple(_problems())
QUICK = ("InfoNCE 256², D 256", "CLIP 256², D 512", "NT-Xent 2 × 512, D 128", "SupCon 1,024, D 128")


def least_gemms(problem: Problem) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """(GEMM, library) → a call: each of the least GEMMs by the library that was the fastest in three rounds."""
    found = bound.gemms(torch.randn(problem.n, problem.d), torch.randn(problem.m, problem.d))
    calls = {key: call for key, call in found.items() if key[0] in bound.GEMMS[: problem.gemms]}
    times = timers.interleave(calls, 3)
    fastest = {key[0]: key for key in sorted(times, key=lambda key: -min(times[key]))}
    return {fastest[gemm]: calls[fastest[gemm]] for gemm in bound.GEMMS[: problem.gemms]}


def measured(
    problem: Problem, names: Sequence[str], threads: int, rounds: int, budget_s: float, *, with_memory: bool = True
) -> dict[str, Any]:
    """One problem: time, errors and, if asked for, memory of every rival that computes it."""
    inputs = problem.inputs()
    exact = step(FORMULAS[problem.loss].naive, problem.inputs(torch.float64))
    steps: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    path = None
    for name in names:
        loss = RIVALS[name].make(problem)
        if loss is None:
            continue
        steps[name] = partial(step, loss, inputs)
        rows[name] = errors(steps[name](), exact)
        if rows[name]["gradient_error"] > 1e-2:
            raise ValueError(f"{name} on {problem.label}: gradients differ by {rows[name]['gradient_error']:.1e}")
        if name == "ours":
            path = last_path()
        call_s = timers.wall_ms(steps[name]) / 1e3
        if name != "ours" and call_s > CALL_S:  # pytorch-metric-learning's NT-Xent holds N³ numbers
            left_out[name] = f"one call takes {call_s:.1f} s at {problem.label}"
            del steps[name], rows[name]
    del exact
    with timers.without_gc():
        gemms = least_gemms(problem)
        calls = {**steps, "bound": lambda: [gemm() for gemm in gemms.values()]}
        begin = time.perf_counter()
        timers.interleave(calls, 1)
        once = time.perf_counter() - begin
        count = int(min(10 * rounds, max(rounds, budget_s / once)))  # short calls take more rounds
        times, busy = measure.quietest(calls, count)
    for name in rows:
        rows[name] |= timers.spread(times[name])
        if with_memory:
            rows[name] |= {"peak_memory_mib": memory.peak(Subject(name, problem), threads)["peak_memory_mib"]}
    sizes = {"n": problem.n, "m": problem.m, "d": problem.d, "n_c": problem.n_c, "steps": problem.steps}
    return {
        "loss": problem.loss,
        "label": problem.label,
        **sizes,
        "gemms": problem.gemms,
        "threads": threads,
        "rounds": count,
        "others_cpu_share": round(busy, 4),
        "ours_backend": path.backend if path else None,
        "bound_ms": timers.spread(times["bound"])["time_ms_median"] * problem.steps,
        "bound_libraries": dict(gemms.keys()),
        "rivals": rows,
        "left_out": left_out,
    }


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, print, write; returns the JSON's path."""
    from bench import family_tables

    cores = host.facts()["cores"]
    parser = argparse.ArgumentParser(prog="python -m bench.family", description=__doc__)
    parser.add_argument("--losses", nargs="+", choices=sorted({p.loss for p in PROBLEMS}), help="default: all")
    parser.add_argument("--rivals", nargs="+", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, cores}))
    parser.add_argument("--rounds", type=int, default=11, help="at least, interleaved")
    parser.add_argument("--budget-s", type=float, default=2.0, help="seconds a problem may spend on more rounds")
    parser.add_argument("--quick", action="store_true", help="four problems, two threads, no compilation")
    parser.add_argument("--out", type=Path, help="default: bench/results, runs/bench with --quick or --losses")
    host.add_isa(parser)
    options = parser.parse_args(argv)
    host.restart_with(options.isa, "bench.family", argv)
    chosen = [p for p in PROBLEMS if (not options.losses or p.loss in options.losses)]
    if options.quick:
        chosen, options.threads = [p for p in chosen if p.label in QUICK], [cores]
        options.rivals = [name for name in options.rivals if not RIVALS[name].compiles]
    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {"schema": SCHEMA, **host.provenance(), "problems": rows}
    out = options.out or host.ROOT / ("runs/bench" if options.quick or options.losses else "bench/results")
    out.mkdir(parents=True, exist_ok=True)
    path: Path = out / f"family-{record['host']['slug']}.json"
    for threads in options.threads:
        known: dict[tuple[str, str], str] = {}  # (loss, rival) → why it is left out of the problems after
        with torch_threads(threads):
            for problem in tqdm(chosen, desc=f"{threads} threads", unit="problem", disable=None, dynamic_ncols=True):
                most = threads == max(options.threads)  # the peak is the same with fewer
                times = options.rounds, options.budget_s
                names = [name for name in options.rivals if (problem.loss, name) not in known]
                row = measured(problem, names, threads, *times, with_memory=most)
                known |= {(problem.loss, name): why for name, why in row["left_out"].items()}
                row["left_out"] = {name: why for (loss, name), why in known.items() if loss == problem.loss}
                rows.append(row)
                host.write(path, record)
    print(family_tables.table(record), family_tables.slower([record]), f"wrote {path}", sep="\n\n")
    return path


if __name__ == "__main__":
    main()
