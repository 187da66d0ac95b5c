"""The evaluation as one HTML file that opens offline: style, charts and images are inside it.

Everything comes from the evaluation's result (what `eval.json` holds), the training log and the figures' data;
nothing here computes an accuracy.
"""

from __future__ import annotations

from html import escape
from typing import Any

from fused_nce.train.evaluation.figures import Figures
from fused_nce.train.evaluation.scoring import PIXELS, TRAINED
from fused_nce.train.report import page, plots, runlog
from fused_nce.train.report.plots import Bar, Series

NAMES = {
    "linear": "Linear", "knn": "kNN", "sgd": "Linear, SGD", "svm": "Linear SVM", "mlp": "MLP",
    "prototype": "Prototype", "logistic": "Logistic", "fine-tune": "Fine-tuned", "ms-ssim": "MS-SSIM", "mine": "MINE",
    "ndm": "NDM",
}  # fmt: skip


def find(result: dict[str, Any], encoder: str, tap: str, probe: str, labels: str) -> dict[str, Any] | None:
    """The row of `result["probes"]` with these keys, or None."""
    keys = {"encoder": encoder, "tap": tap, "probe": probe, "labels": labels}
    return next((row for row in result["probes"] if all(row[key] == value for key, value in keys.items())), None)


def encoders(result: dict[str, Any], tap: str) -> list[str]:
    """The encoders measured at a tap, in the order of the result (the trained one first)."""
    return list(dict.fromkeys(row["encoder"] for row in result["probes"] if row["tap"] == tap))


def columns(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(probe, labels) of the table, in the order of the result."""
    return list(dict.fromkeys((row["probe"], row["labels"]) for row in result["probes"]))


def spread(row: dict[str, Any]) -> float | None:
    """The standard deviation of the draws, or half the mean's 95 % interval of few-shot tasks; None of one value."""
    found: float | None = row["sd_pct"] if row["sd_pct"] is not None else row.get("ci95_pct")
    return found


def shown(row: dict[str, Any] | None) -> str:
    """`95.2 ± 0.8`, `97.7`, or a dash for what was not measured."""
    if row is None:
        return "–"
    around = spread(row)
    return f"{row['accuracy_pct']:.1f}" + (f" ± {around:.1f}" if around is not None else "")


def measured(row: dict[str, Any] | None) -> str:
    """A number that is no accuracy: `0.371`, `4.2 nats`, or what became of it."""
    if row is None:
        return "–"
    return f"{row['value']:.3g} {row['unit']}".strip() if row["value"] is not None else "not finite"


def measures(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of what is no accuracy; no rows without any."""
    found = result.get("measures", [])
    kinds = list(dict.fromkeys((row["probe"], row["labels"]) for row in found))
    known = {(row["encoder"], row["tap"], row["probe"], row["labels"]): row for row in found}
    names = list(dict.fromkeys((row["encoder"], row["tap"]) for row in found))
    head = ["", *(f"{NAMES[probe]}, {of}" for probe, of in kinds)]
    return head, [[f"{tap}  {one}", *(measured(known.get((one, tap, *kind))) for kind in kinds)] for one, tap in names]


def heading(probe: str, labels: str) -> str:
    """`Linear, 10 labels a class`, `Prototype, 5-way 1-shot`."""
    count, few, _ = labels.partition("/class")
    words = f"{count} label{'' if count == '1' else 's'} a class" if few else labels
    return f"{NAMES.get(probe, probe)}, {'all labels' if labels == 'all' else words}"


def things(result: dict[str, Any]) -> str:
    """What was encoded, in the plural."""
    return str(result.get("things", "images"))


def mebibytes(count: int | None) -> str:
    return "not measurable here" if count is None else f"{count / 2**20:.1f} MiB"


def _tile(value: str, text: str) -> str:
    number, _, unit = value.partition(" ")
    return f'<div class="tile"><b>{escape(number)} <small>{escape(unit)}</small></b><span>{escape(text)}</span></div>'


def card(title: str, body: str) -> str:
    """A chart in its frame."""
    return f'<div class="card"><h3>{escape(title)}</h3>{body}</div>'


def _tiles(result: dict[str, Any]) -> str:
    tap, cost, speed = result["taps"][0], result["loss_cost"], result["training"]["images_per_s"]
    tiles = []
    for probe, labels in columns(result)[:3]:
        row = find(result, TRAINED, tap, probe, labels)
        if row is not None:
            tiles.append(_tile(f"{shown(row)} %", f"{heading(probe, labels)}, on {tap}"))
    if speed is not None:
        tiles.append(_tile(f"{speed:,.0f} {things(result)}/s", "in training, median"))
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
    found = columns(result)
    for probe, labels in sorted((c for c in found if c[0] == "linear"), key=lambda c: c[1] == "all") or found[:2]:
        bars = []
        for encoder in [*encoders(result, tap), *encoders(result, PIXELS)]:
            row = find(result, encoder, PIXELS if encoder == "raw pixels" else tap, probe, labels)
            if row is not None:
                color = "var(--series-0)" if encoder == TRAINED else "var(--quiet)"
                bars.append(Bar(encoder, row["accuracy_pct"], spread(row), color))
        if bars:
            chart = plots.dot_chart(bars, unit="%", high=100.0)
            chance = 100 / (int(labels[0]) if "-way" in labels else len(result["classes"]))
            cards.append(card(f"{heading(probe, labels)} ({tap}; chance {chance:.2g} %)", chart))
    return "".join(cards)


def _probe_table(result: dict[str, Any]) -> str:
    found = columns(result)
    head = "".join(f"<th>{escape(heading(*column))}</th>" for column in found)
    rows = []
    for tap in dict.fromkeys(row["tap"] for row in result["probes"]):
        width = next(row["width"] for row in result["probes"] if row["tap"] == tap)
        what = things(result)
        size = f"<small> · {width:,} numbers a{'n' if what == 'images' else ''} {what[:-1]}</small>"
        rows.append(f'<tr class="group"><td colspan="{len(found) + 1}">{escape(tap)}{size}</td></tr>')
        for name in encoders(result, tap):
            cells = "".join(f"<td>{shown(find(result, name, tap, *column))}</td>" for column in found)
            mark = ' class="ours"' if name == TRAINED else ""
            rows.append(f"<tr{mark}><td>{escape(name)}</td>{cells}</tr>")
    return f"<table><thead><tr><th>accuracy, %</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _measure_table(result: dict[str, Any]) -> str:
    head, rows = measures(result)
    return page.table([*map(escape, head)], [[*map(escape, row)] for row in rows]) if rows else ""


def _curves(result: dict[str, Any], log: list[runlog.Line]) -> str:
    def series(name: str, key: str, color: int, scale: float = 1.0) -> Series:
        x, y = runlog.column(log, "step", key)
        return Series(name, x, [scale * value for value in y], f"var(--series-{color})")

    charts: list[tuple[str, str, tuple[float, float] | None, list[Series]]] = [
        ("NCE minus its chance level (0 = guessing)", "nats", None, [series("NCE − chance", "nce_minus_chance", 0)]),
        (f"Online probes on detached {result['online_tap']} (training {things(result)})", "accuracy, %", (0.0, 100.0), [
            series("linear", "linear_acc", 0, 100), series("MLP", "mlp_acc", 1, 100)]),
        ("Loss and its penalty", "nats", None, [series("loss", "loss", 0), series("penalty", "penalty", 1)]),
        ("Positives ranked first", "%", None, [series("top-1", "top1", 2, 100)]),
    ]  # fmt: skip
    cards = []
    for title, unit, limits, lines in charts:
        lines = [line for line in lines if line.x]
        if lines:
            cards.append(card(title, plots.line_chart(lines, x_label="step", y_label=unit, y_range=limits)))
    return "".join(cards)


def _closer(result: dict[str, Any], figures: Figures) -> str:
    tap, confusion = result["taps"][0], result["confusion"]
    cards = []
    if confusion is not None:
        probe = NAMES[confusion.get("probe", "linear")]
        cards.append(card(f"Confusions of the probe on {tap}: {probe}, all labels", _confusion(result)))
    if figures.points:
        picture = plots.scatter(figures.points, figures.point_labels, result["classes"])
        cards.append(card(f"{len(figures.points):,} test {things(result)} by their {tap} (PCA, then t-SNE)", picture))
    return "".join(cards)


def _confusion(result: dict[str, Any]) -> str:
    classes, matrix = result["classes"], result["confusion"]["matrix"]
    if len(classes) <= 100:
        return plots.confusion(matrix, classes)
    worst = sorted(((v, i, j) for i, row in enumerate(matrix) for j, v in enumerate(row) if i != j and v), reverse=True)
    items = "".join(f"<li>{escape(classes[i])} taken for {escape(classes[j])}: {v}</li>" for v, i, j in worst[:20])
    return f"<p>{len(classes):,} classes are too many to draw; the twenty commonest mistakes:</p><ul>{items}</ul>"


def _neighbours(result: dict[str, Any], figures: Figures) -> str:
    """A card of thumbnails, where there are any."""
    if not figures.neighbours:
        return ""
    note = (
        f"A test image (dark line) and the labelled images nearest to it by cosine on {result['taps'][0]}: green for "
        "its own class, orange for another."
    )
    rows = []
    for row in figures.neighbours:
        (query, _), rest = row[0], row[1:]
        images = "".join(f'<img alt="" src="{uri}"{"" if right else " class=miss"}>' for uri, right in rest)
        rows.append(f'<div><img alt="" class="query" src="{query}"><em>→</em>{images}</div>')
    return (
        f'<div class="card" style="margin-top:14px"><h3>Nearest neighbours</h3><p class="note">{escape(note)}</p>'
        f'<div class="neighbours">{"".join(rows)}</div></div>'
    )


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
    bars = card("Time a step", plots.bar_chart(times, unit="ms"))
    if all(cost[name]["peak_bytes"] is not None for name in colors):
        peaks = [Bar(name, cost[name]["peak_bytes"] / 2**20, None, color) for name, color in colors.items()]
        bars += card("Peak memory", plots.bar_chart(peaks, unit="MiB"))
    rows = "".join(
        f"<tr{' class=ours' if name == 'fused' else ''}><td>{name}</td><td>{cost[name]['time_ms']:.1f}</td>"
        f"<td>{' – '.join(f'{value:.1f}' for value in cost[name]['quartiles_ms'])}</td>"
        f"<td>{mebibytes(cost[name]['peak_bytes'])}</td><td>{cost[name]['loss']:.4f}</td></tr>"
        for name in colors
    )
    head = "<th>loss</th><th>ms a step</th><th>quartiles</th><th>peak memory</th><th>value</th>"
    return note, bars, f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _title(result: dict[str, Any]) -> str:
    trained_on = result.get("trained_on", result["data_name"])
    other = f", evaluated on {result['data_name']}" if trained_on != result["data_name"] else ""
    return f"{result['method'].upper()} on {trained_on}{other}"


def _spreads(result: dict[str, Any]) -> str:
    found, lines = [labels for _, labels in columns(result)], []
    if any(labels.endswith("/class") for labels in found):
        lines.append(f"With few labels a class: mean ± standard deviation of {result['draws']} draws.")
    if any("-shot" in labels for labels in found):
        lines.append(f"Few-shot: mean ± 95 % interval of {result['tasks']:,} tasks.")
    return " ".join(lines)


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
    return page.fill(
        "report_template.html",
        title=escape(_title(result)),
        subtitle=escape(f"Run {result['run']} · {result['date']} · fused_nce {result['environment']['fused_nce']}"),
        tiles=_tiles(result),
        probes_note=escape(
            f"Accuracy on {splits['test']:,} test {things(result)} of probes fitted on frozen features of "
            f"{splits['probe']:,} labelled {things(result)}. {_spreads(result)}"
        ),
        bars=_probe_bars(result),
        probe_table=_probe_table(result) + _measure_table(result),
        training_note=escape(f"{note}."),
        curves=_curves(result, log),
        closer_note=f"None of these {things(result)} was seen in pre-training or by a probe.",
        closer=_closer(result, figures),
        things=things(result),
        neighbours=_neighbours(result, figures),
        cost_note=escape(cost_note),
        cost_bars=cost_bars,
        cost_table=cost_table,
        protocol="".join(f"<li>{escape(line)}</li>" for line in result["protocol"]),
        environment="".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in result["environment"].items()),
        config=escape(config_text),
    )
