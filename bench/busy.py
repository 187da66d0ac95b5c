"""What a training step costs beside other busy processes: `python -m bench.busy`.

Runs `fused-nce train` with 0, 1 and 4 endless loops beside it. A fair scheduler leaves the trainer cores / (cores +
loops) of the machine; a step may cost 1.5 times its quiet time divided by that share. Measured beside it: as many
threads as there are cores, whatever else runs. Needs a machine that is otherwise quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from fused_nce import measure

ALLOWED = 1.5
CORES = measure.cores()
WAYS = {"ours": "auto", f"{CORES} threads": str(CORES)}  # run.threads
WARM_UP = 2  # steps


@contextmanager
def busy(loops: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Endless loops, each in a process of its own, until the body ends."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def step_seconds(steps: int, options: Sequence[str]) -> list[float]:
    """Of each step of a training run, the first ones left out."""
    environment = os.environ | {"OMP_NUM_THREADS": str(CORES)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fused_nce.cli", "train", "amdim", "--preset", "digits", "--probes", "false"]
        command += ["--run.log_every", "1", "--run.tensorboard", "false", "--max-steps", str(steps + WARM_UP)]
        done = subprocess.run(
            [*command, *options, "--out", f"{folder}/run"], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"train: failed: {done.stderr.strip().splitlines()[-1:]}")
        times = [json.loads(row)["time_s"] for row in Path(folder, "run", "log.jsonl").read_text().splitlines()]
    return [after - before for before, after in pairwise(times)][WARM_UP - 1 :]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table; 1 if ours is above what is allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 1, 4], help="busy processes, 0 first")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, one after the other")
    parser.add_argument("--batch-size", type=int, default=128)
    values = parser.parse_args(argv)
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(values.rounds):
        for loops in values.loops:
            for name, way in WAYS.items():
                options = [f"--batch-size={values.batch_size}", f"--run.threads={way}"]
                with busy(loops):
                    seconds = step_seconds(values.steps, options)
                found.setdefault((name, loops), []).extend(seconds)
    median = {key: statistics.median(seconds) for key, seconds in found.items()}
    print(f"{measure.processor()}, {CORES} cores, {measure.commit()}: median step of {values.steps * values.rounds}\n")
    heads = " | ".join(f"{name}, ms | × quiet" for name in WAYS)
    print(f"| busy loops | share left | allowed, × quiet | {heads} |")
    print("|---" * (3 + 2 * len(WAYS)) + "|")
    failed = False
    for loops in values.loops:
        share = CORES / (CORES + loops)
        cells = []
        for name in WAYS:
            ratio = median[name, loops] / median[name, values.loops[0]]
            failed |= name == "ours" and loops > 0 and ratio > ALLOWED / share
            cells += [f"{1e3 * median[name, loops]:.0f}", f"{ratio:.2f}"]
        print(f"| {loops} | {share:.2f} | {ALLOWED / share if loops else 1:.2f} | {' | '.join(cells)} |")
    quiet = [median[name, values.loops[0]] for name in WAYS]
    print(f"\nquiet step, ours / {CORES} threads: {quiet[0] / quiet[1]:.3f}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
