"""What is shown beside the log: TensorBoard, and Weights & Biases, played by a module of its name."""

import importlib.machinery
import os
import sys
import types
from typing import Any
from unittest.mock import Mock

import pytest

from fused_nce.train import command, config, loop
from fused_nce.train.monitor import boards, profile
from tests.train.runs import TINY, log, resumed, trainer


@pytest.fixture
def wandb(monkeypatch):
    """A module of that name that writes down what it is told."""
    fake: Any = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.runs, fake.fails = [], False

    class Run:
        def __init__(self, **told):
            self.told, self.lines, self.finished = told, [], False

        def log(self, values, step):
            if fake.fails:
                raise OSError("the service\nis gone")
            self.lines.append({"step": step, **values})

        def finish(self):
            self.finished = True

    def init(**told):
        fake.runs.append(Run(**told))
        return fake.runs[-1]

    fake.init, fake.Settings = init, dict
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_run_and_its_resume_are_one_run_of_the_project(tmp_path, wandb):
    run = trainer(tmp_path / "a", "--max-steps=4", "--run.wandb=mine")
    run.run()
    resumed(tmp_path / "a", "--max-steps=8").run()
    first, second = wandb.runs
    told = {"project": "mine", "name": "a", "dir": str(tmp_path / "a"), "resume": "allow"}
    for found in wandb.runs:
        assert {key: found.told[key] for key in told} == told
        assert found.finished
    assert first.told["config"] == config.to_dict(run.config)
    assert first.told["id"] == second.told["id"]
    numbers = [{k: v for k, v in line.items() if v is not None} for line in log(tmp_path / "a")]
    assert first.lines + second.lines == numbers
    assert [line["step"] for line in numbers] == [4, 8]
    trainer(tmp_path / "b", "--max-steps=1", "--run.wandb=mine").run()
    assert wandb.runs[2].told["id"] != first.told["id"]


def test_a_service_that_fails_is_left_out(tmp_path, wandb, caplog):
    wandb.fails = True
    assert trainer(tmp_path / "a", "--max-steps=8", "--run.wandb=mine").run() == "finished"
    assert caplog.text.count("W&B: no more events are written (the service is gone); training goes on") == 1
    assert wandb.runs[0].finished
    wandb.init = None
    assert trainer(tmp_path / "b", "--max-steps=4", "--run.wandb=mine").run() == "finished"
    assert "W&B: nothing is logged ('NoneType' object is not callable); training goes on" in caplog.text
    assert [line["step"] for line in log(tmp_path / "a")] == [4, 8]


def test_without_the_package_the_setting_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fused_nce.train.monitor.boards.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"run\.wandb: must be null without wandb \(pip install wandb\), got mine"):
        trainer(tmp_path / "a", "--run.wandb=mine")
    with pytest.raises(ValueError, match=r"run\.wandb: must be null or the name of a project, got ''"):
        command.parse("amdim", ["--run.wandb=", f"--out={tmp_path / 'b'}"])
    trainer(tmp_path / "c", "--max-steps=1").run()
    assert not (tmp_path / "c" / "tensorboard").exists()


def test_an_error_is_what_is_seen_whatever_the_end_of_the_run_raises(tmp_path, monkeypatch, caplog):
    """The bar, the log, its boards, the trace of half an update, and the save and the farewell that follow an error."""

    def failing(said):
        def fail(*_, **__):
            raise RuntimeError(said)

        return fail

    update = loop.Trainer._update
    monkeypatch.setattr(loop.Trainer, "_update", lambda run, *a: update(run, *a) if run.step < 7 else failing("real")())
    monkeypatch.setattr(profile.Profile, "_read", failing("trace"))
    run = loop.Trainer(*command.parse("amdim", [*TINY, f"--out={tmp_path / 'a'}"])[:2], profile=True)
    bar, system = Mock(), types.SimpleNamespace(**vars(os))
    monkeypatch.setattr(loop.host, "progress_bar", lambda **_: bar)
    monkeypatch.setattr(loop.journal, "os", system)
    ends = {"save": run.writer, "close": run, "bar": bar, "log": system, "board": boards.Boards}
    for said, holder in ends.items():
        monkeypatch.setattr(holder, "save" if said == "save" else "close", failing(said))
    with pytest.raises(RuntimeError, match=r"^real$"):
        run.run()
    monkeypatch.undo()
    assert [line.rpartition(" ")[2] for line in caplog.messages if line.startswith("the end of")] == list(ends)
