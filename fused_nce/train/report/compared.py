"""The page of `fused-nce compare`: one HTML file that opens offline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fused_nce.train.report import evaluated, page, plots, runlog
from fused_nce.train.report.page import Card, Row, Table, small
from fused_nce.train.report.plots import Bar, Series

COLORS = 10  # that the style has, used in turn
NAME_LENGTH = 20  # that the charts have room for
MAX_CHARTS = 4
SKIPPED = ("run.", "method")  # settings that change no number, and one that the table above shows

Column = tuple[str, str]


@dataclass(frozen=True)
class Run:
    """An evaluated run.

    Attributes:
        name: of its folder; the path, where two folders have one name.
        result: what its `eval.json` holds.
        log: of its training.
        settings: dotted keys.
    """

    name: str
    result: dict[str, Any]
    log: list[runlog.Line]
    settings: dict[str, Any]


def count(runs: list[Run]) -> str:
    """In words."""
    return f"{len(runs)} run{'' if len(runs) == 1 else 's'}"


def render(runs: list[Run]) -> str:
    """The page of runs that were evaluated on one data set."""
    results = [run.result for run in runs]
    columns = _union(evaluated.columns(result) for result in results)
    return page.fill(
        "compare.html",
        title=f"{count(runs)} on {results[0]['data_name']}",
        subtitle=", ".join(run.name for run in runs),
        probes_note=_note(results),
        bars=_bars(runs, columns),
        probes=_probe_table(runs, columns),
        curves=_curves(runs),
        training=_training_table(runs),
        settings=_settings(runs),
        protocol=_union(result["protocol"] for result in results),
    )


def _union(lists: Iterable[list[Any]]) -> list[Any]:
    return list(dict.fromkeys(item for one in lists for item in one))


def _note(results: list[dict[str, Any]]) -> str:
    """Caption of the accuracies, and a warning if the runs were evaluated on other images or draws."""
    keys = ("splits", "labels", "labels_per_class", "draws", "tasks", "seed", "leave_out_unseen")
    lines = [
        f"Accuracy on the test images of {results[0]['data_name']}, each run at its own taps; charts at its first. The "
        "best trained encoder of a column is bold; below each run's tap, the better of its untrained encoders."
    ]
    differing = [key for key in keys if len({str(result.get(key) or None) for result in results}) > 1]
    if len({str(how) for result in results if (how := _drawn(result))}) > 1:
        differing.append("how labels were drawn")
    if differing:
        lines.append(f"Beware: the evaluations differ in {', '.join(differing)}; evaluate the runs alike.")
    return " ".join(lines)


def _drawn(result: dict[str, Any]) -> Any:
    """What its draws hang on beside those settings; nothing where it has none.

    Earlier versions, which do not name theirs, drew all from one generator, so that each draw hung on what was asked.
    """
    asked = [name for name in ("few", "few-shot", "fine-tune") if name in result.get("protocols", ())]
    return asked and result.get("draws_version", asked)


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else "…" + name[1 - NAME_LENGTH :]


def _color(index: int) -> str:
    return f"var(--series-{index % COLORS})"


def _pixels(runs: list[Run], column: Column) -> dict[str, Any] | None:
    rows = (evaluated.find(run.result, "raw pixels", evaluated.PIXELS, *column) for run in runs)
    return next((row for row in rows if row is not None), None)


def _bars(runs: list[Run], columns: list[Column]) -> list[Card]:
    cards = []
    for column in columns[:MAX_CHARTS]:
        bars = []
        for index, run in enumerate(runs):
            row = evaluated.find(run.result, evaluated.TRAINED, run.result["taps"][0], *column)
            if row is not None:
                bars.append(Bar(_short(run.name), row["accuracy_pct"], evaluated.spread(row), _color(index)))
        pixels = _pixels(runs, column)
        if pixels is not None:
            bars.append(Bar("raw pixels", pixels["accuracy_pct"], evaluated.spread(pixels), "var(--quiet)"))
        if bars:
            cards.append(Card(evaluated.heading(*column), plots.dot_chart(bars, unit="%", high=100.0)))
    return cards


def _probe_table(runs: list[Run], columns: list[Column]) -> Table:
    best: dict[Column, float] = {}
    for column in columns:
        found = [row for run in runs for row in run.result["probes"] if (row["probe"], row["labels"]) == column]
        best[column] = max((row["accuracy_pct"] for row in found if row["encoder"] == evaluated.TRAINED), default=-1.0)

    def cell(row: dict[str, Any] | None, column: Column) -> str:
        text = evaluated.shown(row)
        return Markup("<b>{}</b>").format(text) if row is not None and row["accuracy_pct"] == best[column] else text

    rows: list[Row] = []
    for run in runs:
        rows.append(Row([small(run.name, f" · {run.result['method']}")]))
        for tap in run.result["taps"]:
            found = [evaluated.find(run.result, evaluated.TRAINED, tap, *column) for column in columns]
            rows.append(Row([tap, *(cell(row, column) for row, column in zip(found, columns, strict=True))]))
            bare = [_untrained(run.result, tap, column) for column in columns]
            if any(bare):
                rows.append(Row([small("", text) for text in ("untrained", *map(evaluated.shown, bare))]))
    pixels = [_pixels(runs, column) for column in columns]
    if any(pixels):
        rows += [Row(["raw pixels"]), Row(["pixels", *map(evaluated.shown, pixels)])]
    return Table(["accuracy, %", *(evaluated.heading(*column) for column in columns)], rows)


def _untrained(result: dict[str, Any], tap: str, column: Column) -> dict[str, Any] | None:
    names = [name for name in evaluated.encoders(result, tap) if name != evaluated.TRAINED]
    rows = [row for name in names if (row := evaluated.find(result, name, tap, *column)) is not None]
    return max(rows, key=lambda row: row["accuracy_pct"], default=None)


def _curves(runs: list[Run]) -> list[Card]:
    charts = (
        ("Online linear probe (training images)", "accuracy, %", (0.0, 100.0), "linear_acc", 100.0),
        ("NCE minus its chance level (0 = guessing)", "nats", None, "nce_minus_chance", 1.0),
    )
    cards = []
    for title, unit, limits, key, scale in charts:
        lines = []
        for index, run in enumerate(runs):
            x, y = runlog.column(run.log, "time_s", key)
            name, color = _short(run.name), _color(index)
            lines.append(Series(name, [value / 60 for value in x], [scale * value for value in y], color))
        lines = [line for line in lines if line.x]
        if lines:
            chart = plots.line_chart(lines, x_label="minutes", y_label=unit, y_range=limits)
            cards.append(Card(title, chart))
    return cards


def _training_table(runs: list[Run]) -> Table:
    rows = []
    for run in runs:
        training, host = run.result["training"], run.result["environment"]
        speed, peak = training["images_per_s"], training["peak_memory_mb"]
        rows.append(Row([
            run.name,
            run.result["method"],
            run.result.get("trained_on", run.result["data_name"]),
            f"{training['steps']:,}",
            f"{training['minutes']:.1f}",
            "–" if speed is None else f"{speed:,.0f}",
            "–" if peak is None else f"{peak:,.0f}",
            f"{host.get('processor', '–')}, {host.get('device', 'CPU')}",
        ]))  # fmt: skip
    return Table(["run", "method", "trained on", "updates", "minutes", "images/s", "peak MB", "evaluated on"], rows)


def _settings(runs: list[Run]) -> Table:
    rows = []
    for key in _union(list(run.settings) for run in runs):
        values = [str(run.settings.get(key, "–")) for run in runs]
        if not key.startswith(SKIPPED) and any(value != values[0] for value in values):
            rows.append(Row([key, *values]))
    return Table(["setting", *(run.name for run in runs)], rows)
