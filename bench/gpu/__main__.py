"""`python -m bench.gpu`: measure one card, print the verdict, write JSON and Markdown.

The JSON is written again after every problem, so a run that is cut off keeps what it had. The exit status counts the
problems on which our own automatic choice did not run or computed something else.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import host
from bench.gpu import problems, rivals, tables, verdict
from bench.gpu.collect import collect
from bench.gpu.machine import Machine, machine
from bench.gpu.problems import Problem
from bench.text import number

SCHEMA = 1
ROUNDS = 50
COUNTING = {
    "device": "between CUDA events, the call queued behind a spinning kernel: no launch gap of the host's counts",
    "wall": "until the GPU has finished, launches included; ten rounds where there are more than 2^25 scores",
    "graph": "device time of a replayed CUDA graph of the same call",
    "time": "loss + its gradients; median and interquartile range over interleaved rounds; compilation and warm-up "
    "excluded; inputs rotated through twice the L2; a ratio compares two times of the same clock",
    "flop": "the least GEMMs (`gemms`, times `steps`) of 2·n·m·d; useful_gflop_per_s = flop / median time",
    "bound": "those GEMMs at these shapes by cuBLAS: scores in float32, gradients at the faster result dtype",
    "memory": "peak of the bytes asked of the caching allocator above inputs and gradients, 1 MB = 10^6 bytes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; how many problems our own choice did not run."""
    options = _parse(argv)
    if options.plan:
        from bench import counted  # which a card does without

        here = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        print(f"{counted.table(_plan(options, on_gpu=True))}\n\ntorch sees {here} here")
        return 0
    device = machine(options.device)
    record = _opening(options, device)
    date = record["date_utc"][:10]
    kind = "gpu" if device.device.type == "cuda" else "trial"
    path: Path = options.out / f"{kind}-{record['card']['slug']}-{date}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    for problem in _plan(options, device.device.type == "cuda"):
        if time.monotonic() - begin > options.budget_s:
            record["left_out"][problem.label] = NO_TIME
            continue
        row, reason = rivals.failure(partial(collect, problem, device, options.rounds, options.compile))
        if reason:
            record["left_out"][problem.label] = reason
            print(f"{problem.label}: {reason}", file=sys.stderr, flush=True)
        else:
            record["cases"].append(row)
            print(_line(row, device.clock), flush=True)
        device.clean()
        host.write(path, record)
    record["card"] |= {f"{key}_after": value for key, value in device.clocks().items()}
    host.write(path, record)
    text = tables.report(record)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n")
    print(f"wrote {path} and {path.with_suffix('.md').name}")
    return _count_failures(record)


def _count_failures(record: dict[str, Any]) -> int:
    """Problems where the automatic choice gave nothing to time; running out of time is no fault of the code's."""
    refused = [row["label"] for row in record["cases"] if "ours" in row["refused"]]
    broken = [label for label, reason in record["left_out"].items() if reason != NO_TIME]
    for label in refused + broken:
        print(f"FAILED: {label}", file=sys.stderr)
    return len(refused) + len(broken)


def _opening(options: argparse.Namespace, device: Machine) -> dict[str, Any]:
    """The record before its first case."""
    rates = device.rates()  # first: it wakes the card, so that the clocks below are those of work
    code = host.commit() | {"sources_sha256": host.sources_sha256()}
    if options.commit:
        code |= {"commit": options.commit, "dirty": options.dirty}
    return {
        "schema": SCHEMA,
        **host.provenance(),
        "code": code,
        "clock": device.clock,
        "card": device.facts() | rates,
        "versions": host.versions() | {"cuda": str(torch.version.cuda)},
        "settings": {"rounds": options.rounds, "quick": options.quick, "compiler": device.compiler},
        "counting": COUNTING,
        "cases": [],
        "left_out": {},
    }


NO_TIME = "no time left for it (--budget-s)"


def _plan(options: argparse.Namespace, on_gpu: bool) -> list[Problem]:
    """The table first, then the sweeps: what is judged must not run out of time."""
    every = (*problems.QUICK_TABLE, *problems.QUICK_CROSSOVER) if options.quick else problems.ALL
    chosen = [problem for problem in every if options.only in problem.label]
    return chosen if on_gpu else [problem.tiny() for problem in chosen]


def _line(row: dict[str, Any], clock: str) -> str:
    """One problem's outcome while the run goes on."""
    names = rivals.LABELS | {"bound": "bound"}
    parts = [f"{label} {number(verdict.time_ms(row, name, clock))}" for name, label in names.items()]
    return f"{row['label']}: {', '.join(parts)} ms; fastest backend {row['fastest_backend']}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="AMDIM and MoCo alone, three widths of the sweep")
    parser.add_argument("--device", default="cuda", help="cpu tries the runner on tiny sizes; its figures mean nothing")
    parser.add_argument("--out", type=Path, help="default: bench/results; runs/bench with --quick or on a CPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"interleaved rounds a clock; default {ROUNDS}")
    parser.add_argument("--budget-s", type=float, default=240.0, help="no problem is begun after this many seconds")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose label has this text")
    parser.add_argument("--plan", action="store_true", help="run nothing: the problems of a run on a GPU, modelled")
    parser.add_argument("--commit", help="the commit that this is, where there is no repository to ask")
    parser.add_argument("--dirty", action="store_true", help="with --commit: the code differs from it")
    options = parser.parse_args(argv)
    if options.rounds < 2:
        parser.error(f"--rounds: got {options.rounds}, need at least 2 for a spread")
    if options.out is None:
        on_gpu = torch.device(options.device).type == "cuda"
        options.out = host.ROOT / ("bench/results" if on_gpu and not options.quick else "runs/bench")
    return options


if __name__ == "__main__":
    sys.exit(min(main(), 100))
