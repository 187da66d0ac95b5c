"""Runs that the documents quote: what is kept of them, and the tables and the picture made of it."""

from __future__ import annotations

import json

import pytest

from bench import training
from fused_nce.train import evaluate
from fused_nce.train.methods.amdim import AMDIMConfig
from tests.train.test_compare import make_run


def evaluated(folder, accuracy, settings=None, *, baselines=True, **facts):
    make_run(folder, accuracy, settings or AMDIMConfig(data="/data/someone/digits"), **facts)
    rows = json.loads((folder / "eval.json").read_text())["probes"]
    kept = [row for row in rows if baselines or row["encoder"] == "trained"]
    evaluate._write_csv(folder / "eval.csv", kept)
    return folder


def test_what_is_kept_names_no_path(tmp_path):
    facts = {"title": "AMDIM", "epochs": 3, "views": 6, "parameters": 3_141_376}
    run = training.keep(evaluated(tmp_path / "first", 61.25, **facts), tmp_path / "kept")
    assert {key: run.about[key] for key in facts} == facts
    files = sorted((tmp_path / "kept").iterdir())
    assert [file.name for file in files] == [
        f"first.{end}" for end in ("config.yaml", "eval.csv", "log.jsonl", "run.json")
    ]
    assert all("someone" not in file.read_text() for file in files)
    assert "data: path/to/digits\n" in files[0].read_text()
    (tmp_path / "first/samples.png").write_bytes(b"of a model that generates")
    training.keep(tmp_path / "first", tmp_path / "kept")
    assert (tmp_path / "kept/first.samples.png").read_bytes() == b"of a model that generates"


def test_untrained_encoders_are_those_of_the_same_model(tmp_path):
    other = AMDIMConfig()
    other.model.ndf = 77
    facts = {"environment": {"threads": 2, "commit": "0123456789"}}
    for run_dir in (
        evaluated(tmp_path / "runs/full", 61.25, **facts),
        evaluated(tmp_path / "runs/again", 73.5, baselines=False, **facts),
        evaluated(tmp_path / "runs/wider", 75.0, other, baselines=False, **facts),
    ):  # fmt: skip
        training.keep(run_dir, tmp_path)
    table = training.accuracy_table("digits", tmp_path).splitlines()
    lines = {line.split(" | ")[0].strip("| "): line for line in table[::-1]}
    full, again, wider = (lines[name].split(" | ") for name in ("full", "again", "wider"))
    assert full[2] == "**61.2**"
    assert again[2] == "**73.5**"
    assert full[3] == again[3] != "–"
    assert wider[3] == "–"
    assert lines["raw pixels"].split(" | ")[2] == "94.2"
    best = max(
        float(x["accuracy_pct"]) for x in training.Run("full", tmp_path).accuracies("f1", ("linear", "all"), "random")
    )
    assert full[3] == f"{best:.1f}"
    training.draw("digits", tmp_path / "picture.png", tmp_path)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    older = training.budget_table("digits", tmp_path)
    assert "| full | – | – | 420 | 2.5 | 437 | 25.0 | 2 | 0123456 |" in older


def test_a_run_without_an_evaluation_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^run: .* holds no eval.json; evaluate it first: fused-nce eval .*$"):
        training.keep(tmp_path, tmp_path / "kept")
