"""The evaluation as one HTML file that opens offline: style, charts and images are inside it.

Everything comes from the evaluation's result (what `eval.json` holds), the training log and the figures' data;
nothing here computes an accuracy.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from fused_nce.train.evaluation.figures import Figures, data_uri
from fused_nce.train.evaluation.scoring import PIXELS, TRAINED
from fused_nce.train.report import page, plots, runlog
from fused_nce.train.report.page import Card, Row, Table, small
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
    """A number that is not an accuracy: `0.371`, `4.2 nats`, or "not finite"."""
    if row is None:
        return "–"
    return f"{row['value']:.3g} {row['unit']}".strip() if row["value"] is not None else "not finite"


def measures(result: dict[str, Any]) -> Table:
    """Table of the numbers that are not accuracies; without rows if there are none."""
    found = result.get("measures", [])
    kinds = list(dict.fromkeys((row["probe"], row["labels"]) for row in found))
    known = {(row["encoder"], row["tap"], row["probe"], row["labels"]): row for row in found}
    names = list(dict.fromkeys((row["encoder"], row["tap"]) for row in found))
    head = ["", *(f"{NAMES[probe]}, {of}" for probe, of in kinds)]
    rows = [[f"{tap}  {one}", *(measured(known.get((one, tap, *kind))) for kind in kinds)] for one, tap in names]
    return Table(head, [Row(cells) for cells in rows])


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


def _tiles(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Number, unit and caption of each tile."""
    tap, cost, speed = result["taps"][0], result["loss_cost"], result["training"]["images_per_s"]
    tiles = []
    for probe, labels in columns(result)[:3]:
        row = find(result, TRAINED, tap, probe, labels)
        if row is not None:
            tiles.append((f"{shown(row)} %", f"{heading(probe, labels)}, on {tap}"))
    if speed is not None:
        tiles.append((f"{speed:,.0f} {things(result)}/s", "in training, median"))
    if cost is not None:
        ratio = cost["naive"]["time_ms"] / cost["fused"]["time_ms"]
        speed_up = f"{ratio:.1f}× faster" if ratio >= 1 else f"{1 / ratio:.1f}× slower"
        tiles.append((speed_up, "the fused loss beside the naive one"))
        fused, naive = (cost[name]["peak_bytes"] for name in ("fused", "naive"))
        if fused is not None and naive is not None:
            tiles.append((mebibytes(fused), f"the fused loss at its peak; naive {mebibytes(naive)}"))
    return [(*value.partition(" ")[::2], text) for value, text in tiles]


def _probe_bars(result: dict[str, Any]) -> list[Card]:
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
            of_all = result.get("chance_pct", 100 / len(result["classes"]))
            chance = 100 / int(labels[0]) if "-way" in labels else of_all
            guessing = "" if labels == "attributes" else f"; chance {chance:.2g} %"  # some are rare, and guessed better
            cards.append(Card(f"{heading(probe, labels)} ({tap}{guessing})", chart))
    return cards


def _probe_table(result: dict[str, Any]) -> Table:
    found, what, rows = columns(result), things(result), []
    for tap in dict.fromkeys(row["tap"] for row in result["probes"]):
        width = next(row["width"] for row in result["probes"] if row["tap"] == tap)
        rows.append(Row([small(tap, f" · {width:,} numbers a{'n' if what == 'images' else ''} {what[:-1]}")]))
        for name in encoders(result, tap):
            cells = [shown(find(result, name, tap, *column)) for column in found]
            rows.append(Row([name, *cells], ours=name == TRAINED))
    return Table(["accuracy, %", *(heading(*column) for column in found)], rows)


def _curves(result: dict[str, Any], log: list[runlog.Line]) -> list[Card]:
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
            cards.append(Card(title, plots.line_chart(lines, x_label="step", y_label=unit, y_range=limits)))
    return cards


def _closer(result: dict[str, Any], figures: Figures) -> list[Card]:
    tap, confusion = result["taps"][0], result["confusion"]
    cards = []
    if confusion is not None:
        probe = NAMES[confusion.get("probe", "linear")]
        cards.append(Card(f"Confusions of the probe on {tap}: {probe}, all labels", _confusion(result)))
    if figures.points:
        picture = plots.scatter(figures.points, figures.point_labels, result["classes"])
        cards.append(Card(f"{len(figures.points):,} test {things(result)} by their {tap} (PCA, then t-SNE)", picture))
    return cards


def _confusion(result: dict[str, Any]) -> Markup:
    classes, confusion = result["classes"], result["confusion"]
    if "matrix" in confusion:
        return plots.confusion(confusion["matrix"], classes)
    items = Markup().join(
        Markup("<li>{} taken for {}: {}</li>").format(classes[i], classes[j], v)
        for i, j, v in confusion["mistakes"][:20]
    )
    note = f"{len(classes):,} classes are too many to draw; the twenty commonest mistakes:"
    return Markup("<p>{}</p><ul>{}</ul>").format(note, items)


def _cost(result: dict[str, Any]) -> tuple[str, list[Card], Table]:
    """Note, bars and table of the loss beside the naive one."""
    cost = result["loss_cost"]
    if cost is None:
        error = result.get("loss_cost_error")
        return f"Not measured in this evaluation{f': {error}' if error else '.'}", [], Table([], [])
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
    bars = [Card("Time a step", plots.bar_chart(times, unit="ms"))]
    if all(cost[name]["peak_bytes"] is not None for name in colors):
        peaks = [Bar(name, cost[name]["peak_bytes"] / 2**20, None, color) for name, color in colors.items()]
        bars.append(Card("Peak memory", plots.bar_chart(peaks, unit="MiB")))
    rows = []
    for name in colors:
        one = cost[name]
        quartiles = " – ".join(f"{value:.1f}" for value in one["quartiles_ms"])
        cells = [name, f"{one['time_ms']:.1f}", quartiles, mebibytes(one["peak_bytes"]), f"{one['loss']:.4f}"]
        rows.append(Row(cells, ours=name == "fused"))
    return note, bars, Table(["loss", "ms a step", "quartiles", "peak memory", "value"], rows)


def _title(result: dict[str, Any]) -> str:
    trained_on = result.get("trained_on", result["data_name"])
    other = f", evaluated on {result['data_name']}" if trained_on != result["data_name"] else ""
    return f"{result.get('title', result['method'])} on {trained_on}{other}"


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
    cost_note, cost_bars, costs = _cost(result)
    share = training["loss_share"]
    note = f"{training['steps']:,} steps in {training['minutes']:.1f} minutes"
    note += f"; the loss took {100 * share:.1f} % of a step (median)" if share is not None else ""
    note += f"; {training['skipped']:,} updates were skipped (not finite)" if training.get("skipped") else ""
    note += f"; {training['damaged']:,} images could not be read" if training.get("damaged") else ""
    return page.fill(
        "report.html",
        title=_title(result),
        subtitle=f"Run {result['run']} · {result['date']} · fused_nce {result['environment']['fused_nce']}",
        tiles=_tiles(result),
        probes_note=f"Accuracy on {splits['test']:,} test {things(result)} of probes fitted on frozen features of "
        f"{splits['probe']:,} labelled {things(result)}. {_spreads(result)}",
        bars=_probe_bars(result),
        probes=_probe_table(result),
        measures=measures(result),
        training_note=f"{note}.",
        curves=_curves(result, log),
        closer=_closer(result, figures),
        things=things(result),
        tap=result["taps"][0],
        neighbours=figures.neighbours,
        samples=data_uri(figures.pictures["samples"]) if "samples" in figures.pictures else None,
        cost_note=cost_note,
        cost_bars=cost_bars,
        costs=costs,
        protocol=result["protocol"],
        environment=result["environment"],
        config=config_text,
    )
