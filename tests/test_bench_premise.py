"""The study of the number of negatives: its runs differ in nothing else, and go on where they stopped."""

from __future__ import annotations

import json
import subprocess

import pytest

from bench import premise
from fused_nce.train import command

RUNS = [(name, negatives) for name, arm in premise.ARMS.items() for negatives in arm.counts]


@pytest.mark.parametrize(("name", "negatives"), RUNS)
def test_an_update_has_the_same_images_whatever_a_loss_compares(name, negatives, tmp_path):
    arguments = premise.command(name, negatives, 3, "digits", 2, tmp_path / "run")
    settings = command.parse(arguments[1], arguments[2:])[0]
    settings.check()
    compared = settings.local_batch(1)
    assert compared * settings.optim.accumulate == premise.IMAGES
    assert settings.seed == 3
    batches = premise.TRAINING // compared
    assert settings.run.max_steps == 194
    assert batches // settings.optim.accumulate * 2 >= 194
    arm = premise.ARMS[name]
    assert (settings.model.queue_size if arm.queue else compared) == negatives
    assert arm.tap in settings.taps


def test_runs_that_are_done_are_kept_and_a_started_one_goes_on(tmp_path, monkeypatch):
    told: list[list[str]] = []
    real = subprocess.run

    def run(arguments, **options):
        if "fused_nce.cli" not in arguments:  # git
            return real(arguments, **options)
        told.append(arguments[3:])
        folder = tmp_path / f"moco-16-{len(told) // 3}-epochs-2"
        if told[-1][0] == "eval":
            probes = [
                {"probe": probe, "labels": "all", "accuracy_pct": 50.0 + i} for i, probe in enumerate(premise.PROBES)
            ]
            found = {"probes": probes, "training": {"steps": 97, "minutes": 1.234}}
            (folder / "eval.json").write_text(json.dumps(found))
        else:
            folder.mkdir(exist_ok=True)
        return None

    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "moco-16-1-epochs-2/checkpoints/step_00000004").mkdir(parents=True)
    out = tmp_path / "premise.json"
    options = ["--data=x", f"--runs={tmp_path}", f"--out={out}", "--arms", "moco", "--negatives", "16", "--seeds=2"]
    assert premise.main(options) == 0
    assert [words[0] for words in told] == ["train", "eval"] * 2
    assert told[0][1] == "moco"
    assert told[2][1:] == ["--resume", str(tmp_path / "moco-16-1-epochs-2")]
    first = out.read_text()
    assert premise.main(options) == 0
    assert len(told) == 4
    assert json.loads(out.read_text())["runs"] == json.loads(first)["runs"]
    assert "| MoCo, queue | 16 | 50.0 ± 0.0 | 51.0 ± 0.0 | 2 |" in premise.block(out)
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert premise.block(tmp_path / "none.json").startswith("No record is committed yet")
