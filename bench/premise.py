"""`python -m bench.premise --data CIFAR10`: does an encoder learn more from more negatives, all else equal?

Every run of a method makes as many updates, each of the same number of images; what differs is how many of these a loss
compares: the rest of an update is other losses, accumulated. MoCo's batch stays as it is, and its queue grows. Each is
trained by `fused-nce train` and judged by `fused-nce eval`, from several seeds. After each run
`docs/results/premise.json` and its picture are written anew, and `python -m bench.tables` has the table. What the
record has is not run again, so a study may go on later and elsewhere; a run that was stopped goes on in `--runs`.

Negatives of a batch cannot outnumber an update's images, so what goes beyond 512 of them is a study of its own with
fewer and larger updates, `--largest`: a run costs up to an hour. `--plan` prints what they would take.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from tqdm import tqdm

from bench import host
from bench.text import markdown
from fused_nce import measure

RECORD = host.ROOT / "docs/results/premise.json"
IMAGES, LARGEST = 512, 8192  # of an update
LONGER = 4  # times the epochs of the rest, for updates that are so large
GFLOP_PER_S = 500  # of two AVX-512 cores, nothing else running: `matrix_gflop_per_s` of a run's log has a machine's own
TRAINING = 50_000  # CIFAR-10's
PART = 128  # that an encoder sees at a time where the loss's images can come in parts: of BatchNorm's statistics
PROBES = {"knn": "kNN-200", "linear": "linear"}
MADE = ("processor", "torch", "commit")  # of a row: a study may go on elsewhere, and later
KEY = ("arm", "negatives", "seed", "images", "updates")  # that tells a row of the record from others
HEAD = ("method", "updates × images", "images compared, or the queue")
JUDGED = ("--protocols=knn,linear", "--baselines=false", "--cost=false")
Row = dict[str, Any]
Key = tuple[str, int, int, int, int]


class Arm(NamedTuple):
    """A method, its numbers of negatives, and the options that give it one."""

    label: str
    method: str
    counts: tuple[int, ...]
    tap: str
    mflop: tuple[float, float]  # of an image, forward and backward, and of each image that its loss compares it with
    options: tuple[str, ...] = ()
    in_parts: bool = False
    queue: bool = False

    def gflop(self, negatives: int) -> float:
        """Of an image; the queue's share of MoCo's is below a hundredth."""
        encoder, loss = self.mflop
        again = 4 / 3 if self.in_parts and negatives > PART else 1  # the gradient cache's first pass
        return (again * encoder + negatives * loss) / 1e3

    def arguments(self, negatives: int, images: int = IMAGES) -> list[str]:
        """Of `fused-nce train`."""
        compared = PART if self.queue else negatives
        seen = min(PART, compared) if self.in_parts else compared
        found = [*self.options, f"--optim.batch_size={seen}", f"--optim.accumulate={images // compared}"]
        if seen < compared:
            found.append(f"--scale.negatives={compared}")
        return [*found, f"--model.queue_size={negatives}"] if self.queue else found


IN_BATCH, MORE = (16, 64, 256, 512), (512, 2048, 8192)
ARMS = {
    "amdim": Arm("AMDIM", "amdim", IN_BATCH, "f1", (1223, 0.304), in_parts=True),
    "dim-nce": Arm("DIM, infoNCE", "dim", IN_BATCH, "fc", (334, 0.098), ("--loss.estimator=nce",)),
    "dim-jsd": Arm("DIM, JSD", "dim", IN_BATCH, "fc", (334, 0.131), ("--loss.estimator=jsd",)),
    "moco": Arm("MoCo, queue", "moco", (16, 128, 1024, 8192), "h", (723, 0.0), queue=True),
}


LEAST = 15  # points of accuracy that a picture spans: seeds are some tenths apart
COLOURS = dict(zip(ARMS, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))  # of Okabe and Ito


class Run(NamedTuple):
    """One of the study."""

    name: str  # of its arm
    negatives: int
    seed: int
    epochs: int
    images: int = IMAGES

    @property
    def updates(self) -> int:
        """As many as the epochs have where a loss compares all of an update's images."""
        return self.epochs * (TRAINING // self.images)

    @property
    def key(self) -> Key:
        """What it is told from others by, in the record."""
        return self.name, self.negatives, self.seed, self.images, self.updates

    @property
    def folder(self) -> str:
        large = "" if self.images == IMAGES else f"-images-{self.images}"
        return f"{self.name}-{self.negatives}-{self.seed}-epochs-{self.epochs}{large}"


def command(wanted: Run, data: str, run: Path) -> list[str]:
    """What trains one run."""
    arm, epochs, updates = ARMS[wanted.name], wanted.epochs, wanted.updates
    shared = [f"--data={data}", "--preset=cifar10-tiny", f"--optim.epochs={epochs}"]
    shared += [f"--seed={wanted.seed}", f"--out={run}", f"--max-steps={updates}"]
    shared.append("--overwrite")  # what a run left that was stopped before its first checkpoint
    quiet = [f"--optim.warmup_updates={updates // 10}", "--run.tensorboard=false"]
    return ["train", arm.method, *shared, *quiet, *arm.arguments(wanted.negatives, wanted.images)]


def run_one(wanted: Run, data: str, run: Path, jobs: int) -> Row:
    """Train and judge what of it is not done yet, on its share of the cores; the row of the record."""
    program = [sys.executable, "-m", "fused_nce.cli"]
    judged = run / "eval.json"
    if not judged.exists():
        resume = any((run / "checkpoints").glob("step_*"))
        train = ["train", ARMS[wanted.name].method, "--resume", str(run)] if resume else command(wanted, data, run)
        evaluate = ["eval", str(run), *JUDGED, f"--taps={ARMS[wanted.name].tap}"]
        environment = {"OMP_NUM_THREADS": str(max(1, measure.cores() // jobs)), **os.environ}
        for arguments in (train, evaluate):
            subprocess.run([*program, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    found = json.loads(judged.read_text(encoding="utf-8"))
    accuracies = {row["probe"]: round(row["accuracy_pct"], 2) for row in found["probes"] if row["labels"] == "all"}
    training = found["training"]
    return {
        "arm": wanted.name, "negatives": wanted.negatives, "seed": wanted.seed, "updates": training["steps"],
        "images": wanted.images, "made": {key: found["environment"][key] for key in MADE},
        "minutes": round(training["minutes"], 2), **{probe: accuracies[probe] for probe in PROBES},
    }  # fmt: skip


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Standard deviation of the seeds; None of a single one."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def grouped(rows: Iterable[Row]) -> dict[tuple[int, int, str], dict[int, list[Row]]]:
    """Images of an update, updates and arm → negatives → its seeds."""
    found: dict[tuple[int, int, str], dict[int, list[Row]]] = {}
    for row in sorted(rows, key=lambda r: (r["images"], r["updates"], list(ARMS).index(r["arm"]), r["negatives"])):
        curve = found.setdefault((row["images"], row["updates"], row["arm"]), {})
        curve.setdefault(row["negatives"], []).append(row)
    return found


def table(record: dict[str, Any]) -> str:
    """Of a record, and how it was made."""
    rows = []
    for (images, updates, arm), counts in grouped(record["runs"]).items():
        for negatives, seeds in counts.items():
            cells = [mean_and_spread([row[probe] for row in seeds]) for probe in PROBES]
            shown = [f"{mean:.1f}" + ("" if sd is None else f" ± {sd:.1f}") for mean, sd in cells]
            size = f"{updates} × {images:,}"
            rows.append([ARMS[arm].label, size, f"{negatives:,}", *shown, str(len(seeds))])
    head = [*HEAD, *(f"{label}, %" for label in PROBES.values()), "seeds"]
    made = sorted({"{processor}, torch {torch}, commit {commit:.7}".format(**row["made"]) for row in record["runs"]})
    said = f"CIFAR-10, `cifar10-tiny`; mean ± standard deviation of the seeds. {'; '.join(made)}."
    return f"{markdown(head, rows)}\n\n{said}"


def block(path: Path = RECORD) -> str:
    """What the documents show."""
    if not path.exists():
        return "No record is committed yet: `python -m bench.premise` makes one."
    return table(json.loads(path.read_text(encoding="utf-8")))


def draw(record: dict[str, Any], path: Path) -> None:
    """Accuracy against the number of negatives: each seed a point, the means a line."""
    figure = Figure(figsize=(10, 4), dpi=150, facecolor="white", layout="constrained")
    curves = grouped(record["runs"])
    several = len({(images, updates) for images, updates, _ in curves}) > 1
    ticks = sorted({row["negatives"] for row in record["runs"]})
    for ax, (probe, title) in zip(figure.subplots(1, 2), PROBES.items(), strict=True):
        for (images, updates, arm), counts in curves.items():
            means, colour = [statistics.mean(r[probe] for r in seeds) for seeds in counts.values()], COLOURS[arm]
            label = ARMS[arm].label + (f", {updates} × {images:,}" if several else "")
            ax.plot(list(counts), means, "-" if images == IMAGES else "--", color=colour, linewidth=1.5, label=label)
            points = [(negatives, row[probe]) for negatives, seeds in counts.items() for row in seeds]
            ax.plot(*zip(*points, strict=True), "o", color=colour, markersize=4, alpha=0.6)
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [f"{n:,}" for n in ticks], fontsize=8)
        low, high = ax.get_ylim()
        rest = max(0.0, LEAST - (high - low)) / 2
        ax.set_ylim(low - rest, high + rest)
        ax.set_title(f"{title}, test accuracy in %", fontsize=10, loc="left")
        ax.set_xlabel("images compared in one loss; MoCo: keys of the queue", fontsize=9)
        ax.grid(True, color="#DDDDDD", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def plan(runs: Sequence[Run], gflop_per_s: float) -> str:
    """What each kind of run takes, and all of them."""
    rows, total = [], 0.0
    for run, seeds in Counter(run._replace(seed=0) for run in runs).items():
        minutes = run.updates * run.images * ARMS[run.name].gflop(run.negatives) / gflop_per_s / 60
        total += seeds * minutes / 60
        size = f"{run.updates} × {run.images:,}"
        rows.append([ARMS[run.name].label, size, f"{run.negatives:,}", f"{minutes:.0f}", str(seeds)])
    rate = f"at {gflop_per_s:,.0f} GFLOP/s, evaluations left out"
    return f"{markdown([*HEAD, 'minutes a run', 'seeds'], rows)}\n\n{len(runs)} runs, {total:.1f} hours {rate}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and write the record and the picture after each run."""
    parser = argparse.ArgumentParser(prog="python -m bench.premise", description=__doc__)
    parser.add_argument("--data", help="CIFAR-10 as shards or folders")
    parser.add_argument("--runs", type=Path, default=host.ROOT / "runs/premise", help="where runs are kept")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--negatives", nargs="+", type=int, help="these alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--largest", action="store_true", help="up to 8,192 of a batch, instead of up to 512")
    parser.add_argument("--plan", action="store_true", help="print what the missing runs would take, and do none")
    parser.add_argument("--gflop-per-s", type=float, default=GFLOP_PER_S, help="that the plan is made for")
    parser.add_argument("--out", type=Path, default=RECORD, help="JSON; the picture lies beside it")
    options = parser.parse_args(argv)
    large = options.largest
    wanted = [
        Run(name, negatives, seed, options.epochs * (LONGER if large else 1), LARGEST if large else IMAGES)
        for seed in range(options.seeds)
        for name in options.arms
        if not (large and ARMS[name].queue)  # which has had so many already
        for negatives in (MORE if large else ARMS[name].counts)
        if options.negatives is None or negatives in options.negatives
    ]
    record: dict[str, list[Row]] = {"runs": []}
    if options.out.exists():
        record = json.loads(options.out.read_text(encoding="utf-8"))
    done = {tuple(row[name] for name in KEY) for row in record["runs"]}
    missing = [run for run in wanted if run.key not in done]
    if options.plan:
        print(plan(missing, options.gflop_per_s))
        return 0
    if options.data is None:
        parser.error("--data: needed unless with --plan")
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = pool.map(lambda run: run_one(run, options.data, options.runs / run.folder, options.jobs), missing)
        for row in tqdm(rows, total=len(missing), unit="run", disable=None, dynamic_ncols=True):
            record["runs"].append(row)
            host.write(options.out, record)
            draw(record, options.out.with_suffix(".png"))
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
