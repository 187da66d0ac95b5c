"""`python -m bench.premise --data CIFAR10`: does an encoder learn more from more negatives, all else equal?

Every run of a method makes as many updates, each of the same number of images; what differs is how many of these a loss
compares: the rest of an update is other losses, accumulated. MoCo's batch stays as it is, and its queue grows. Each is
trained by `fused-nce train` and judged by `fused-nce eval`, from several seeds. A study goes on where it stopped:
finished runs in `--runs` are kept. After each run `docs/results/premise.json` and its picture are written anew, and
`python -m bench.tables` has the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from tqdm import tqdm

from bench import host
from bench.text import markdown

matplotlib.use("Agg")

RECORD = host.ROOT / "docs/results/premise.json"
IMAGES = 512  # of an update
TRAINING = 50_000  # CIFAR-10's
PART = 128  # that an encoder sees at a time where the loss's images can come in parts: of BatchNorm's statistics
PROBES = {"knn": "kNN-200", "linear": "linear"}
JUDGED = ("--protocols=knn,linear", "--baselines=false", "--cost=false")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # of Okabe and Ito
Row = dict[str, Any]


class Arm(NamedTuple):
    """A method, its numbers of negatives, and the options that give it one."""

    label: str
    method: str
    counts: tuple[int, ...]
    tap: str
    options: tuple[str, ...] = ()
    in_parts: bool = False
    queue: bool = False

    def arguments(self, negatives: int) -> list[str]:
        """Of `fused-nce train`."""
        compared = PART if self.queue else negatives
        seen = min(PART, compared) if self.in_parts else compared
        found = [*self.options, f"--optim.batch_size={seen}", f"--optim.accumulate={IMAGES // compared}"]
        if seen < compared:
            found.append(f"--scale.negatives={compared}")
        return [*found, f"--model.queue_size={negatives}"] if self.queue else found


IN_BATCH = (16, 64, 256, 512)
ARMS = {
    "amdim": Arm("AMDIM", "amdim", IN_BATCH, "f1", in_parts=True),
    "dim-nce": Arm("DIM, infoNCE", "dim", IN_BATCH, "fc", ("--loss.estimator=nce",)),
    "dim-jsd": Arm("DIM, JSD", "dim", IN_BATCH, "fc", ("--loss.estimator=jsd",)),
    "moco": Arm("MoCo, queue", "moco", (16, 128, 1024, 8192), "h", queue=True),
}


def command(name: str, negatives: int, seed: int, data: str, epochs: int, run: Path) -> list[str]:
    """What trains one run: as many updates as a pass has that compares all its images."""
    arm, updates = ARMS[name], epochs * (TRAINING // IMAGES)
    shared = [f"--data={data}", "--preset=cifar10-tiny", f"--optim.epochs={epochs}", f"--seed={seed}", f"--out={run}"]
    shared += [f"--max-steps={updates}", "--overwrite"]  # what a run left that was stopped before its first checkpoint
    quiet = ["--optim.warmup_updates=20", "--run.tensorboard=false"]
    return ["train", arm.method, *shared, *quiet, *arm.arguments(negatives)]


def run_one(name: str, negatives: int, seed: int, data: str, epochs: int, run: Path) -> Row:
    """Train and judge what of it is not done yet; the row of the record."""
    program = [sys.executable, "-m", "fused_nce.cli"]
    judged = run / "eval.json"
    if not judged.exists():
        resume = any((run / "checkpoints").glob("step_*"))
        train = ["train", "--resume", str(run)] if resume else command(name, negatives, seed, data, epochs, run)
        evaluate = ["eval", str(run), *JUDGED, f"--taps={ARMS[name].tap}"]
        for arguments in (train, evaluate):
            subprocess.run([*program, *arguments], check=True, stdout=subprocess.DEVNULL)
    found = json.loads(judged.read_text(encoding="utf-8"))
    accuracies = {row["probe"]: round(row["accuracy_pct"], 2) for row in found["probes"] if row["labels"] == "all"}
    training = found["training"]
    return {
        "arm": name, "negatives": negatives, "seed": seed, "updates": training["steps"], "images": IMAGES,
        "minutes": round(training["minutes"], 2), **{probe: accuracies[probe] for probe in PROBES},
    }  # fmt: skip


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Standard deviation of the seeds; None of a single one."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def grouped(rows: Iterable[Row]) -> dict[str, dict[int, list[Row]]]:
    """Arm → negatives → its seeds."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: (list(ARMS).index(row["arm"]), row["negatives"], row["seed"])):
        found.setdefault(row["arm"], {}).setdefault(row["negatives"], []).append(row)
    return found


def table(record: dict[str, Any]) -> str:
    """Of a record, and how it was made."""
    rows = []
    for arm, counts in grouped(record["runs"]).items():
        for negatives, seeds in counts.items():
            cells = [mean_and_spread([row[probe] for row in seeds]) for probe in PROBES]
            shown = [f"{mean:.1f}" + ("" if sd is None else f" ± {sd:.1f}") for mean, sd in cells]
            rows.append([ARMS[arm].label, f"{negatives:,}", *shown, str(len(seeds))])
    head = ["method", "images compared, or the queue", *(f"{label}, %" for label in PROBES.values()), "seeds"]
    steps = sorted({row["updates"] for row in record["runs"]})
    made = (
        f"CIFAR-10, `cifar10-tiny`, {' or '.join(map(str, steps))} updates of {IMAGES} images; mean ± standard "
        f"deviation of the seeds. {record['host']['cpu_model']}; torch {record['versions']['torch']}; commit "
        f"{record['code']['commit'][:7]}."
    )
    return f"{markdown(head, rows)}\n\n{made}"


def block(path: Path = RECORD) -> str:
    """What the documents show."""
    if not path.exists():
        return "No record is committed yet: `python -m bench.premise` makes one."
    return table(json.loads(path.read_text(encoding="utf-8")))


def draw(record: dict[str, Any], path: Path) -> None:
    """Accuracy against the number of negatives: each seed a point, the means a line."""
    figure = Figure(figsize=(10, 4), dpi=150, facecolor="white", layout="constrained")
    for ax, (probe, label) in zip(figure.subplots(1, 2), PROBES.items(), strict=True):
        for (arm, counts), colour in zip(grouped(record["runs"]).items(), COLOURS, strict=False):
            means = [statistics.mean(row[probe] for row in seeds) for seeds in counts.values()]
            ax.plot(list(counts), means, "-", color=colour, linewidth=1.5, label=ARMS[arm].label)
            points = [(negatives, row[probe]) for negatives, seeds in counts.items() for row in seeds]
            ax.plot(*zip(*points, strict=True), "o", color=colour, markersize=4, alpha=0.6)
        ax.set_xscale("log", base=2)
        ax.set_title(f"{label}, test accuracy in %", fontsize=10, loc="left")
        ax.set_xlabel("images compared in one loss; MoCo: keys of the queue", fontsize=9)
        ax.grid(True, color="#DDDDDD", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and write the record and the picture after each run."""
    parser = argparse.ArgumentParser(prog="python -m bench.premise", description=__doc__)
    parser.add_argument("--data", required=True, help="CIFAR-10 as shards or folders")
    parser.add_argument("--runs", type=Path, default=host.ROOT / "runs/premise", help="where runs are kept")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--negatives", nargs="+", type=int, help="these alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RECORD, help="JSON; the picture lies beside it")
    options = parser.parse_args(argv)
    wanted = [
        (name, negatives, seed)
        for seed in range(options.seeds)
        for name in options.arms
        for negatives in ARMS[name].counts
        if options.negatives is None or negatives in options.negatives
    ]
    record: dict[str, Any] = {"code": host.commit(), "host": host.facts(), "versions": host.versions(), "runs": []}
    for name, negatives, seed in tqdm(wanted, unit="run", disable=None, dynamic_ncols=True):
        run = options.runs / f"{name}-{negatives}-{seed}-epochs-{options.epochs}"
        record["runs"].append(run_one(name, negatives, seed, options.data, options.epochs, run))
        part = options.out.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        part.replace(options.out)
        draw(record, options.out.with_suffix(".png"))
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
