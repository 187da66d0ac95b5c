"""`fused-nce bench`: every way that can run is timed beside ours, and what cannot run says why."""

import json
import re

import pytest
import torch

import fused_nce
from fused_nce import cli
from fused_nce.bench import command, rivals
from fused_nce.bench.formulas import FORMULAS
from fused_nce.bench.rivals import RIVALS, Rival


def test_a_run_prints_a_table_and_leaves_a_picture_and_a_json(tmp_path, capsys):
    options = ["--loss=info_nce", "--n=48", "--d=16", "--device=cpu", "--no-compile", f"--out={tmp_path}"]
    assert cli.main(["bench", *options]) == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "bench.json").read_text())
    assert {"eager", "ours"} <= record["ways"].keys()
    for row in record["ways"].values():
        assert row["time_ms_median"] > 0
        assert row["gradient_error"] < 1e-5
        assert row["label"] in said
    assert f"chosen: {record['chosen']}" in said
    assert record["ways"]["ours"]["label"] == f"fused_nce ({record['chosen']})"
    assert record["chosen"] not in record["ways"]  # once
    assert "left out: fused_nce, triton: needs a GPU" in said or torch.cuda.is_available()
    assert record["rounds"] >= 3
    assert (tmp_path / "bench.png").read_bytes()[1:4] == b"PNG"


def test_a_way_that_raises_or_is_too_large_is_left_out_with_its_reason(monkeypatch):
    def broken(problem):
        raise RuntimeError("cannot here\nmore")

    monkeypatch.setitem(RIVALS, "lightly", Rival("lightly", broken))
    problem = command.problem_of("nt_xent", 32, 8)
    monkeypatch.setattr(command, "_peak_mib", lambda *_: None)
    found = command.measured(problem, "float32", torch.device("cpu"), compiling=False)
    assert found["left_out"]["lightly"] == "RuntimeError: cannot here"
    assert "–" in command.table(found)
    monkeypatch.setattr(command, "_available_bytes", lambda device: 1000)
    found = command.measured(problem, "bfloat16", torch.device("cpu"), compiling=False)
    assert "its scores would take" in found["left_out"]["eager torch"]
    assert 1e-4 < found["ways"]["ours"]["gradient_error"] < 3e-2


def test_what_is_not_installed_and_what_is_another_loss_are_told_apart(monkeypatch):
    known = {"torch": object()}
    monkeypatch.setattr(rivals.importlib.util, "find_spec", known.get)
    said = {name: rival.why_none("nt_xent") for name, rival in RIVALS.items()}
    assert {name: why for name, why in said.items() if why == "not installed"}.keys() == {"lightly", "pml"}
    others = {name for name, why in said.items() if why == "does not compute nt_xent"}
    assert others == {"auto_chunker", "linear_cross_entropy", "open_clip"}
    known["lightly"] = object()  # and an import of ours fails
    assert RIVALS["lightly"].why_none("nt_xent") == "not in this version"
    monkeypatch.setattr(command, "_peak_mib", lambda *_: None)
    problem = command.problem_of("nt_xent", 32, 8)
    text = command.table(command.measured(problem, "float32", torch.device("cpu"), compiling=False))
    assert "left out: open_clip: does not compute nt_xent\n" in text


def test_errors_and_ratios_are_what_they_say(monkeypatch):
    """Of a rival whose loss is 1 % too large; without time for memory, which is said."""
    naive = FORMULAS["info_nce"].naive
    monkeypatch.setitem(RIVALS, "lightly", Rival("too large", lambda problem: lambda *x: 1.01 * naive(*x)))
    monkeypatch.setattr(command, "MEMORY_S", command.LIMIT_S)
    found = command.measured(command.problem_of("info_nce", 32, 8), "float32", torch.device("cpu"), compiling=False)
    assert found["ways"]["lightly"]["value_error"] == pytest.approx(0.01, rel=1e-3)
    assert found["ways"]["lightly"]["gradient_error"] == pytest.approx(0.01, rel=1e-3)
    assert found["chosen"] == ("cpu" if fused_nce.backends()["cpu"] is None else "chunked")
    found["ways"]["eager"]["time_ms_median"] = 3 * found["ways"]["ours"]["time_ms_median"]
    text = command.table(found)
    assert re.search(r"\| eager torch \| [^|]+\| [^|]+\| 3.00 \| – \|", text)
    assert "left out: eager torch, its peak memory: no time left within 110 s" in text


def test_what_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(command, "CALL_S", 0.0)
    monkeypatch.setattr(command, "_peak_mib", lambda *_: None)
    found = command.measured(command.problem_of("info_nce", 32, 8), "float32", torch.device("cpu"), compiling=False)
    assert set(found["ways"]) == {"ours"}
    assert found["left_out"]["eager torch"] == "one call takes 0.0 s"
    monkeypatch.setattr(command, "LIMIT_S", 0.0)
    found = command.measured(command.problem_of("info_nce", 32, 8), "float32", torch.device("cpu"), compiling=False)
    assert set(found["ways"]) == {"ours"}
    assert found["rounds"] == 2
    assert found["left_out"]["eager torch"] == "no time left within 0 s"


def test_every_loss_of_the_benchmark_has_a_size():
    for loss in FORMULAS:
        problem = command.problem_of(loss, 8, 8)
        value = FORMULAS[loss].ours(*problem.inputs(), "chunked")
        assert value.isfinite(), loss


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--n", "1"], "--n: must be at least 4, got 1"),
        (["--loss", "nt_xent", "--n", "127"], "--n: must be even for nt_xent, whose rows are two views of"),
        (["--device", "tpu?"], "--device: must be cpu or cuda, got 'tpu?'"),
        (["--device", "meta"], "--device: must be cpu"),
        (["--loss", "bogus"], "--loss: invalid choice: 'bogus' (choose from "),
        (["--n", "many"], "--n: invalid int value: 'many'"),
        (["--losss", "clip"], "unrecognized arguments: --losss clip"),
    ],
)
def test_a_bad_option_is_one_line(options, said, capsys):
    assert cli.main(["bench", *options]) == cli.USERS
    written = capsys.readouterr().err
    assert written.startswith(f"fused-nce: {said}")
    assert written.count("\n") == 1
