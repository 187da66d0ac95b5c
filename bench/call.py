"""`python -m bench.call [--against PATH]`: what one small call costs, forward and backward, in CPU time of one thread.

One row a loss and number of rows: this build, the same build's calls of Python functions, eager torch, and, where PATH
is another built checkout, its time; their measurements take turns, and each is the least of many.
`--out bench/results/call-HOST.json` keeps the record; `python -m bench.tables` puts it into `docs/performance.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import host
from bench.text import markdown

ROWS = (2, 8, 32, 64, 128, 256)
LOSSES = ("amdim_nce", "info_nce", "info_nce normalized", "clip_loss", "nt_xent", "moco_nce")
TURNS = 6
Record = dict[str, Any]


class Worker:
    """A process that measures one build."""

    def __init__(self, build: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(build.resolve()), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("call_worker.py"))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def ask(self, loss: str, rows: int) -> dict[str, Any]:
        """One measurement."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps((loss, rows)), file=self.process.stdin, flush=True)
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measured(builds: Sequence[Path], rows: Sequence[int]) -> list[Record]:
    """A record a loss and number of rows; `other_us` where there is a second build."""
    workers = [Worker(build) for build in builds]
    found = []
    for loss, n in tqdm([(loss, n) for loss in LOSSES for n in rows], disable=None, dynamic_ncols=True):
        turns = [[worker.ask(loss, n) for worker in workers] for _ in range(TURNS)]
        ours, eager = (min(turn[0][name] for turn in turns) for name in ("ours", "eager"))
        row = {"loss": loss, "rows": n, "ours_us": ours, "eager_us": eager, "python_calls": turns[0][0]["calls"]}
        found.append(row | ({"other_us": min(turn[1]["ours"] for turn in turns)} if len(builds) > 1 else {}))
    for worker in workers:
        worker.close()
    return found


def table(record: Record) -> str:
    """Of a record, and where it is from."""
    other = record.get("against")
    header = ["loss", "rows", "µs", "eager, µs", "÷ eager", "Python calls"]
    rows = [
        [
            *(row["loss"], str(row["rows"]), f"{row['ours_us']:.0f}", f"{row['eager_us']:.0f}"),
            *(f"{row['ours_us'] / row['eager_us']:.2f}", str(row["python_calls"])),
            *((f"{row['other_us']:.0f}", f"{row['ours_us'] / row['other_us']:.3f}") if other else ()),
        ]
        for row in record["calls"]
    ]
    header += [f"{other[:7]}, µs", f"÷ {other[:7]}"] if other else []
    return (
        f"{markdown(header, rows)}\n\nForward and backward, processor time of one thread, the least of "
        f"{TURNS} turns. {record['host']['cpu_model']}; torch {record['versions']['torch']}; "
        f"commit {record['code']['commit'][:7]}; others used {record['others_cpu_share']:.1%} of the cores."
    )


def block(folder: Path) -> str:
    """What the documents show."""
    return host.shown(folder, "call-*.json", table, "python -m bench.call --out bench/results/call-HOST.json")


def main(argv: Sequence[str] | None = None) -> Record:
    """Measure, print, and write the record where asked to."""
    parser = argparse.ArgumentParser(prog="python -m bench.call", description=__doc__)
    parser.add_argument("--against", type=Path, help="another built checkout")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--out", type=Path, help="JSON record")
    options = parser.parse_args(argv)
    builds, meter = [host.ROOT], host.BusyMeter()
    if options.against:
        builds.append(options.against)
    found: Record = {"calls": measured(builds, options.rows), "others_cpu_share": meter.share()}
    found |= host.provenance()
    if options.against:
        git = ["git", "-C", str(options.against), "rev-parse", "HEAD"]
        found["against"] = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    print(table(found))
    if options.out:
        host.write(options.out, found)
    return found


if __name__ == "__main__":
    main()
