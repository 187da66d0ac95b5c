"""Pictures of a GPU record: time and peak memory of every problem, and our backends over the width.

`python -m bench.gpu.plots FILE.json` draws again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.gpu import problems
from bench.gpu.verdict import backends_ms, time_ms
from bench.plots import DPI, STYLES, Style, milliseconds

Record = dict[str, Any]
GREY = "#555555"
LABELS = {"bound": "the least GEMMs"}
BACKENDS = {
    "triton": Style("triton", "#009E73", "D"),
    "cuda": Style("cuda", "#0072B2", "o"),
    "cpu": Style("cpu", "#0072B2", "o"),
    "chunked": STYLES["chunked"],
}


def draw(record: Record, path: Path) -> list[Path]:
    """Write the pictures beside a JSON.

    Args:
        record: the JSON's content.
        path: the JSON; the pictures take its stem.

    Returns:
        The files written; a picture without anything to show is left out.
    """
    clock = record["clock"]
    sweep = [row for row in record["cases"] if row["role"] == problems.SWEEP]
    table = [row for row in record["cases"] if row["role"] != problems.SWEEP]
    files = []
    figure = _dots(table, "Time of loss and gradients", ("naive", "compile", "ours", "bound"), milliseconds,
                   lambda row, name: time_ms(row, name, clock))  # fmt: skip
    files += _save(figure, record, path, "time")
    figure = _dots(table, "Peak memory above inputs and gradients", ("naive", "compile", "ours"), _megabytes,
                   lambda row, name: row["rivals"].get(name, {}).get("peak_memory_mb"))  # fmt: skip
    files += _save(figure, record, path, "memory")
    return files + _save(_widths(sweep, clock), record, path, "crossover")


def _dots(
    rows: list[Record],
    title: str,
    names: tuple[str, ...],
    tick: Callable[[float, int], str],
    value: Callable[[Record, str], float | None],
) -> Figure | None:
    """One line a problem, one dot a rival, on a logarithmic axis."""
    figure = Figure(figsize=(8.0, 1.6 + 0.36 * len(rows)), dpi=DPI, facecolor="white", layout="constrained")
    ax = figure.subplots()
    shown = False
    for name in names:
        points = [(x, y) for y, row in enumerate(rows) if (x := value(row, name)) is not None and x > 0]
        if points:
            style = STYLES[name]
            marker = style.marker or "|"
            ax.plot(
                *zip(*points, strict=True),
                marker,
                color=style.colour,
                markersize=8,
                label=LABELS.get(name, style.label),
            )
            shown = True
    if not shown:
        return None
    ax.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8.5)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(tick))
    ax.set_title(title, fontsize=10.5, loc="left")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(names), fontsize=8.5, frameon=False)
    _decorate(ax)
    return figure


def _widths(rows: list[Record], clock: str) -> Figure | None:
    """Each backend's time over the width, at one shape."""
    if len({row["d"] for row in rows}) < 2:
        return None
    rows = sorted(rows, key=lambda row: int(row["d"]))
    figure = Figure(figsize=(6.0, 4.2), dpi=DPI, facecolor="white", layout="constrained")
    ax = figure.subplots()
    for name, style in BACKENDS.items():
        points = [(row["d"], backends_ms(row, clock)[name]) for row in rows if name in backends_ms(row, clock)]
        if points:
            ax.plot(*zip(*points, strict=True), "-", marker=style.marker, color=style.colour, label=style.label)
    floor = [(row["d"], ms) for row in rows if (ms := time_ms(row, "bound", clock)) is not None]
    if floor:
        ax.plot(*zip(*floor, strict=True), "--", color=GREY, label=LABELS["bound"])
    ax.set_title(f"AMDIM, {rows[0]['n']} × {rows[0]['m']} scores: our backends", fontsize=10.5, loc="left")
    ax.set_xlabel("width D", fontsize=9)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(FixedLocator([float(row["d"]) for row in rows]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(milliseconds))
    ax.legend(fontsize=8.5, frameon=False)
    _decorate(ax)
    return figure


def _decorate(ax: Axes) -> None:
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8.5)
    ax.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure | None, record: Record, path: Path, name: str) -> list[Path]:
    if figure is None:
        return []
    figure.supxlabel(f"{record['card']['name']}, bfloat16, {record['date_utc'][:10]}", fontsize=8, color=GREY)
    file = path.with_name(f"{path.stem}-{name}.png")
    figure.savefig(file)
    return [file]


def _megabytes(value: float, _: int) -> str:
    return f"{value / 1000:g} GB" if value >= 1000 else f"{value:g} MB"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        source = Path(argument)
        for file in draw(json.loads(source.read_text(encoding="utf-8")), source):
            print(f"wrote {file}")
