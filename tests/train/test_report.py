"""The report: one offline file, every number in it, nothing from the data able to break the page."""

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from fused_nce.train.monitor.journal import Journal
from fused_nce.train.report import evaluated, plots, runlog, terminal
from fused_nce.train.report.evaluated import Figures

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Checker(HTMLParser):
    """Collects what the page would fetch, its text, and tags that do not match."""

    def __init__(self):
        super().__init__()
        self.stack, self.fetched, self.words, self.problems = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag in ("link", "script", "iframe", "object"):
            self.problems.append(f"<{tag}>")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.problems.append(f"</{tag}> does not match")

    def handle_data(self, data):
        self.words.append(data)


def row(encoder, tap, probe, labels, accuracy, sd=None):
    return {
        "encoder": encoder, "tap": tap, "probe": probe, "labels": labels, "accuracy_pct": accuracy, "sd_pct": sd,
        "width": 256, "setting": {},
    }  # fmt: skip


def make_result(classes=("zero", "one", "two"), cost=True):
    rows = []
    sources = (("trained", "f1"), ("random, Kaiming init", "f1"), ("trained", "f7"), ("raw pixels", "pixels"))
    for index, (encoder, tap) in enumerate(sources):
        rows.append(row(encoder, tap, "linear", "all", 91.25 + index))
        rows.append(row(encoder, tap, "knn", "all", 81.25 + index))
        rows.append(row(encoder, tap, "linear", "10/class", 71.25 + index, 1.125))
    count = len(classes)
    losses = {"fused": (10.0, 2**20), "naive": (40.0, 50 * 2**20)}
    return {
        "run": "trial", "method": "amdim", "data": "digits", "data_name": "digits", "date": "2030-01-02",
        "classes": list(classes), "taps": ["f1", "f7"], "online_tap": "f1",
        "labels_per_class": [10], "draws": 12, "seed": 0,
        "splits": {"probe": 445, "test": 456},
        "probes": rows,
        "confusion": {
            "matrix": [[7 if i == j else (i + 1) * (j == 0) for j in range(count)] for i in range(count)]
        } if count <= 100 else {"mistakes": [[i, 0, i + 1] for i in range(count - 1, 0, -1)]},
        "training": {"steps": 420, "minutes": 2.5, "images_per_s": 437.0, "loss_share": 0.25, "peak_memory_mb": 900.0},
        "loss_cost": {
            "batch": 128, "terms": [[1, 25], [1, 49]], "width": 256, "dtype": "bfloat16", "threads": 2, "repeats": 20,
            **{
                name: {"time_ms": time, "quartiles_ms": [time - 1, time + 1], "peak_bytes": peak, "loss": 52.9}
                for name, (time, peak) in losses.items()
            },
        } if cost else None,
        "protocol": ["Not transductive & fair."],
        "environment": {"fused_nce": "0.1.0", "processor": "Some CPU <x>"},
    }  # fmt: skip


def make_log(steps=50):
    return [
        {"step": s, "nce_minus_chance": 2 - s / 10, "loss": 30 - s / 10, "penalty": 0.1, "top1": 0.01 * s,
         "linear_acc": 0.5, "mlp_acc": None, "images_per_s": 400.0 + s, "time_s": 3.0 * s}
        for s in range(1, steps + 1)
    ]  # fmt: skip


PIXEL = "data:image/png;base64,iVBORw0KGgo="
FIGURES = Figures([(0.0, 1.0), (2.0, 3.0), (1.0, 0.5)], [0, 1, 2], [[(PIXEL, True), (PIXEL, False)]])


def parse(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    return checker


def test_is_one_offline_file():
    page = evaluated.render(make_result(), make_log(), "seed: 0", FIGURES)
    checker = parse(page)
    assert checker.problems == []
    assert checker.stack == []
    assert checker.fetched == [PIXEL, PIXEL]
    assert not re.search(r"@import|url\(|https?:|//\w", page)
    assert not re.search(r"{[{%]|[%}]}", re.sub(r"<style>.*?</style>", "", page, flags=re.S))  # no placeholder left


def test_every_number_is_in_it():
    text = " ".join(parse(evaluated.render(make_result(), make_log(), "seed: 77", FIGURES)).words)
    for expected in (
        "91.2", "94.2", "82.2", "71.2 ± 1.1", "456 test images", "445", "12 draws", "420 steps", "25.0 %", "437",
        "4.0× ", "1.0 MiB", "naive 50.0 MiB", "10.0", "128 × 128 × 25, 128 × 128 × 49", "D = 256", "seed: 77",
        "Some CPU <x>", "Not transductive & fair.", "0.1.0", "bfloat16",
    ):  # fmt: skip
        assert expected in text, expected


def test_the_title_has_the_methods_name_as_it_is_printed():
    assert "<h1>MoCo on digits</h1>" in evaluated.render(make_result() | {"title": "MoCo"}, make_log(), "", FIGURES)


def test_a_slower_loss_is_called_slower():
    result = make_result()
    result["loss_cost"]["fused"]["time_ms"] = 80.0
    assert "2.0× <small>slower" in evaluated.render(result, make_log(), "", FIGURES)


def test_names_from_the_data_cannot_break_the_page():
    result = make_result(classes=("<script>alert(1)</script>", 'a"b', "c & d"))
    result["run"] = "<img src=x>"
    checker = parse(evaluated.render(result, make_log(), "<b>", FIGURES))
    assert checker.problems == []
    assert checker.fetched == [PIXEL, PIXEL]
    assert "<script>alert(1)</script>" in checker.words


def test_chance_is_of_the_classes_that_occur():
    for known, shown in (({}, "chance 33 %"), ({"chance_pct": 50.0}, "chance 50 %")):
        assert shown in evaluated.render(make_result() | known, make_log(), "", Figures())


def test_parts_that_were_not_measured_are_left_out():
    page = evaluated.render(make_result(cost=False), make_log(), "", Figures())
    assert "Not measured in this evaluation." in page
    assert "× faster" not in page
    result = make_result()
    for name in ("fused", "naive"):
        result["loss_cost"][name]["peak_bytes"] = None
    assert "not measurable here" in evaluated.render(result, make_log(), "", FIGURES)


def test_what_did_not_go_into_the_weights_is_said():
    log = make_log()
    log[-1] |= {"skipped": 3, "damaged": 12}
    result = make_result() | {"training": terminal.training(log) | {"loss_share": 0.25}}
    page = evaluated.render(result, log, "", FIGURES)
    assert "of a step (median); 3 updates were skipped (not finite); 12 images could not be read." in page
    assert "skipped" not in evaluated.render(make_result(), log, "", FIGURES)


def test_many_classes_become_a_list_of_mistakes():
    names = [f"class {i}" for i in range(120)]
    text = " ".join(parse(evaluated.render(make_result(classes=names), make_log(), "", FIGURES)).words)
    assert "class 119 taken for class 0: 120" in text
    assert "class 2 taken for class 0: 3" not in text  # not among the twenty commonest


def test_terminal_table():
    text = terminal.table(make_result())
    assert re.search(r"f1  trained +91\.2 +81\.2 +71\.2 ± 1\.1\n", text)
    assert re.search(r"raw pixels +94\.2 +84\.2 +74\.2 ± 1\.1", text)
    assert re.search(r"fused +10\.0 ms +1\.0 MiB", text)
    assert max(map(len, text.splitlines())) <= 104
    assert "fused" not in terminal.table(make_result(cost=False))


def test_measures_alone_are_a_table():
    measures = [{"encoder": "trained", "tap": "f1", "probe": "ndm", "labels": "units", "value": 0.25, "unit": "nats"}]
    result = make_result(cost=False) | {"probes": [], "confusion": None, "measures": measures}
    lines = terminal.table(result).splitlines()
    assert [line.split() for line in lines[:2]] == [["NDM,", "units"], ["f1", "trained", "0.25", "nats"]]
    assert "0.25 nats" in evaluated.render(result, make_log(), "", Figures())


def test_long_names_of_columns_and_rows_stay_apart():
    result = make_result(cost=False)
    result["probes"] = [
        row(name, "c_t, speaker", "linear", labels, 91.25)
        for name in ("trained", "random, Kaiming init")
        for labels in ("attributes, balanced", "attributes", "all")
    ]
    lines = terminal.table(result).splitlines()
    assert "  Linear, attributes, balanced  " in lines[0] + "  "
    assert len({len(line) for line in lines[:3]}) == 1
    assert max(map(len, lines)) <= 100


def test_training_summary():
    found = terminal.training(make_log())
    assert found["steps"] == 50
    assert found["minutes"] == 2.5
    assert found["images_per_s"] == 425.5
    assert found["loss_share"] is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17.5), (1e-6, 2e-6), (0, 123456), (97.5, 98.5)])
def test_ticks_are_round_inside_and_even(low, high):
    ticks = plots.nice_ticks(low, high)
    gaps = [b - a for a, b in pairwise(ticks)]
    assert 2 <= len(ticks) <= 7
    assert low - 1e-9 <= ticks[0] <= ticks[-1] <= high * (1 + 1e-9)
    assert max(gaps) == pytest.approx(min(gaps))
    digits = f"{gaps[0]:.3e}"
    assert digits.split("e")[0] in ("1.000", "2.000", "5.000")


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 1), (math.nan, 1), (0, math.inf)])
def test_bad_axis_is_refused(low, high):
    with pytest.raises(ValueError, match="axis range"):
        plots.nice_ticks(low, high)


def test_line_passes_through_its_points():
    chart = plots.line_chart(
        [plots.Series("a", [0, 5, 10], [0.0, math.nan, 1.0])], x_label="step", y_label="y", y_range=(0, 1)
    )
    points = re.findall(r'points="([^"]+)"', chart)[0].split()
    assert points == [
        f"{plots.LEFT:.1f},{plots.HEIGHT - plots.BOTTOM:.1f}",
        f"{plots.WIDTH - plots.RIGHT:.1f},{plots.TOP:.1f}",
    ]


def test_a_long_curve_is_averaged_not_cut():
    series = plots.thin(plots.Series("a", list(range(1000)), [float(i) for i in range(1000)]), points=100)
    assert len(series.x) == 100
    assert series.y[0] == 4.5
    assert sum(series.y) / 100 == pytest.approx(499.5)


def test_a_chart_without_points_is_refused():
    with pytest.raises(ValueError, match="no finite point"):
        plots.line_chart([plots.Series("a", [0], [math.inf])], x_label="step", y_label="y")


def test_dot_chart_places_values_on_its_axis():
    chart = plots.dot_chart([plots.Bar("a", 80.0, 2.0), plots.Bar("b", 100.0)], unit="%", high=100.0)
    xs = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', chart)]
    ends = plots.NAME_WIDTH, plots.WIDTH - plots.VALUE_WIDTH
    assert xs[1] == pytest.approx(ends[1], abs=0.1)
    assert xs[0] == pytest.approx(ends[0] + (80 - 70) / 30 * (ends[1] - ends[0]), abs=0.1)  # the axis starts at 70
    assert "80.0 ± 2.0 %" in chart


def write_log(folder, *lines):
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")


def test_log_keeps_the_last_line_of_a_step_and_drops_a_cut_one(tmp_path):
    lines = [json.dumps({"step": s, "loss": v}) for s, v in ((10, 1.0), (20, 2.0), (20, 3.0), (30, 4.0))]
    write_log(tmp_path, *lines, '{"step": 40, "lo')
    log = runlog.read_log(tmp_path)
    assert [(line["step"], line["loss"]) for line in log] == [(10, 1.0), (20, 3.0), (30, 4.0)]
    assert runlog.median(log, "loss") == 3.0
    assert runlog.read_log(tmp_path, 25) == log[:2]  # the weights are of update 25
    assert runlog.read_log(tmp_path, 5) == log[:1]
    assert runlog.column([*log, {"step": 50, "loss": None}], "step", "loss") == ([10.0, 20.0, 30.0], [1.0, 3.0, 4.0])


def test_damaged_lines_are_left_out_and_counted_as_by_a_resume(tmp_path, caplog):
    lines = ['{"step": 1}', "garbage", "{}", '{"step": 1e999}', "[2]", '{"step": 2}', '{"st']
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode().replace(b"garbage", b"gar\xffbage"))
    assert runlog.read_log(tmp_path) == [{"step": 1}, {"step": 2}]
    assert caplog.messages == [f"{tmp_path / 'log.jsonl'}: 4 damaged lines left out, the first of them line 2"]
    Journal(tmp_path, 2).close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_log_without_a_step_is_refused(tmp_path):
    write_log(tmp_path, "{}")
    with pytest.raises(ValueError, match="holds no step"):
        runlog.read_log(tmp_path)


def test_missing_log_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no log\.jsonl"):
        runlog.read_log(tmp_path)
