"""What training runs reached: from their folders to `docs/results/`, and from there into the documents.

`python -m bench.training RUN ...` keeps each evaluated run as NAME.config.yaml, NAME.log.jsonl, NAME.eval.csv and
NAME.run.json, NAME being its folder's, and NAME.samples.png of what it generates, and draws the pictures;
`python -m bench.tables` then writes the tables.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.host import ROOT
from bench.plots import plain
from bench.text import markdown

RESULTS = ROOT / "docs/results"
PICTURE = "cifar10"  # the data set of which there are several runs
PROBES = {("linear", "all"): "linear", ("knn", "all"): "kNN", ("linear", "10/class"): "linear, 10 a class"}
TRAINED, UNTRAINED = "#0072B2", "#999999"
Row = dict[str, str]


class Run:
    """A kept run.

    Args:
        name: of its files.
        folder: where they lie.
    """

    def __init__(self, name: str, folder: Path = RESULTS) -> None:
        self.name, self.folder = name, folder
        self.about: dict[str, Any] = json.loads(self.file("run.json").read_text(encoding="utf-8"))

    def file(self, ending: str) -> Path:
        """One of its files."""
        return self.folder / f"{self.name}.{ending}"

    @cached_property
    def rows(self) -> list[Row]:
        """What its evaluation measured."""
        with self.file("eval.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @property
    def model(self) -> str:
        """The part of its settings that makes the encoder: runs that share it share their untrained encoders."""
        match = re.search(r"^model:\n((?:  .*\n)+)", self.file("config.yaml").read_text(encoding="utf-8"), re.M)
        return f"{self.about['data']} {self.about['title']} {match[1] if match else ''}"

    @property
    def taps(self) -> list[str]:
        """Of its trained rows, in their order."""
        return list(dict.fromkeys(row["tap"] for row in self.rows if row["encoder"] == "trained"))

    def accuracies(self, tap: str, probe: tuple[str, str], encoder: str) -> list[Row]:
        """The rows of the encoders whose name begins so."""
        return [
            row
            for row in self.rows
            if row["encoder"].startswith(encoder) and row["tap"] == tap and (row["probe"], row["labels"]) == probe
        ]


def kept(data: str, folder: Path = RESULTS) -> list[Run]:
    """The kept runs on one data set, in the order in which they were given."""
    runs = [Run(path.name.removesuffix(".run.json"), folder) for path in sorted(folder.glob("*.run.json"))]
    return sorted((run for run in runs if run.about["data"] == data), key=lambda run: int(run.about["order"]))


def untrained(run: Run, tap: str, probe: tuple[str, str]) -> Row | None:
    """The better of its two untrained encoders: its own, or those of a run with the same one."""
    for other in [run, *(other for other in kept(run.about["data"], run.folder) if other.model == run.model)]:
        found = other.accuracies(tap, probe, "random")
        if found:
            return max(found, key=lambda row: float(row["accuracy_pct"]))
    return None


def keep(run_dir: Path, folder: Path = RESULTS) -> Run:
    """Copy what a reader needs to judge a run, after those kept before; paths of this machine stay behind.

    Raises:
        ValueError: a folder without an evaluation.
    """
    if not (run_dir / "eval.json").is_file():
        raise ValueError(f"run: {run_dir} holds no eval.json; evaluate it first: fused-nce eval {run_dir}")
    folder.mkdir(parents=True, exist_ok=True)
    name = run_dir.resolve().name
    result = json.loads((run_dir / "eval.json").read_text(encoding="utf-8"))
    text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    data = result["data_name"]
    orders = {run.name: int(run.about["order"]) for run in kept(data, folder)}
    (folder / f"{name}.config.yaml").write_text(re.sub(r"(?m)^data: .*$", f"data: path/to/{data}", text), "utf-8")
    shutil.copyfile(run_dir / "log.jsonl", folder / f"{name}.log.jsonl")
    shutil.copyfile(run_dir / "eval.csv", folder / f"{name}.eval.csv")
    if (run_dir / "samples.png").exists():  # of a model that generates
        shutil.copyfile(run_dir / "samples.png", folder / f"{name}.samples.png")
    about = {
        "order": orders.get(name, max(orders.values(), default=-1) + 1),
        "data": data,
        "title": result.get("title", result["method"]),  # older evaluations have neither it nor the next three
        "date": result["date"],
        **{key: result.get(key) for key in ("views", "epochs", "parameters")},
        "training": result["training"],
        "environment": result["environment"],
    }
    (folder / f"{name}.run.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    return Run(name, folder)


def budget_table(data: str, folder: Path = RESULTS) -> str:
    """What each run cost."""
    rows = [
        [
            run.name,
            f"{run.about['parameters'] / 1e6:.2f}" if run.about["parameters"] else "–",
            f"{run.about['epochs']} × {run.about['views'] // run.about['epochs']}" if run.about["views"] else "–",
            f"{run.about['training']['steps']:,}",
            f"{run.about['training']['minutes']:.1f}",
            f"{run.about['training']['images_per_s']:.0f}",
            f"{100 * run.about['training']['loss_share']:.1f}",
            str(run.about["environment"]["threads"]),
            str(run.about["environment"]["commit"])[:7],
        ]
        for run in kept(data, folder)
    ]
    seen = "windows/s" if data == "fsdd" else "images/s"
    head = ["run", "encoder, M parameters", "epochs × views", "updates", "minutes", seen, "loss, % of step"]
    return markdown([*head, "threads", "evaluated at"], rows)


def accuracy_table(data: str, folder: Path = RESULTS) -> str:
    """Every run at every tap, beside the better of its untrained encoders."""
    rows = []
    for run in kept(data, folder):
        for tap in run.taps:
            line = [run.name, tap]
            for probe in PROBES:
                found, base = run.accuracies(tap, probe, "trained"), untrained(run, tap, probe)
                line += [f"**{_percent(found[0])}**" if found else "–", _percent(base) if base else "–"]
            rows.append(line)
    head = ["run", "tap", *(text for name in PROBES.values() for text in (name, "untrained"))]
    table = [head, *rows, *_inputs(data, folder)]
    measured = [index for index, column in enumerate(zip(*table, strict=True)) if set(column[1:]) - {"–", ""}]
    lines = [[line[index] for index in measured] for line in table]
    return markdown(lines[0], lines[1:])


def _inputs(data: str, folder: Path) -> list[list[str]]:
    """The inputs themselves as features, from the first run that was compared with them."""
    for run in kept(data, folder):
        others = [row for row in run.rows if not row["encoder"].startswith(("trained", "random"))]
        if others:
            pairs = dict.fromkeys((row["encoder"], row["tap"]) for row in others)
            found = [(name, tap, [run.accuracies(tap, probe, name) for probe in PROBES]) for name, tap in pairs]
            return [
                [n, tap, *(x for r in cells for x in (_percent(r[0]) if r else "–", ""))] for n, tap, cells in found
            ]
    return []


def _percent(row: Row) -> str:
    spread = f" ± {float(row['sd_pct']):.1f}" if row.get("sd_pct") else ""
    return f"{float(row['accuracy_pct']):.1f}{spread}"


def draw(data: str, path: Path, folder: Path = RESULTS) -> None:
    """Each run's best tap beside its untrained encoder, and the loss on the way there."""
    runs = kept(data, folder)
    figure = Figure(figsize=(11, 0.42 * len(runs) + 1.9), dpi=150, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _accuracies(left, runs)
    _losses(right, runs)
    figure.savefig(path)


def _accuracies(ax: Axes, runs: Sequence[Run]) -> None:
    probe = ("linear", "all")
    for y, run in enumerate(reversed(runs)):
        pairs = [(run.accuracies(tap, probe, "trained"), untrained(run, tap, probe)) for tap in run.taps]
        best, base = max(((float(a[0]["accuracy_pct"]), b) for a, b in pairs if a), key=lambda pair: pair[0])
        if base is not None:
            low = float(base["accuracy_pct"])
            ax.plot([low, best], [y, y], color="#CCCCCC", linewidth=2, zorder=1)
            ax.plot(low, y, "o", color=UNTRAINED, markersize=6)
        ax.plot(best, y, "o", color=TRAINED, markersize=8)
        ax.annotate(f"{best:.1f}", (best, y), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8.5)
    ax.set_yticks(range(len(runs)), [run.name for run in reversed(runs)], fontsize=9)
    ax.set_title("Linear probe at the best tap, test accuracy in %", fontsize=10.5, loc="left")
    for name, colour in (("untrained", UNTRAINED), ("trained", TRAINED)):
        ax.plot([], [], "o", color=colour, label=name)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.08), ncols=2)
    ax.margins(x=0.12, y=0.12)
    plain(ax, "x")


def _losses(ax: Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        lines = [json.loads(line) for line in run.file("log.jsonl").read_text(encoding="utf-8").splitlines()]
        points = [(x["step"] / lines[-1]["step"], x.get("nce_minus_chance") or math.nan) for x in lines]
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            ax.plot(*zip(*points, strict=True), linewidth=1.4, label=run.name)
    ax.set_ylim(top=3)  # a first step may lie far above chance
    ax.axhline(0, color="#555555", linewidth=0.8, linestyle="--")
    ax.set_title("NCE minus its chance level, nats", fontsize=10.5, loc="left")
    ax.set_xlabel("share of the training", fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    plain(ax)


def main(argv: Sequence[str] | None = None) -> int:
    """Keep runs and draw."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that `fused-nce eval` has evaluated")
    parser.add_argument("--study", help="keep them in docs/results/STUDY, with tables of their own")
    options = parser.parse_args(argv)
    folder = RESULTS / (options.study or "")
    for run_dir in options.runs:
        print(f"kept {keep(run_dir, folder).name}")
    if options.study is None and kept(PICTURE):
        draw(PICTURE, RESULTS / f"{PICTURE}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
