"""`fused-nce compare`: every number of several evaluations on one offline page and in one table."""

import copy
import csv
import json
import re

import pytest

from fused_nce import cli
from fused_nce.train import compare, config
from fused_nce.train.methods.amdim import AMDIMConfig, ModelConfig
from fused_nce.train.methods.simclr import SimCLRConfig
from fused_nce.train.report import runlog
from tests.train.test_report import make_log, make_result, parse, row


def make_run(folder, accuracy, settings=None, **changes):
    """An evaluated run whose trained encoder has the given accuracy at f1 and 9 less at f7."""
    folder.mkdir(parents=True)
    config.save(settings or AMDIMConfig(), folder)
    result = copy.deepcopy(make_result()) | {"trained_on": "digits", "tasks": 600} | changes
    for one in result["probes"]:
        if (one["encoder"], one["probe"], one["labels"]) == ("trained", "linear", "all"):
            one["accuracy_pct"] = accuracy - (9 if one["tap"] == "f7" else 0)
    (folder / "eval.json").write_text(json.dumps(result))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in make_log()))
    return folder


@pytest.fixture
def runs(tmp_path):
    first = make_run(tmp_path / "first", 61.25)
    settings = AMDIMConfig(model=ModelConfig(ndf=77), seed=5)
    second = make_run(tmp_path / "second", 73.5, settings)
    third = make_run(tmp_path / "third", 55.75, SimCLRConfig(), method="simclr")
    return [str(first), str(second), str(third)]


def test_the_page_is_one_offline_file_with_every_run(runs, tmp_path, capsys):
    out = tmp_path / "reports" / "all"
    assert cli.main(["compare", *runs, "--out", str(out)]) == 0
    assert "all.html" in capsys.readouterr().out
    page = (tmp_path / "reports" / "all.html").read_text()
    checker = parse(page)
    assert checker.problems == []
    assert checker.stack == []
    assert checker.fetched == []
    assert not re.search(r"@import|url\(|https?:|//\w", page)
    assert "$" not in page
    text = " ".join(checker.words)
    for expected in ("3 runs on digits", "61.2", "52.2", "73.5", "64.5", "55.8", "94.2", "71.2 ± 1.1", "Some CPU <x>"):
        assert expected in text, expected
    assert "Beware" not in text


def test_the_best_trained_encoder_of_a_column_is_bold(runs):
    page = compare.compared.render(compare.read_runs(runs))
    assert "<b>73.5</b>" in page
    assert "<b>61.2</b>" not in page
    assert "<b>94.2</b>" not in page  # raw pixels


def test_the_better_untrained_encoder_stands_below_the_trained_one(tmp_path):
    folder = make_run(tmp_path / "run", 61.25)
    result = json.loads((folder / "eval.json").read_text())
    result["probes"] += [row("random, AMDIM init", "f1", "linear", "all", 33.5)]
    (folder / "eval.json").write_text(json.dumps(result))
    page = compare.compared.render(compare.read_runs([str(folder), str(make_run(tmp_path / "two", 50.0))]))
    assert "<td><small>92.2</small></td>" in page  # the Kaiming one
    assert "33.5" not in page


def test_only_settings_that_differ_are_shown(runs):
    words = parse(compare.compared.render(compare.read_runs(runs))).words
    for setting in ("model.ndf", "seed", "loss.temperature"):
        assert setting in words
    assert "77" in words
    assert "augment.mean" in words  # SimCLR's are ImageNet's
    assert "probes" not in words
    same = compare.compared.render(compare.read_runs(runs[:1] * 1 + runs[1:2]))
    assert "loss.clip" not in parse(same).words


def test_the_table_has_every_accuracy(runs, tmp_path):
    compare.write_csv(tmp_path / "t.csv", compare.read_runs(runs))
    with (tmp_path / "t.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 3 * len(make_result()["probes"])
    found = {
        (line["run"], line["tap"]): float(line["accuracy_pct"])
        for line in table
        if (line["encoder"], line["probe"], line["labels"]) == ("trained", "linear", "all")
    }
    assert found[("second", "f1")] == 73.5
    assert found[("third", "f7")] == 46.75
    assert {line["method"] for line in table} == {"amdim", "simclr"}


def test_runs_with_one_name_are_told_apart(tmp_path):
    folders = [str(make_run(tmp_path / place / "run", 50.0)) for place in ("a", "b")]
    assert [run.name for run in compare.read_runs(folders)] == folders
    assert "<h1>1 run on digits</h1>" in compare.compared.render(compare.read_runs(folders[:1]))


def test_evaluations_that_were_not_alike_are_marked(runs, tmp_path):
    other = make_run(tmp_path / "other", 40.0, draws=3, seed=1, leave_out_unseen=True)
    text = " ".join(parse(compare.compared.render(compare.read_runs([*runs, str(other)]))).words)
    assert "Beware: the evaluations differ in draws, seed, leave_out_unseen" in text


def test_draws_of_several_versions_or_that_hung_on_the_protocols_are_marked(tmp_path):
    def differ(*changes):
        number = len(list(tmp_path.iterdir()))
        paths = [str(make_run(tmp_path / f"{number + i}", 50.0, **one)) for i, one in enumerate(changes)]
        page = compare.compared.render(compare.read_runs(paths))
        return page.split("evaluations differ in ")[1].split(";")[0] if "Beware" in page else ""

    few, both = {"protocols": ["linear", "few"]}, {"protocols": ["few", "few-shot"]}
    assert differ(few, both) == differ(few, few | {"draws_version": 2}) == "how labels were drawn"
    assert differ(few | {"draws_version": 2}, both | {"draws_version": 2}) == ""
    assert differ(few | {"draws_version": 2}, {"protocols": ["linear"]}, few | {"draws_version": 2}) == ""
    assert differ({"labels": ["digit"]}, {"labels": ["speaker"]}) == "labels"


def test_another_data_set_is_read_by_its_name(tmp_path):
    folders = [make_run(tmp_path / name, 50.0) for name in ("a", "b")]
    for folder in folders:
        result = json.loads((folder / "eval.json").read_text()) | {"data_name": "stl10"}
        (folder / "eval-stl10.json").write_text(json.dumps(result))
    runs = compare.read_runs(list(map(str, folders)), data="/anywhere/stl10")
    assert {run.result["data_name"] for run in runs} == {"stl10"}


def test_data_are_told_by_their_digests_where_both_evaluations_have_them(tmp_path):
    digests = [{"probe": "p", "test": test} for test in ("t", "t", "u")]
    names = ["imgs", "moved", "imgs"]
    a, b, c = (
        str(make_run(tmp_path / name, 50.0, data_name=data, data=f"/{name}/{data}", digests=digest))
        for name, data, digest in zip("abc", names, digests, strict=True)
    )
    old = str(make_run(tmp_path / "old", 50.0, data_name="imgs"))
    assert len(compare.read_runs([a, b])) == len(compare.read_runs([old, a])) == 2
    wanted = r"a was evaluated on imgs, c on other images or labels of that name \(/c/imgs\); need one data set"
    with pytest.raises(ValueError, match=wanted):
        compare.read_runs([a, c])


def test_a_glob_of_shards_has_the_name_of_its_folder():
    assert runlog.suffix("/data/stl10/train-*.tar") == "-stl10_train-_.tar" != runlog.suffix("/data/c10/train-*.tar")
    assert runlog.data_name("/data/stl10") == "stl10"


def test_names_cannot_break_the_page(tmp_path):
    folders = [str(make_run(tmp_path / name, 50.0)) for name in ("<b>a&b", "$title")]
    checker = parse(compare.compared.render(compare.read_runs(folders)))
    assert checker.problems == []
    assert "<b>a&b" in checker.words


def test_what_cannot_be_compared_is_one_line(runs, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    other = make_run(tmp_path / "other", 40.0, data_name="stl10")
    for words in ([*runs, str(bare)], [*runs, str(other)], [*runs, runs[0]], [], [runs[0], "--data", "birds"]):
        assert cli.main(["compare", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "bare holds no eval.json; evaluate it first: fused-nce eval" in lines[0]
    assert "first was evaluated on digits, other on stl10; need one data set" in lines[1]
    assert "first is given twice" in lines[2]
    assert "runs" in lines[3]
    assert "holds no eval-birds.json; evaluate it first: fused-nce eval" in lines[4]
    assert lines[4].endswith("--data birds")
    assert len(lines) == 5
