"""Time and peak memory against batch size, drawn from a results JSON. `python -m bench.plots FILE.json` draws again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.rivals import RIVALS
from bench.verdict import time_ms

DPI = 150
Row = dict[str, Any]


class Style(NamedTuple):
    """A rival's line: colours of Okabe and Ito, told apart by marker and dash as well."""

    label: str
    colour: str
    marker: str
    dash: str = "-"
    width: float = 1.8


STYLES = {
    "naive": Style("eager torch", "#D55E00", "s"),
    "compile": Style("torch.compile", "#CC79A7", "^"),
    "chunked": Style("fused_nce, plain torch", "#56B4E9", "D"),
    "ours": Style("fused_nce", "#0072B2", "o", width=2.8),
    "bound": Style("three bare GEMMs", "#555555", "", "--"),
}


def draw(record: Row, path: Path) -> list[Path]:
    """Write the pictures beside a JSON: time, memory, and both side by side for the narrowest width.

    Args:
        record: the JSON's content.
        path: the JSON; the pictures take its stem.

    Returns:
        The files written; none where no width was measured at two or more batch sizes.
    """
    widths = [d for d in sorted({row["d"] for row in record["cases"]}) if len(_sweep(record, d)) >= 3]
    if not widths:
        return []
    pictures = {
        "time": [(_time, d) for d in widths],
        "memory": [(_memory, d) for d in widths],
        "overview": [(_memory, widths[0]), (_time, widths[0])],
    }
    files = []
    for name, panels in pictures.items():
        figure = Figure(figsize=(5.2 * len(panels), 4.2), dpi=DPI, facecolor="white", layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (panel, d) in zip(axes, panels, strict=True):
            panel(ax, record, d)
        host = record["host"]
        figure.supxlabel(
            f"{host['cpu_model']}, {host['cores']} cores, float32; loss and both gradients, "
            f"{_sweep(record, widths[0])[0]['n_c']} locations an image",
            fontsize=8,
            color="#555555",
        )
        files.append(path.with_name(f"{path.stem}-{name}.png"))
        figure.savefig(files[-1])
    return files


def _sweep(record: Row, d: int) -> list[Row]:
    rows = [row for row in record["cases"] if row["d"] == d and row["dtype"] == "float32"]
    return sorted(rows, key=lambda row: int(row["n_a"]))


def _time(ax: Axes, record: Row, d: int) -> None:
    _lines(ax, record, d, lambda row, name: time_ms(row, name), "bound")
    _decorate(ax, record, d, "Time of one step's loss", milliseconds)


def _memory(ax: Axes, record: Row, d: int) -> None:
    _lines(ax, record, d, lambda row, name: float(row["rivals"][name]["peak_memory_mib"]))
    _decorate(ax, record, d, "Peak memory above inputs and gradients", _bytes)


def _lines(ax: Axes, record: Row, d: int, value: Callable[[Row, str], float], *extra: str) -> None:
    """One line a rival, its name at its right end, where a legend would have to be looked up."""
    rows = _sweep(record, d)
    ends = []
    for name in [name for name in RIVALS if all(name in row["rivals"] for row in rows)] + list(extra):
        style = STYLES[name]
        x, y = [row["n_a"] for row in rows], [value(row, name) for row in rows]
        ax.plot(x, y, style.dash, color=style.colour, marker=style.marker, markersize=5, linewidth=style.width)
        ends.append((y[-1], x[-1], style))
    ax.set(xscale="log", yscale="log")
    low, high = ax.get_ylim()
    gap = (high / low) ** 0.055  # labels closer than this would overlap
    previous: float = 0.0
    for end, x_end, style in sorted(ends, key=lambda item: item[0]):
        previous = max(end, previous * gap)
        ax.annotate(
            style.label,
            (x_end, previous),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=style.colour,
            fontsize=8.5,
            fontweight="bold" if style.width > 2 else "normal",
            annotation_clip=False,
        )
    ax.set_ylim(low, max(high, previous * gap))  # the topmost name stays below the title


def _decorate(ax: Axes, record: Row, d: int, title: str, tick: Callable[[float, int], str]) -> None:
    batches = [row["n_a"] for row in _sweep(record, d)]
    ax.set_title(f"{title} (width {d})", fontsize=10.5, loc="left")
    ax.set_xlabel("images in the batch", fontsize=9)
    ax.set_xlim(batches[0] / 1.15, batches[-1] * 2.9)  # room for the names
    ax.xaxis.set_major_locator(FixedLocator([float(b) for b in batches]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(tick))
    plain(ax)


def plain(ax: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """A light grid behind the data, small ticks, no frame."""
    ax.grid(True, axis=grid, color="#DDDDDD", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8.5)
    ax.spines[["top", "right"]].set_visible(False)


def milliseconds(value: float, _: int) -> str:
    """An axis label."""
    return f"{value / 1000:g} s" if value >= 1000 else f"{value:g} ms"


def _bytes(value: float, _: int) -> str:
    return f"{value / 1024:.3g} GiB" if value >= 1024 else f"{value:g} MiB"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        source = Path(argument)
        for file in draw(json.loads(source.read_text(encoding="utf-8")), source):
            print(f"wrote {file}")
