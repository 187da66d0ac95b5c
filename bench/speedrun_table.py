"""The table and the picture of the speedrun's entries, which `python -m bench.speedrun` makes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench import host
from bench.text import markdown, number

ENTRIES = host.ROOT / "docs/results/speedrun"
PROBES = {"knn": "kNN-200", "linear": "linear"}
REFERENCE_GFLOP_PER_S = 850.0  # bf16, of the two Zen 5 cores that the classes of minutes were set on
RATES = ("bf16", "fp32")
OPEN = ("seed", "preset", "data", "run")  # what entries of one row may differ in
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # of Okabe and Ito
MARKERS = "os^Dvp"
Entry = dict[str, Any]


def entries(folder: Path = ENTRIES) -> dict[str, Entry]:
    """Name → entry, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def scaled_s(entry: Entry) -> float | None:
    """Seconds that its arithmetic would take at the reference's matrix rate; None where its host's is not known."""
    rates = [rate for name in RATES if (rate := (entry["matrix_gflop_per_s"] or {}).get(name)) is not None]
    return float(entry["seconds"]) * max(rates) / REFERENCE_GFLOP_PER_S if rates else None


def counted_s(entry: Entry) -> float:
    """The seconds that the limit holds for: on the clock, or scaled where the host is slower than the reference."""
    return min(float(entry["seconds"]), scaled_s(entry) or float("inf"))


def grouped(found: dict[str, Entry]) -> list[dict[str, Entry]]:
    """Entries within the rules that differ in their seed alone, by minutes and accuracy."""
    groups: dict[str, dict[str, Entry]] = {}
    for name, entry in found.items():
        if not entry["outside"]:
            settings = {key: value for key, value in entry["config"].items() if key not in OPEN}
            key = json.dumps([entry["minutes_allowed"], settings, entry["host"]["processor"]], sort_keys=True)
            groups.setdefault(key, {})[name] = entry
    return sorted(groups.values(), key=lambda group: (_of(group)["minutes_allowed"], -_mean(group, "knn")))


def _of(group: dict[str, Entry]) -> Entry:
    return next(iter(group.values()))


def _mean(group: dict[str, Entry], probe: str) -> float:
    """At the best tap."""
    return max(statistics.mean(values) for values in _by_tap(group.values(), probe).values())


def _by_tap(found: Iterable[Entry], probe: str) -> dict[str, list[float]]:
    taps: dict[str, list[float]] = {}
    for entry in found:
        for tap, accuracies in entry["accuracy_pct"].items():
            taps.setdefault(tap, []).append(accuracies[probe])
    return taps


def spread(values: Sequence[float]) -> str:
    """One value, or the mean ± standard deviation and the best."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f} (best {max(values):.1f})"


def _minutes(seconds: Iterable[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    return f"{statistics.mean(known) / 60:.1f}" if known else "–"


def _host(entry: Entry) -> str:
    machine, found = entry["host"], entry["matrix_gflop_per_s"] or {}
    rates = [f"{name} {number(found[name])} GFLOP/s" for name in RATES if found.get(name) is not None]
    text = f"{machine['processor']}, {machine['instruction set']}, torch {machine['torch']}"
    return f"{text}: {', '.join(rates) or 'its matrix rate could not be measured when it was entered'}"


def block(folder: Path = ENTRIES) -> str:
    """What the documents show."""
    found = entries(folder)
    if not found:
        return "No entry is committed yet: `python -m bench.speedrun` makes one."
    rows, hosts = [], dict[str, list[str]]()
    for group in grouped(found):
        first = _of(group)
        links = [
            f"[{name if len(group) == 1 else 'seed ' + str(entry['seed'])}](results/speedrun/{name}.json)"
            for name, entry in group.items()
        ]
        for name, entry in group.items():
            hosts.setdefault(_host(entry), []).append(name)
        for tap in first["accuracy_pct"]:
            rows.append([
                str(first["minutes_allowed"]), first["method"], first["config"]["optim"]["name"],
                str(first["epochs"]), tap,
                *(spread(_by_tap(group.values(), probe)[tap]) for probe in PROBES),
                _minutes(entry["seconds"] for entry in group.values()), _minutes(map(scaled_s, group.values())),
                ", ".join(links),
            ])  # fmt: skip
    head = [
        "minutes allowed",
        "method",
        "optimizer",
        "epochs",
        "tap",
        *(f"{label}, %" for label in PROBES.values()),
        "minutes taken",
    ]
    parts = [markdown([*head, "at the reference's rate", "entries"], rows)]
    whose = {machine: f" ({', '.join(names)})" if len(hosts) > 1 else "" for machine, names in hosts.items()}
    parts += ["\n".join(f"- {machine}{names}." for machine, names in whose.items())]
    if given := [name for name, entry in found.items() if entry["clock"] == "given" and not entry["outside"]]:
        parts[-1] += f"\n- The clock was given by hand, not measured: {', '.join(given)}."
    if (picture := folder.with_suffix(".png")).exists():
        parts.append(f"![Accuracy against minutes](results/{picture.name})")
    left = {name: "; ".join(entry["outside"]) for name, entry in found.items() if entry["outside"]}
    lines = [f"- [{name}](results/speedrun/{name}.json): {why}." for name, why in left.items()]
    return "\n\n".join(parts + (["Entered, and outside the rules:", "\n".join(lines)] if left else []))


def draw(folder: Path = ENTRIES) -> Path | None:
    """Accuracy against minutes, `speedrun.png` beside the folder, once there are two entries within the rules."""
    groups = grouped(entries(folder))
    if sum(map(len, groups)) < 2:
        return None
    lines: dict[tuple[str, str], list[dict[str, Entry]]] = {}
    for group in groups:
        first = _of(group)
        for tap in first["accuracy_pct"]:
            lines.setdefault((f"{first['method']}, {first['config']['optim']['name']}", tap), []).append(group)
    figure = Figure(figsize=(10, 4), dpi=150, facecolor="white", layout="constrained")
    for ax, (probe, label) in zip(figure.subplots(1, 2, sharey=True), PROBES.items(), strict=True):
        for index, ((method, tap), members) in enumerate(lines.items()):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            runs = [[(e["seconds"] / 60, e["accuracy_pct"][tap][probe]) for e in group.values()] for group in members]
            means = sorted(tuple(map(statistics.mean, zip(*points, strict=True))) for points in runs)
            ax.plot(*zip(*means, strict=True), color=colour, linewidth=1.2)
            ax.plot(*zip(*chain(*runs), strict=True), marker, color=colour, markersize=6, label=f"{method}, {tap}")
        ax.set_title(f"{label}, test accuracy in %", fontsize=10, loc="left")
        ax.set_xlabel("minutes from the start of the process to the saved encoder", fontsize=9)
        ax.set_xlim(0, 1.05 * ax.dataLim.xmax)
        ax.grid(True, color="#DDDDDD", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8, frameon=False, loc="lower left")
    path = folder.with_suffix(".png")
    figure.savefig(path)
    return path
