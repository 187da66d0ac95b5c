"""The evaluation as one HTML file that opens offline: style, charts and images are inside it.

Everything comes from the evaluation's result (what `eval.json` holds), the training log and the figures' data;
nothing here computes an accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from fused_nce.train import plots, runlog
from fused_nce.train.plots import Bar, Series

TRAINED, PIXELS = "trained", "pixels"
COLUMNS = (("linear", "all"), ("knn", "all"), ("linear", "few"), ("knn", "few"))
NAMES = {"linear": "Linear", "knn": "kNN"}


@dataclass
class Figures:
    """What the pictures need beyond the numbers in `eval.json`."""

    points: list[tuple[float, float]] = field(default_factory=list)  # 2-D embedding of some test images
    point_labels: list[int] = field(default_factory=list)
    neighbours: list[list[tuple[str, bool]]] = field(default_factory=list)  # (data URI, right class?), query first


def find(result: dict[str, Any], encoder: str, tap: str, probe: str, labels: str) -> dict[str, Any] | None:
    """The row of `result["probes"]` with these keys, or None."""
    keys = {"encoder": encoder, "tap": tap, "probe": probe, "labels": labels}
    return next((row for row in result["probes"] if all(row[key] == value for key, value in keys.items())), None)


def encoders(result: dict[str, Any], tap: str) -> list[str]:
    """The encoders measured at a tap, in the order of the result (the trained one first)."""
    return list(dict.fromkeys(row["encoder"] for row in result["probes"] if row["tap"] == tap))


def shown(row: dict[str, Any] | None) -> str:
    """`95.2 ± 0.8`, `97.7`, or a dash for what was not measured."""
    if row is None:
        return "–"
    return f"{row['accuracy_pct']:.1f}" + (f" ± {row['sd_pct']:.1f}" if row["sd_pct"] is not None else "")


def heading(result: dict[str, Any], probe: str, labels: str) -> str:
    few = f"{result['labels_per_class']} labels a class"
    return f"{NAMES[probe]}, {few if labels == 'few' else 'all labels'}"


def mebibytes(count: int | None) -> str:
    return "not measurable here" if count is None else f"{count / 2**20:.1f} MiB"


def _tile(value: str, text: str) -> str:
    number, _, unit = value.partition(" ")
    return f'<div class="tile"><b>{escape(number)} <small>{escape(unit)}</small></b><span>{escape(text)}</span></div>'


def _card(title: str, body: str) -> str:
    return f'<div class="card"><h3>{escape(title)}</h3>{body}</div>'


def _tiles(result: dict[str, Any]) -> str:
    tap, cost, speed = result["taps"][0], result["loss_cost"], result["training"]["images_per_s"]
    tiles = []
    for probe, labels in COLUMNS[:3]:
        row = find(result, TRAINED, tap, probe, labels)
        if row is not None:
            tiles.append(_tile(f"{shown(row)} %", f"{heading(result, probe, labels)}, on {tap}"))
    if speed is not None:
        tiles.append(_tile(f"{speed:,.0f} images/s", "in training, median"))
    if cost is not None:
        ratio = cost["naive"]["time_ms"] / cost["fused"]["time_ms"]
        speed_up = f"{ratio:.1f}× faster" if ratio >= 1 else f"{1 / ratio:.1f}× slower"
        tiles.append(_tile(speed_up, "the fused loss beside the naive one"))
        fused, naive = (cost[name]["peak_bytes"] for name in ("fused", "naive"))
        if fused is not None and naive is not None:
            tiles.append(_tile(mebibytes(fused), f"the fused loss at its peak; naive {mebibytes(naive)}"))
    return "".join(tiles)


def _probe_bars(result: dict[str, Any]) -> str:
    tap = result["taps"][0]
    cards = []
    for probe, labels in (("linear", "few"), ("linear", "all")):
        bars = []
        for encoder in [*encoders(result, tap), *encoders(result, PIXELS)]:
            row = find(result, encoder, PIXELS if encoder == "raw pixels" else tap, probe, labels)
            if row is not None:
                color = "var(--series-0)" if encoder == TRAINED else "var(--quiet)"
                bars.append(Bar(encoder, row["accuracy_pct"], row["sd_pct"], color))
        if bars:
            chart = plots.dot_chart(bars, unit="%", high=100.0)
            chance = 100 / len(result["classes"])
            cards.append(_card(f"{heading(result, probe, labels)} ({tap}; chance {chance:.2g} %)", chart))
    return "".join(cards)


def _probe_table(result: dict[str, Any]) -> str:
    columns = [c for c in COLUMNS if any((row["probe"], row["labels"]) == c for row in result["probes"])]
    head = "".join(f"<th>{escape(heading(result, *column))}</th>" for column in columns)
    rows = []
    for tap in dict.fromkeys(row["tap"] for row in result["probes"]):
        width = next(row["width"] for row in result["probes"] if row["tap"] == tap)
        size = f"<small> · {width:,} numbers an image</small>"
        rows.append(f'<tr class="group"><td colspan="{len(columns) + 1}">{escape(tap)}{size}</td></tr>')
        for name in encoders(result, tap):
            cells = "".join(f"<td>{shown(find(result, name, tap, *column))}</td>" for column in columns)
            mark = ' class="ours"' if name == TRAINED else ""
            rows.append(f"<tr{mark}><td>{escape(name)}</td>{cells}</tr>")
    return f"<table><thead><tr><th>accuracy, %</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _curves(result: dict[str, Any], log: list[runlog.Line]) -> str:
    def series(name: str, key: str, color: int, scale: float = 1.0) -> Series:
        x, y = runlog.column(log, "step", key)
        return Series(name, x, [scale * value for value in y], f"var(--series-{color})")

    charts: list[tuple[str, str, tuple[float, float] | None, list[Series]]] = [
        ("NCE minus its chance level (0 = guessing)", "nats", None, [series("NCE − chance", "nce_minus_chance", 0)]),
        (f"Online probes on detached {result['online_tap']} (training images)", "accuracy, %", (0.0, 100.0), [
            series("linear", "linear_acc", 0, 100), series("MLP", "mlp_acc", 1, 100)]),
        ("Loss and its penalty", "nats", None, [series("loss", "loss", 0), series("penalty", "penalty", 1)]),
        ("Positives ranked first", "%", None, [series("top-1", "top1", 2, 100)]),
    ]  # fmt: skip
    cards = []
    for title, unit, limits, lines in charts:
        lines = [line for line in lines if line.x]
        if lines:
            cards.append(_card(title, plots.line_chart(lines, x_label="step", y_label=unit, y_range=limits)))
    return "".join(cards)


def _closer(result: dict[str, Any], figures: Figures) -> str:
    tap = result["taps"][0]
    cards = [_card(f"Confusions of the linear probe on {tap}, all labels", _confusion(result))]
    if figures.points:
        picture = plots.scatter(figures.points, figures.point_labels, result["classes"])
        cards.append(_card(f"{len(figures.points):,} test images by their {tap} (PCA, then t-SNE)", picture))
    return "".join(cards)


def _confusion(result: dict[str, Any]) -> str:
    classes, matrix = result["classes"], result["confusion"]["matrix"]
    if len(classes) <= 100:
        return plots.confusion(matrix, classes)
    worst = sorted(((v, i, j) for i, row in enumerate(matrix) for j, v in enumerate(row) if i != j and v), reverse=True)
    items = "".join(f"<li>{escape(classes[i])} taken for {escape(classes[j])}: {v}</li>" for v, i, j in worst[:20])
    return f"<p>{len(classes):,} classes are too many to draw; the twenty commonest mistakes:</p><ul>{items}</ul>"


def _neighbours(figures: Figures) -> str:
    rows = []
    for row in figures.neighbours:
        (query, _), rest = row[0], row[1:]
        images = "".join(f'<img alt="" src="{uri}"{"" if right else " class=miss"}>' for uri, right in rest)
        rows.append(f'<div><img alt="" class="query" src="{query}"><em>→</em>{images}</div>')
    return "".join(rows)


def _cost(result: dict[str, Any]) -> tuple[str, str, str]:
    """Note, bars and table of the loss beside the naive one."""
    cost = result["loss_cost"]
    if cost is None:
        error = result.get("loss_cost_error")
        return f"Not measured in this evaluation{f': {error}' if error else '.'}", "", ""
    batch = cost["batch"]
    sizes = ", ".join(dict.fromkeys(f"{batch * rows} × {batch} × {columns}" for rows, columns in cost["terms"]))
    terms = f"{len(cost['terms'])} terms, scores {sizes}, D = {cost['width']}"
    threads = "1 thread" if cost["threads"] == 1 else f"{cost['threads']} threads"
    note = (
        f"One step's loss, forward and both gradients, on random {cost['dtype']} features of the run's own shapes "
        f"({terms}), in a process of its own with {threads}, the two in turn, median of "
        f"{cost['repeats']}. Naive: the whole score tensor in eager torch. Memory: the rise of the process's "
        "high-water mark above the inputs and their gradients."
    )
    colors = {"fused": "var(--series-0)", "naive": "var(--quiet)"}
    times = [Bar(name, cost[name]["time_ms"], None, color) for name, color in colors.items()]
    bars = _card("Time a step", plots.bar_chart(times, unit="ms"))
    if all(cost[name]["peak_bytes"] is not None for name in colors):
        peaks = [Bar(name, cost[name]["peak_bytes"] / 2**20, None, color) for name, color in colors.items()]
        bars += _card("Peak memory", plots.bar_chart(peaks, unit="MiB"))
    rows = "".join(
        f"<tr{' class=ours' if name == 'fused' else ''}><td>{name}</td><td>{cost[name]['time_ms']:.1f}</td>"
        f"<td>{' – '.join(f'{value:.1f}' for value in cost[name]['quartiles_ms'])}</td>"
        f"<td>{mebibytes(cost[name]['peak_bytes'])}</td><td>{cost[name]['loss']:.4f}</td></tr>"
        for name in colors
    )
    head = "<th>loss</th><th>ms a step</th><th>quartiles</th><th>peak memory</th><th>value</th>"
    return note, bars, f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def render(result: dict[str, Any], log: list[runlog.Line], config_text: str, figures: Figures) -> str:
    """The page.

    Args:
        result: what `eval.json` holds.
        log: the lines of the run's `log.jsonl`.
        config_text: the resolved configuration, as YAML.
        figures: embedding and neighbour pictures; empty ones are left out.
    """
    training, splits = result["training"], result["splits"]
    cost_note, cost_bars, cost_table = _cost(result)
    share = training["loss_share"]
    note = f"{training['steps']:,} steps in {training['minutes']:.1f} minutes"
    note += f"; the loss took {100 * share:.1f} % of a step (median)" if share is not None else ""
    note += f"; {training['skipped']:,} updates were skipped (not finite)" if training.get("skipped") else ""
    note += f"; {training['damaged']:,} images could not be read" if training.get("damaged") else ""
    template = Template(Path(__file__).with_name("report_template.html").read_text())
    return template.substitute(
        title=escape(f"{result['method'].upper()} on {result['data_name']}"),
        subtitle=escape(f"Run {result['run']} · {result['date']} · fused_nce {result['environment']['fused_nce']}"),
        tiles=_tiles(result),
        probes_note=escape(
            f"Accuracy on {splits['test']:,} test images of probes fitted on frozen features of {splits['probe']:,} "
            f"labelled images. With {result['labels_per_class']} labels a class: mean ± standard deviation of "
            f"{result['draws']} draws."
        ),
        bars=_probe_bars(result),
        probe_table=_probe_table(result),
        training_note=escape(f"{note}."),
        curves=_curves(result, log),
        closer_note="None of these images was seen in pre-training or by a probe.",
        closer=_closer(result, figures),
        neighbours_note=escape(
            f"A test image (dark line) and the labelled images nearest to it by cosine on {result['taps'][0]}: "
            "green for its own class, orange for another."
        ),
        neighbours=_neighbours(figures),
        cost_note=escape(cost_note),
        cost_bars=cost_bars,
        cost_table=cost_table,
        protocol="".join(f"<li>{escape(line)}</li>" for line in result["protocol"]),
        environment="".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in result["environment"].items()),
        config=escape(config_text),
    )
